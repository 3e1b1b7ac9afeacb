"""Formats of discrete diffusion models."""

import numpy as np

from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import Format, codecs
from t2i_jax.core.family import with_fields
from t2i_jax.interop import vq_diffusion, vqgan
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.interop.tensorfile import content
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.sampling.options import DiscreteSampler


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
    **fields: object,
) -> VQDiffusion:
    """Hints as for `interop.vq_diffusion.describe`; by default it samples as the authors do."""
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
    plain = DiscreteSampler(guidance=1.0, truncation=0.86)
    classes, text = DiscreteSampler(guidance=1.5, truncation=0.94), DiscreteSampler(guidance=3.0)
    guided = classes if "mean_null" in found else text
    found["sampling"] = guided if found["condition_dropout"] else plain
    return with_fields(VQDiffusion(), **(found | fields))


def _codec(tensors: Tensors, **fields: object) -> VQGAN:
    describe, given = codecs.gumbel if "quantize.proj.weight" in tensors else codecs.taming, Fields(fields)
    return describe(tensors, **given)


def _used(tensors: Tensors, *, used: str | np.ndarray | None = None, **fields: object) -> tuple[Tensors, Fields]:
    """used: the authors' file, or array, that maps all codes of the codec to those that the model has, where it does
    not have them all: `taming_vqvae_2887.pt` for captions, `taming_vqvae_974.pt` for ImageNet."""
    table = content(used) if isinstance(used, str) else used
    return vq_diffusion.codec_tensors(tensors, None if table is None else np.asarray(table)), fields


FORMATS = {
    "vq_diffusion": Format(
        _vq_diffusion,
        lambda config: vq_diffusion.table(
            config.transformer,
            config.conditioning.what,
            learned_times=config.times == "learned",
            class_norm=config.rows > 0,
            conv_mlp=config.conv_mlp,
            importance=config.importance,
        ),
        vq_diffusion.UNUSED,
        needed=(vq_diffusion.NEEDED,),
        part=vq_diffusion.PART,
        buffers=lambda c: vq_diffusion.buffers(
            c.chain, c.transformer.depth, c.importance, c.length if c.by_tokens else 0
        ),
        title="VQ-Diffusion: captions (COCO, CUB-200, ITHQ), classes (ImageNet), faces (FFHQ)",
        example="coco_learnable.pth --codec models/vq_diffusion-codec --text clip-tokens:FOLDER",
    ),
    "vq_diffusion-codec": Format(
        _codec,
        codecs.table_of("taming"),
        vqgan.IGNORED,
        needed=(vqgan.needed("taming"), vq_diffusion.CODEC_NEEDED),
        part=codecs.STAGE,
        adapt=_used,
        title="the codec of a VQ-Diffusion model, with the codes that it has: a Gumbel VQGAN, a VQGAN, or ITHQ's own",
        example="vqgan_gumbel_f8.ckpt --used taming_vqvae_2887.pt",
    ),
}
