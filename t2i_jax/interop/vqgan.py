"""Names of published convolutional codecs: LlamaGen's, CLIP-GEN's, taming-transformers', which others share, VAR's, and
those of diffusers, whose older files call the matrices of attention otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from flax import nnx

from t2i_jax.core.params import Named, named
from t2i_jax.interop.names import CONV, POINTWISE, Fields, Source, Table, Tensors, renamed, require, source

Style = Literal["llamagen", "taming", "var", "clipgen", "diffusers", "diffusers_2022"]

# Buffers, training losses, and other parts that published files hold besides the codec.
IGNORED = r"^loss\.|^discriminator\.|codebook_used$|num_batches_tracked$|quantize\.embedding_avg$|ema_vocab_hit_SV$"

# From our dotted names to theirs, in this order. LEVEL is the number of a level in their order.
COMMON = (
    (r"^autoencoder\.", ""),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^quantizer\.sizes$", "quantize.cluster_size"),
    (r"^quantizer\.project\.", "quantize.proj."),
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.out\.", r"\1.conv_out."),
    (r"^(encoder\.levels\.\d+)\.resample\.", r"\1.downsample."),
    (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(attention(?:\.\d+)?)\.out\.", r"\1.proj_out."),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"\.attention\.(\d+)\.", r".attn.\1."),
)
DIFFUSERS = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.middle\.block1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.", ".mid_block.attentions.0."),
    (r"\.levels\.(\d+)\.blocks\.", r".levels.\1.resnets."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
)
TAMING = (
    (r"\.middle\.block(\d)\.", r".mid.block_\1."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.levels\.(\d+)\.blocks\.", r".levels.\1.block."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
)
STYLES: dict[str, tuple[tuple[str, str], ...]] = {
    "llamagen": (
        (r"\.middle\.block1\.", ".mid.0."),
        (r"\.middle\.attention\.", ".mid.1."),
        (r"\.middle\.block2\.", ".mid.2."),
        (r"\.levels\.(\d+)\.blocks\.", r".levels.\1.res."),
        (r"\.levels\.(\d+)\.", r".conv_blocks.\1."),
    ),
    "taming": TAMING,
    "var": (
        *TAMING,
        (r"^quantizer\.codebook\.codebook$", "quantize.embedding.weight"),
        (r"^quantizer\.convolutions\.", "quantize.quant_resi.qresi_ls."),
    ),
    "diffusers": (
        *DIFFUSERS,
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ),
    "diffusers_2022": (
        *DIFFUSERS,
        (r"(attentions\.\d+)\.q\.", r"\1.query."),
        (r"(attentions\.\d+)\.k\.", r"\1.key."),
        (r"(attentions\.\d+)\.v\.", r"\1.value."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.proj_attn."),
    ),
}

# CLIP-GEN numbers all layers of an encoder or decoder in one sequence, so only names within a layer are here.
CLIPGEN = (
    (r"^autoencoder\.", ""),
    (r"^to_code\.", "encoder.final.3."),
    (r"^from_code\.", "decoder.quant_conv_in."),
    (r"^quantizer\.codebook$", "quantizer.embedding.weight"),
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.norm\.", r"\1.final.0."),
    (r"^(encoder|decoder)\.out\.", r"\1.final.2."),
    (r"\.middle\.block1\.", ".mid.0."),
    (r"\.middle\.attention\.", ".mid.1."),
    (r"\.middle\.block2\.", ".mid.2."),
    (r"\.norm1\.", ".block.0."),
    (r"\.conv1\.", ".block.2."),
    (r"\.norm2\.", ".block.3."),
    (r"\.conv2\.", ".block.6."),
    (r"\.[qkv]\.([wb])$", r".attn.in_proj_\1"),
    (r"(\.(?:mid|down|up)\.\d+)\.out\.", r"\1.attn.out_proj."),
    (r"(?<=[._])w$", "weight"),
    (r"(?<=[._])b$", "bias"),
)
JUDGES = {"taming": ("loss.discriminator.main.", ""), "clipgen": ("discriminator.features.", "discriminator.head.")}
"""Prefixes of the discriminator: of its layers, and of the last one where it has its own."""


def table(model: nnx.Module, style: Style) -> Table:
    """The published name and layout of each variable of a VQGAN or KL autoencoder."""
    names = {k: v for k, v in named(model).items() if not k.startswith("discriminator.")}
    lines = _clipgen(names) if style == "clipgen" else _nested(names, style)
    judge = {k: v for k, v in named(model).items() if k not in names}
    return {**lines, **_judge(judge, *JUDGES[style])} if judge and style in JUDGES else lines


def discriminator(model: nnx.Module) -> Table:
    """The same of a PatchGAN with BatchNorm, in a file of taming-transformers that holds it alone."""
    return _judge(named(model), "main.")


class AutoencoderShapes(NamedTuple):
    """The names by which a style of files shows the sizes of an autoencoder."""

    down: str
    up: str
    block: str
    attention: str
    width: str
    middle: str
    """the norm of the attention in the encoder's middle"""
    finest_first: bool = False
    """the levels of the decoder are counted from the finest, the last to run"""


IN_DIFFUSERS = AutoencoderShapes(
    "encoder.down_blocks",
    "decoder.up_blocks",
    "resnets",
    "attentions",
    "conv1",
    "encoder.mid_block.attentions.0.group_norm",
)
IN_TAMING = AutoencoderShapes("encoder.down", "decoder.up", "block", "attn", "conv1", "encoder.mid.attn_1.norm", True)
SHAPES: dict[Style, AutoencoderShapes] = {
    "taming": IN_TAMING,
    "var": IN_TAMING,
    "llamagen": AutoencoderShapes(
        "encoder.conv_blocks", "decoder.conv_blocks", "res", "attn", "conv1", "encoder.mid.1.norm"
    ),
    "clipgen": AutoencoderShapes("encoder.down", "decoder.up", "block", "attn", "block.2", "encoder.mid.1.norm"),
    "diffusers": IN_DIFFUSERS,
    "diffusers_2022": IN_DIFFUSERS,
}


def needed(style: Style) -> tuple[str, ...]:
    """Names that every file of a style has."""
    down, _, block, _, width, *_ = SHAPES[style]
    first = f"{down}.0.{width}.weight" if style == "clipgen" else f"{down}.0.{block}.0.{width}.weight"
    return "encoder.conv_in.weight", "decoder.conv_in.weight", first


def autoencoder(tensors: Tensors, style: Style) -> Fields:
    """Sizes of encoder and decoder from the shapes of `tensors` (arrays or abstract), as fields of `AutoencoderConfig`.

    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, needed(style), f"no autoencoder in the names of {style}")
    tensors = dict(_unrolled(tensors)) if style == "clipgen" else tensors
    down, up, block, attention, width, middle, finest_first = SHAPES[style]
    shape = lambda name: tuple(tensors[name].shape)
    has = lambda prefix: any(name.startswith(prefix + ".") for name in tensors)
    count = lambda prefix: next(n for n in range(len(tensors) + 1) if not has(f"{prefix}.{n}"))
    levels, channels = count(down), shape("encoder.conv_in.weight")[0]
    widths = [shape(f"{down}.{n}.{block}.0.{width}.weight")[0] for n in range(levels)]
    if any(w % channels for w in widths):
        raise ValueError(
            f"widths {widths} of the levels are no multiples of the {channels} channels of the first layer"
        )
    attends = lambda part: tuple(n for n in range(levels) if has(f"{part}.{n}.{attention}"))
    from_coarsest = lambda found: found if finest_first else tuple(sorted(levels - 1 - n for n in found))
    return {
        "channels": channels,
        "multipliers": tuple(w // channels for w in widths),
        "blocks": count(f"{down}.0.{block}"),
        "decoder_blocks": count(f"{up}.0.{block}"),
        "latent": shape("decoder.conv_in.weight")[1],
        "attention": attends(down),
        "decoder_attention": from_coarsest(attends(up)),
        "middle_attention": has(middle),
    }


def describe(tensors: Tensors, style: Style) -> Fields:
    """From the shapes of `tensors` (arrays or abstract): fields of autoencoder, quantiser and discriminator.

    Errors: ValueError where a name that every such file has is not there.
    """
    found: Fields = {"autoencoder": autoencoder(tensors, style)}
    shape = lambda name: tuple(tensors[name].shape)
    books = [n for n in tensors if re.fullmatch(r"quantizer?\.(embedding|embed)(\.weight)?", n)]
    if len(books) != 1:
        raise ValueError(f"no codebook (quantize.embedding.weight) among {len(tensors)} names: this is no VQGAN")
    found["quantizer"] = dict(zip(("codes", "dim"), shape(books[0]), strict=True))
    if "quantize.cluster_size" in tensors:  # VQ-Diffusion's codec of ITHQ, whose codebook is a moving average
        found["quantizer"] |= {"decay": 0.99}
    layers, head = JUDGES.get(style, ("", ""))
    kernels = [n for n in tensors if layers and n.startswith((layers, head or layers)) and len(shape(n)) == 4]
    if kernels:  # the configuration counts neither the first nor the last
        found["discriminator"] = {"width": shape(f"{layers}0.weight")[0], "layers": len(kernels) - 2}
    return found


def _nested(names: Named, style: Style) -> Table:
    """Names that contain level, block and layer."""
    last = max(int(n.split(".levels.")[1].split(".")[0]) for n in names if ".decoder.levels." in n)
    gumbel, averaged = (any(n.endswith(f"quantizer.{part}") for n in names) for part in ("project.w", "sizes"))

    def theirs(name: str) -> str:
        name = renamed(name, COMMON + STYLES[style])
        if SHAPES[style].finest_first:
            name = re.sub(r"(?<=^decoder\.up\.)\d+", lambda n: str(last - int(n[0])), name)
        name = name.replace("quantize.embedding.", "quantize.embed.") if gumbel else name
        return name.replace("quantize.embedding.weight", "quantize.embedding") if averaged else name

    lines = {name: _line(theirs(name), v) for name, v in names.items()}
    return {**lines, **_fused(lines, names)} if style == "var" else lines


def _fused(lines: Table, names: Named) -> Table:
    """The lines of attention whose queries, keys and values are one tensor."""
    found = {}
    for name, line in lines.items():
        if place := re.fullmatch(r"(.*\.attn(?:_1|\.\d+)\.)([qkv])(\.\w+)", line.names[0]):
            f = names[name].shape[-1]
            rows = np.arange(f) + f * "qkv".index(place[2])
            found[name] = source(f"{place[1]}qkv{place[3]}", layout=line.layout, rows=rows, height=3 * f)
    return found


def _clipgen(names: Named) -> Table:
    """Names of layers that are counted through, with torch's attention of one head."""
    parts = {"encoder": "down", "decoder": "up"}
    place: dict[tuple[str, ...], int] = {}
    for part in parts:  # block, attention, block, attention, ..., resampling; and on with the next level
        inside = [n.split(".") for n in names if f".{part}.levels." in n]
        layers = {(w[3], w[5] if w[4] != "resample" else "999", w[4]) for w in inside}
        order = sorted(layers, key=lambda w: (int(w[0]), int(w[1]), w[2] == "attention"))
        place |= {(part, *layer): n for n, layer in enumerate(order)}

    def line(name: str, variable: nnx.Variable) -> Source:
        words = name.split(".")
        if words[2:3] == ["levels"]:
            part, level, kind = words[1], words[3], words[4]
            number = words[5] if kind != "resample" else "999"
            rest = words[5:] if kind == "resample" else words[6:]
            words = ["autoencoder", part, parts[part], str(place[part, level, number, kind]), *rest]
        theirs = renamed(".".join(words), CLIPGEN)
        if theirs.endswith(("in_proj_weight", "in_proj_bias")):
            f = variable.shape[-1]
            rows = np.arange(f) + f * "qkv".index(words[-2])
            return source(theirs, layout="f c -> 1 1 c f" if variable.ndim == 4 else "", rows=rows, height=3 * f)
        if theirs.endswith("attn.out_proj.weight"):
            return source(theirs, layout="f c -> 1 1 c f")
        return _line(theirs, variable)

    return {name: line(name, variable) for name, variable in names.items()}


def _unrolled(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """CLIP-GEN's names with the running number of a layer split into level and number in it, to read sizes from."""
    layers: dict[str, dict[int, str]] = {"encoder.down": {}, "decoder.up": {}}
    for name in tensors:
        if found := re.match(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|conv)\.", name):
            layers[found[1]][int(found[2])] = found[3]
    renamed = {}
    for part, kinds in layers.items():
        level = block = attention = 0
        for n in sorted(kinds):
            if kinds[n] == "conv":
                renamed[f"{part}.{n}"] = f"{part}.{level}.conv"
                level, block, attention = level + 1, 0, 0
            elif kinds[n] == "block":
                renamed[f"{part}.{n}"], block = f"{part}.{level}.block.{block}", block + 1
            else:
                renamed[f"{part}.{n}"], attention = f"{part}.{level}.attn.{attention}", attention + 1
    for name, tensor in tensors.items():
        head = ".".join(name.split(".")[:3])
        yield renamed.get(head, head) + name[len(head) :], tensor


def _judge(names: Named, prefix: str, head: str = "") -> Table:
    """The layers of a PatchGAN: a convolution; convolution, BatchNorm, activation, and so on; a convolution."""
    layers = len({n for n in names if re.search(r"(^|\.)convs\.\d+\.w$", n)})

    def theirs(name: str) -> str:
        *_, kind, last = [w for w in name.split(".") if not w.isdigit()]
        number = next((int(w) for w in name.split(".") if w.isdigit()), 0)
        place = {"stem": 0, "convs": 3 * number + 2, "norms": 3 * number + 3, "out": 3 * layers + 2}[kind]
        where = head if head and kind == "out" else f"{prefix}{place}."
        return where + {"w": "weight", "b": "bias", "mean": "running_mean", "var": "running_var"}[last]

    return {name: _line(theirs(name), v) for name, v in names.items()}


def _line(name: str, variable: nnx.Variable) -> Source:
    if name.endswith("quantize.proj.weight"):
        return source(name, layout=POINTWISE)
    if re.search(r"attentions\.\d+\.(?!group_norm).*weight$", name):  # a matrix with them, a 1x1 convolution with us
        return source(name, layout="f c -> 1 1 c f")
    return source(name, layout=CONV if variable.ndim == 4 else "")
