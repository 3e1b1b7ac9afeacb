"""Formats of discrete diffusion models."""

import dataclasses
from typing import Any

from t2i_jax.convert import Format
from t2i_jax.interop import vq_diffusion
from t2i_jax.interop.names import Tensors
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.noise.reverse import Reverse


def _vq_diffusion(tensors: Tensors, **hints: Any) -> VQDiffusion:
    """Hints as for `interop.vq_diffusion.describe`; draws as the authors do for each kind of model."""
    config = VQDiffusion(**vq_diffusion.describe(tensors, **hints))
    guided = config.condition_dropout > 0
    text = Reverse(guidance=3.0) if guided else Reverse(guidance=1.0, truncation=0.86)
    classes = Reverse(guidance=1.5, truncation=0.94) if guided else Reverse(guidance=1.0, truncation=0.86)
    return dataclasses.replace(config, sampling=classes if config.rows else text)


FORMATS = {
    "vq_diffusion": Format(
        _vq_diffusion, vq_diffusion.table, vq_diffusion.UNUSED, part=vq_diffusion.PART, root=vq_diffusion.ROOT
    )
}
