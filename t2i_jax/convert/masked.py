"""Formats of masked and any-order models, and of the KL autoencoders whose latents they draw."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.kl import KL
from t2i_jax.convert import Format
from t2i_jax.interop import kl, mar, vqgan
from t2i_jax.interop.names import Table, Tensors
from t2i_jax.models.masked import Masked
from t2i_jax.nn.condition import Classes
from t2i_jax.nn.heads import Diffusion

# What the shapes of a file cannot say: Stable Diffusion 1 and 2 (4 channels); MAR (16); Stable Diffusion 3 (16 channels
# without convolutions; FLUX.1 has the same shapes, scale 0.3611 and shift 0.1159). SDXL: 4 channels, scale 0.13025.
SCALES = {(4, True): (0.18215, 0.0), (16, True): (0.2325, 0.0), (16, False): (1.5305, 0.0609)}


def _kl(
    tensors: Tensors,
    style: vqgan.Style,
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
    found["autoencoder"] = AutoencoderConfig(**found["autoencoder"], groups=groups, eps=eps)
    found["scale"], found["shift"] = (
        k if given is None else given for given, k in zip((scale, shift), known, strict=True)
    )
    weights: dict[str, Any] = {"perceptual": 0.0, "adversarial": 0.0}  # released files hold no adversary
    return KL(**(weights | found | fields))


def _kl_table(config: KL, style: vqgan.Style) -> Table:
    return vqgan.table(jax.eval_shape(config.init, jax.random.key(0)), style)


def _mar(
    tensors: Tensors,
    *,
    grid: tuple[int, int] | None = None,
    heads: int = 0,
    decoder_heads: int = 0,
    respacing: str = "100",
    repeat: int = 4,
    **fields: Any,
) -> Masked:
    """grid: where it is no square; heads: where a released width does not say them; respacing: steps of the head's
    sampler; repeat: times at which it trains each z."""
    found = mar.describe(tensors, grid)
    found["heads"], found["decoder_heads"] = heads or found["heads"], decoder_heads or heads or found["decoder_heads"]
    found["head"] = Diffusion(**found["head"], respacing=respacing, repeat=repeat)
    return Masked(condition=Classes(found.pop("classes")), **(found | fields))


KL_STYLES: dict[str, vqgan.Style] = {"kl": "taming", "kl_diffusers": "diffusers", "kl_diffusers_2022": "diffusers_2022"}

FORMATS = {"mar": Format(_mar, mar.table, mar.UNUSED)} | {
    name: Format(partial(_kl, style=style), partial(_kl_table, style=style), kl.UNUSED)
    for name, style in KL_STYLES.items()
}
