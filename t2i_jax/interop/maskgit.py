"""Names of the Flax checkpoints of MaskGIT (Chang et al. 2022), and sizes by their shapes.

Names of nested dictionaries are joined by "/". Dense layers and convolutions have the layout of this library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import Fields, Table, Tensors, layers, require, source

WORDS = "params/Embed_0/word_embeddings/embedding"
POSITIONS = "params/Embed_0/position_embeddings/embedding"
LAYER = "params/TransformerLayer_{}"
QUERY = f"{LAYER}/Attention_0/self_attention/query/kernel"
INNER = f"{LAYER}/Mlp_0/intermediate_output/kernel"
TRANSFORMER = (WORDS, POSITIONS, QUERY.format(0), INNER.format(0), "params/MlmLayer_0/mlm_dense/kernel")
"""Names that every Transformer has."""
DENSE, NORM = ("kernel", "bias"), ("scale", "bias")
"""Words for the parameters of a layer."""
KERNEL = "params/{}/{}/kernel"
VQGAN = (*(KERNEL.format(part, "ResBlock_0/Conv_0") for part in ("encoder", "decoder")), "params/quantizer/codebook")
"""Names that every VQGAN has."""
JUDGE = ("params/ResBlock_0/Conv_2/kernel", "params/Dense_1/kernel")
"""Names that every discriminator has."""
CODES = 1024
"""Codes of the released models; their other words are 1000 classes and the mask token."""


def describe(tensors: Tensors, codes: int = CODES, grid: tuple[int, int] | None = None) -> Fields:
    """The sizes given by the shapes of a Transformer's `tensors` (arrays or abstract).

    codes: how many of the words are codes. grid: rows and columns of tokens, where they are no square. Errors:
    ValueError where names are missing, and for numbers of codes and tokens that do not fit.
    """
    require(tensors, TRANSFORMER, "no Transformer of MaskGIT")
    shape = lambda name: tuple(tensors[name].shape)
    words, length = shape(WORDS)[0], shape(POSITIONS)[0] - 1
    if not 0 < codes < words - 1:
        raise ValueError(
            f"codes {codes}: the table has {words} words, which are codes, classes and the mask token; give codes= "
            "how many are codes"
        )
    side = math.isqrt(length)
    if math.prod(grid or (side, side)) != length:
        how = f"grid {grid} has {math.prod(grid)}" if grid else "no square: give their rows and columns as grid="
        raise ValueError(f"the file has positions of {length} tokens: {how}")
    width, heads, head_dim = shape(QUERY.format(0))
    return {
        "grid": grid or (side, side),
        "codes": codes,
        "classes": words - codes - 1,
        "transformer": {
            "width": width,
            "depth": _count(tensors, "params/TransformerLayer_"),
            "heads": heads,
            "head_dim": 0 if heads * head_dim == width else head_dim,
            "mlp": shape(INNER.format(0))[1],
        },
    }


def table(codes: int, classes: int, heads: int) -> Table:
    """Names for a `models.masked.Masked` with one stack and a tied table: of codes, classes, and the mask token, whose
    id -1 is the last row."""
    words = codes + classes + 1
    rows = lambda start, stop: {"rows": np.arange(start, stop), "height": words}
    lines = {
        "entrance.w": source(WORDS, **rows(0, codes)),
        "condition.table.w": source(WORDS, **rows(codes, words - 1)),
        "mask_token": source(WORDS, layout="1 d -> d", **rows(words - 1, words)),
        "position": source(POSITIONS),
        "output_bias": source("params/MlmLayer_0/mlm_bias/bias"),
    }
    attention, layer = f"{LAYER}/Attention_0", f"{LAYER}/Mlp_0"
    parts = [f"{attention}/self_attention/{name}" for name in ("query", "key", "value")]
    out = f"{attention}/self_attention/out"
    lines |= {
        "blocks.attention.qkv.w": source(*(f"{p}/kernel" for p in parts), layout="a d n h -> d (n a h)", n=heads),
        "blocks.attention.qkv.b": source(*(f"{p}/bias" for p in parts), layout="a n h -> (n a h)", n=heads),
        "blocks.attention.out.w": source(f"{out}/kernel", layout="n h d -> (n h) d", n=heads),
        "blocks.attention.out.b": source(f"{out}/bias"),
    }
    norms = {
        "entrance_norm": "params/Embed_0/embeddings_ln",
        "blocks.attention_norm": f"{attention}/attention_output_ln",
        "blocks.mlp_norm": f"{layer}/layer_output_ln",
        "transform_norm": "params/MlmLayer_0/mlm_ln",
    }
    dense = {
        "blocks.mlp.into": f"{layer}/intermediate_output",
        "blocks.mlp.out": f"{layer}/layer_output",
        "transform": "params/MlmLayer_0/mlm_dense",
    }
    return lines | layers(norms, ends=NORM, between="/") | layers(dense, ends=DENSE, between="/")


def _count(tensors: Tensors, prefix: str) -> int:
    """How many layers have names that begin with `prefix` and a number."""
    return len({found[1] for name in tensors if (found := re.match(rf"{re.escape(prefix)}(\d+)/", name))})


# -- the VQGAN and its discriminator

INSIDE = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1", "shortcut": "Conv_2"}
"""Layers of a residual block of autoencoders."""


def describe_vqgan(tensors: Tensors) -> dict[str, Fields]:
    """From the shapes of `tensors` (arrays or abstract): fields of autoencoder and quantiser.

    Errors: ValueError where names are missing, and for numbers of layers that the released program does not make.
    """
    require(tensors, VQGAN, "no VQGAN of MaskGIT")
    out = lambda name: tuple(tensors[name].shape)[-1]
    levels = _count(tensors, "params/decoder/Conv_") - 1
    blocks, odd = divmod(_count(tensors, "params/encoder/ResBlock_"), levels + 1)
    if odd or _count(tensors, "params/encoder/Conv_") != 2 or levels < 1:
        raise ValueError("the encoder has other layers than the released ones: it halves images by means")
    first = KERNEL.format("encoder", "Conv_0")
    widths = [out(KERNEL.format("encoder", f"ResBlock_{n * blocks}/Conv_1")) for n in range(levels)]
    if any(width % out(first) for width in widths):
        raise ValueError(f"widths {widths} of the levels are no multiples of the {out(first)} of the first layer")
    codes, dim = tensors["params/quantizer/codebook"].shape
    return {
        "autoencoder": {
            "channels": out(first),
            "multipliers": tuple(width // out(first) for width in widths),
            "blocks": blocks,
            "decoder_blocks": blocks,
            "middle_blocks": blocks,
            "latent": dim,
        },
        "quantizer": {"codes": codes, "dim": dim},
    }


def vqgan_table(model: nnx.Module) -> Table:
    """The name of each variable of a VQGAN with the layers of MaskGIT's, without its discriminator."""
    names = [name for name in named(model) if not name.startswith("discriminator.")]
    place = {part: _numbered(names, part) for part in ("encoder", "decoder")}

    ups = sum(name.endswith("resample.conv.w") for name in names)

    def theirs(name: str) -> str:
        _, part, *words, kind = name.split(".")
        if part == "quantizer":
            return "params/quantizer/codebook"
        *block, layer = words
        if layer in INSIDE:
            where = f"ResBlock_{place[part].index(block)}/{INSIDE[layer]}"
        elif layer == "norm":
            where = "GroupNorm_0"
        elif layer == "conv":  # after nearest-neighbour doubling
            where = f"Conv_{int(block[1]) + 1}"
        else:
            where = f"Conv_{0 if layer == 'stem' else 1 if part == 'encoder' else ups + 1}"
        end = {"w": "scale" if "norm" in layer else "kernel", "b": "bias"}[kind]
        return f"params/{part}/{where}/{end}"

    return {name: source(theirs(name)) for name in names}


def _numbered(names: Sequence[str], part: str) -> list[list[str]]:
    """The words before the layers of each residual block of encoder or decoder, in the order of execution."""
    inside = [name.split(".")[2:-1] for name in names if name.startswith(f"autoencoder.{part}.")]
    blocks = {tuple(words[:-1]) for words in inside if words[-1] in INSIDE}
    number = lambda word: int(word) if word.isdigit() else word
    levels_last = lambda words: (words[0] == "levels") == (part == "decoder")
    return [list(words) for words in sorted(blocks, key=lambda w: (levels_last(w), [number(word) for word in w]))]


def discriminator_table(blocks: int) -> Table:
    """Names for a `codecs.discriminator.StyleDiscriminator` of so many blocks."""
    names = {"stem": "Conv_0", "conv": "Conv_1", "hidden": "Dense_0", "out": "Dense_1"}
    inside = {"conv1": "Conv_0", "conv2": "Conv_2"}
    for n in range(blocks):
        names |= {f"blocks.{n}.{ours}": f"ResBlock_{n}/{theirs}" for ours, theirs in inside.items()}
    named = layers({ours: f"params/{theirs}" for ours, theirs in names.items()}, ends=DENSE, between="/")
    shortcuts = {f"blocks.{n}.shortcut.w": source(f"params/ResBlock_{n}/Conv_1/kernel") for n in range(blocks)}
    return named | shortcuts


def discriminator_widths(tensors: Tensors) -> tuple[int, ...]:
    """Channels at each resolution of a discriminator, that of the images first. Errors: ValueError where names are
    missing."""
    require(tensors, JUDGE, "no discriminator of MaskGIT")
    count = _count(tensors, "params/ResBlock_")
    blocks = [f"params/ResBlock_{n}/Conv_2/kernel" for n in range(count)]
    return tuple(tensors[name].shape[-1] for name in ("params/Conv_0/kernel", *blocks))
