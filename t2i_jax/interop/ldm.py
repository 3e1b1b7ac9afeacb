"""Names of latent diffusion's UNets with Transformer blocks (Rombach et al. 2022), and sizes by their shapes."""

from __future__ import annotations

import re

from flax import nnx

from t2i_jax.interop import adm, stable_diffusion
from t2i_jax.interop.names import POINTWISE, Fields, Table, Tensors, require
from t2i_jax.networks.unet import UNet

BLOCKS = "middle_block.1.transformer_blocks."
NEEDED = (*adm.NEEDED, f"{BLOCKS}0.attn2.to_k.weight", "out.2.weight")
"""Names that every such file has."""


def describe(tensors: Tensors) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network.

    Neither the attention heads nor the side of the latents follow. Errors: ValueError where the names are not those of
    such a model.
    """
    require(tensors, NEEDED, "no UNet of latent diffusion with Transformer blocks")
    found = adm.describe(tensors, channels=tensors["out.2.weight"].shape[0])
    depth = 1 + max(int(m[1]) for m in (re.match(rf"{re.escape(BLOCKS)}(\d+)\.", name) for name in tensors) if m)
    context = tensors[f"{BLOCKS}0.attn2.to_k.weight"].shape[1]
    return found | {"transformers": depth, "context": context, "pool": "none"}


def table(model: nnx.Module, config: UNet) -> Table:
    """The published name and layout of each variable of a UNet with Transformer blocks. config: of the network."""
    return adm.table(model, lambda place, rest, v: stable_diffusion.attention(place, rest, config, v, POINTWISE))
