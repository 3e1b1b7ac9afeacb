"""Single-stream models and their discrete codecs: DALL-E's and DALLE-pytorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity import Oracle

from t2i_jax.convert import convert


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def openai_dvae(oracle: Oracle) -> dict[str, Any]:
    config, model = convert("openai_dvae", oracle.tensors)

    @jax.jit
    def run(images):
        logits = config.logits(model, images)
        codes = config.encode(model, images)
        painted = config.paint(model, config.embed(model, codes))
        return config.mapped(images), logits, codes, painted, config.decode(model, codes)

    mapped, logits, codes, painted, seen = run(nhwc(oracle.inputs["image01"]) * 2 - 1)
    return {
        "mapped": nchw(mapped),
        "logits": nchw(logits),
        "ids": codes,
        "decoder_out": nchw(painted),
        "recon": nchw(seen) / 2 + 0.5,
    }


SYSTEMS = {"openai_dvae": openai_dvae}
