"""Formats of masked and any-order models, and of the KL autoencoders whose latents they draw."""

from functools import partial
from typing import Any

import jax

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.convert import Format
from t2i_jax.interop import kl
from t2i_jax.interop.names import Table, Tensors

# What the shapes of a file cannot say: Stable Diffusion 1 and 2 (4 channels); MAR (16); Stable Diffusion 3 (16 channels
# without convolutions; FLUX.1 has the same shapes, scale 0.3611 and shift 0.1159). SDXL: 4 channels, scale 0.13025.
SCALES = {(4, True): (0.18215, 0.0), (16, True): (0.2325, 0.0), (16, False): (1.5305, 0.0609)}


def _kl(
    tensors: Tensors,
    style: kl.Style,
    *,
    scale: float | None = None,
    shift: float | None = None,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: Any,
) -> KL:
    """scale, shift: of the latents, where they are not those of SCALES."""
    found = kl.describe(tensors, style)
    known = SCALES.get((found["channels"], found["convolutions"]), (1.0, 0.0))
    autoencoder = AutoencoderConfig(**found.pop("autoencoder"), groups=groups, eps=eps)
    scale, shift = (k if given is None else given for given, k in zip((scale, shift), known, strict=True))
    return KL(autoencoder, scale=scale, shift=shift, **({"perceptual": 0.0, "adversarial": 0.0} | found | fields))


def _kl_table(config: KL, style: kl.Style) -> Table:
    return kl.table(jax.eval_shape(config.init, jax.random.key(0)), style)


FORMATS = {
    name: Format(partial(_kl, style=style), partial(_kl_table, style=style), kl.UNUSED)
    for name, style in {"kl": "taming", "kl_diffusers": "diffusers", "kl_diffusers_2022": "diffusers_2022"}.items()
}
