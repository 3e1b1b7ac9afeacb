"""Masked and any-order models: MAR and its KL autoencoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity import Oracle

from t2i_jax.convert import convert

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def klvae(oracle: Oracle) -> dict[str, Any]:
    meta, inputs = oracle.config, oracle.inputs
    codec, model = convert("kl", oracle.tensors, scale=meta["scale_factor"], eps=meta["groupnorm_eps"])

    @jax.jit
    def everything(model, image, noise):
        q = codec.posterior(model, image)
        recon = lambda noise: codec.decode(model, codec.encode(model, image, noise))
        pictures = {
            "moments": codec.moments(model, image),
            "mean": q.mean,
            "logvar": q.logvar,
            "std": q.std,
            "sample": q.sample(noise),
            "recon_mode": recon(None),
            "recon_sample": recon(noise),
        }
        return {"kl": q.kl()} | {k: jnp.transpose(v, NCHW) for k, v in pictures.items()}

    return everything(model, *(np.transpose(inputs[name], NHWC) for name in ("image", "posterior_noise")))


SYSTEMS = {"mar_klvae": klvae}
