"""Formats of discrete diffusion models."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from t2i_jax.convert import Format, convert
from t2i_jax.interop import vq_diffusion
from t2i_jax.interop.names import Tensors
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.noise.reverse import Reverse


def _vq_diffusion(
    tensors: Tensors,
    *,
    grid: tuple[int, int] | None = None,
    heads: int = 16,
    steps: int = 0,
    length: int = 77,
    activation: str = "GELU2",
    class_type: str = "adalayernorm",
    null_class: bool | None = None,
    **fields: Any,
) -> VQDiffusion:
    """Hints as for `interop.vq_diffusion.describe`; unless told otherwise it draws as the authors do."""
    found = vq_diffusion.describe(
        tensors,
        grid=grid,
        heads=heads,
        steps=steps,
        length=length,
        activation=activation,
        class_type=class_type,
        null_class=null_class,
    )
    plain, classes, text = Reverse(1.0, 0.86), Reverse(1.5, 0.94), Reverse(3.0)
    guided = classes if "mean_null" in found else text
    return VQDiffusion(**(found | {"sampling": guided if found["condition_dropout"] else plain} | fields))


def codec(tensors: Mapping[str, Any], full_to_used: np.ndarray | None = None, **hints: Any) -> tuple[Any, Any]:
    """Configuration and model of the codec whose codes a VQ-Diffusion model draws.

    tensors: those of taming-transformers' file, or of a released VQ-Diffusion file, which holds its codec.
    full_to_used: the authors' map (codes of the codec,) of all codes to those that the model knows, where it does not
    know them all: 2887 of 8192 for captions, 974 of 16384 for ImageNet. Errors: ValueError where names do not fit.
    """
    mine = vq_diffusion.codec_tensors(tensors, full_to_used)
    return convert("taming-gumbel" if "quantize.proj.weight" in mine else "taming-vqgan", mine, **hints)


FORMATS = {
    "vq_diffusion": Format(
        _vq_diffusion,
        vq_diffusion.table,
        vq_diffusion.UNUSED,
        part=vq_diffusion.PART,
        root=vq_diffusion.ROOT,
        buffers=vq_diffusion.buffers,
        title="VQ-Diffusion: captions (COCO, CUB-200, ITHQ), classes (ImageNet), faces (FFHQ)",
        example="coco_learnable.pth --codec models/taming-gumbel --text clip-tokens:FOLDER",
    )
}
