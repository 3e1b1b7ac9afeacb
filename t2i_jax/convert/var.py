"""Formats of VAR: next-scale Transformers, and the codec of several scales."""

from __future__ import annotations

from typing import cast

import numpy as np
from flax import nnx

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.multiscale import MultiScaleConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.convert import Format
from t2i_jax.convert.codecs import table_of
from t2i_jax.core.family import with_fields
from t2i_jax.interop import var, vqgan
from t2i_jax.interop.names import Fields, Tensors
from t2i_jax.models.var import VAR, VARNetwork
from t2i_jax.networks.condition import ClassEmbedder

HITS = "quantize.ema_vocab_hit_SV"
"""How often each code was used at each scale: a statistic that the codec's file holds."""


def _var(
    tensors: Tensors,
    *,
    scales: tuple[int, ...] = (),
    heads: int = 0,
    share_quant_resi: int = 4,
    quant_resi: float = 0.5,
    eps: float = 1e-6,
    **fields: object,
) -> VAR:
    """share_quant_resi, quant_resi: number of convolutions of the codec and their share, which the file lacks."""
    found = var.describe(tensors, scales, heads)
    classes, shared = found.pop("classes"), found.pop("shared")
    scales, codes, dim = (found.pop(name) for name in ("scales", "codes", "dim"))
    codebook = QuantizerConfig(codes, dim, normalize=False)
    quantizer = MultiScaleConfig(codebook, scales, share_quant_resi, quant_resi)
    # Without lengths of 1, products of queries and keys are a quarter of what is usual.
    found["scale"] = 0.0 if found["cosine"] else 0.25 * (found["width"] // found["heads"]) ** -0.5
    found |= {"eps": eps, "condition": ClassEmbedder(classes), "shared": shared, "quantizer": quantizer}
    return with_fields(VAR(), **(found | fields))


def _codec(
    tensors: Tensors,
    *,
    scales: tuple[int, ...] = (),
    quant_resi: float = 0.5,
    beta: float = 0.25,
    znorm: bool = False,
    groups: int = 32,
    eps: float = 1e-6,
    **fields: object,
) -> VQGAN:
    """scales: sides of the maps of codes; those of 256 x 256 pixels if the file does not say otherwise."""
    found = vqgan.describe(tensors, "var")
    autoencoder = AutoencoderConfig(**found["autoencoder"], groups=groups, eps=eps)
    codebook = QuantizerConfig(**found["quantizer"], normalize=False, cosine=znorm, commitment=beta)
    scales = tuple(scales) or MultiScaleConfig().scales
    if HITS in tensors and tensors[HITS].shape[0] != len(scales):
        raise ValueError(f"{tensors[HITS].shape[0]} scales: give their sides, as --scales 1 2 3 4")
    convolutions = sum(name.startswith("quantize.quant_resi.") and name.endswith(".weight") for name in tensors)
    published: Fields = {
        "quantizer": MultiScaleConfig(codebook, scales, convolutions, quant_resi if convolutions else 0.0),
        "kernel": tensors["quant_conv.weight"].shape[-1],
        "adversarial": 0.0,  # the file has no discriminator
    }
    return VQGAN(autoencoder, **(published | Fields(fields)))


def _alone(model: nnx.Module) -> nnx.Module:
    return cast(VARNetwork, model).with_vectors(None)


FORMATS = {
    "var": Format(
        _var,
        lambda c: var.table(c.transformer.heads, c.transformer.width, c.transformer.cosine, c.shared),
        var.UNUSED,
        needed=(var.NEEDED,),
        buffers=lambda config: var.buffers(config.scales),
        alone=_alone,
        title="VAR's next-scale models of classes, d16 to d36",
        example="var_d16.pth --codec models/var-vqvae",
    ),
    "var-vqvae": Format(
        _codec,
        table_of("var"),
        vqgan.IGNORED,
        needed=((*vqgan.needed("var"), "encoder.mid.attn_1.qkv.weight"),),
        # Published names of one convolution for all scales, and of one for each.
        renames=(
            (r"quant_resi\.qresi\.", "quant_resi.qresi_ls.0."),
            (r"quant_resi\.(\d+)\.", r"quant_resi.qresi_ls.\1."),
        ),
        buffers=lambda c: {HITS: np.zeros((len(c.scales), c.vocabulary), np.float32)},
        title="VAR's codec of several scales",
        example="vae_ch160v4096z32.pth",
    ),
}
