"""Single-stream models and their discrete codecs: DALL-E's and DALLE-pytorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity import Oracle

from t2i_jax.convert import convert, restore
from t2i_jax.nn.draw import Sampling, truncate


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


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1).mean()


def mindalle(oracle: Oracle) -> dict[str, Any]:
    meta, inputs, outputs = oracle.config, oracle.inputs, oracle.outputs
    activation = "quick_gelu" if meta["gelu_use_approx"] else "gelu"
    config, model = convert("mindalle", oracle.tensors, heads=meta["n_heads"], activation=activation)
    text, codes = jnp.asarray(inputs["texts"]), jnp.asarray(inputs["images"])
    batch = {"text": text, "codes": codes.reshape(-1, *config.grid)}

    def objective(model):
        logits_txt, logits_img = config.forward(model, batch)
        loss = cross_entropy(logits_img, codes)
        return loss, (logits_txt, logits_img, cross_entropy(logits_txt, text[:, 1:]))

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss_img, (logits_txt, logits_img, loss_txt)), slopes = run(model)
    ours = {"logits_img": logits_img, "logits_txt": logits_txt, "loss_img": loss_img, "loss_txt": loss_txt}
    slopes = restore("mindalle", config, slopes)
    ours |= {name: slopes[name.removeprefix("grad_img.")] for name in outputs if name.startswith("grad_img.")}

    keys = jax.random.split(jax.random.key(0), len(text))
    greedy = config.sample(model, {"text": text}, keys, Sampling(guidance=1.0, greedy=True), segments=1)
    ours["greedy_tokens"] = np.asarray(greedy).reshape(len(text), -1)

    for name in outputs:
        if name.startswith("filtered_probs"):
            k, p = (part[1:] for part in name.split("_")[2:])
            # They stop at a sum of p, where we go on until it is above: the next smaller number says the same.
            p = 1.0 if p == "None" else np.nextafter(np.float32(p), np.float32(0))
            weights = truncate(jnp.asarray(inputs["filter_logits"]), 1.0, 0 if k == "None" else int(k), p)
            ours[name] = weights / weights.sum(-1, keepdims=True)
    return ours


SYSTEMS = {"openai_dvae": openai_dvae, "mindalle": mindalle}
