"""Names of guided-diffusion's UNets and classifiers (Dhariwal & Nichol 2021) and of GLIDE's UNets, and their shapes."""

from __future__ import annotations

import re
from collections.abc import Callable

from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import CONV, LINEAR, Fields, Source, Table, Tensors, require, source

NEEDED = ("input_blocks.0.0.weight", "time_embed.0.weight", "input_blocks.1.0.in_layers.2.weight")
"""Names that every such file has."""
SIDES = {4: 64, 5: 128, 6: 256, 7: 512}
"""Pixels of a released model with so many levels."""

BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
    "halved": "op",
    "doubled.conv": "conv",
}
WHOLE = {
    "time.into": "time_embed.0",
    "time.out": "time_embed.2",
    "noise.into": "aug_proj.0",
    "noise.out": "aug_proj.2",
    "stem": "input_blocks.0.0",
    "norm": "out.0",
    "out": "out.2",
    "pool": "transformer_proj",
}
ATTENTION = {
    "norm": "norm",
    "qkv": "qkv",
    "context_norm": "norm_encoder",
    "context": "encoder_kv",
    "out": "proj_out",
}
TEXT = {
    "table": "token_embedding",
    "norm": "final_ln",
    "blocks.attention.qkv": "transformer.resblocks.{}.attn.c_qkv",
    "blocks.attention.out": "transformer.resblocks.{}.attn.c_proj",
    "blocks.attention_norm": "transformer.resblocks.{}.ln_1",
    "blocks.mlp.into": "transformer.resblocks.{}.mlp.c_fc",
    "blocks.mlp.out": "transformer.resblocks.{}.mlp.c_proj",
    "blocks.mlp_norm": "transformer.resblocks.{}.ln_2",
}
POOLS = {
    "adaptive": {"head.norm": "out.0", "head.out": "out.3"},
    "attention": {
        "head.norm": "out.0",
        "head.position": "out.2.positional_embedding",
        "head.qkv": "out.2.qkv_proj",
        "head.out": "out.2.c_proj",
    },
    "spatial": {"head.into": "out.0", "head.out": "out.2"},
    "spatial_v2": {"head.into": "out.0", "head.norm": "out.1", "head.out": "out.3"},
}
POOL_PARTS = {
    "adaptive": {"norm"},
    "attention": {"norm", "position"},
    "spatial": {"into"},
    "spatial_v2": {"into", "norm"},
}
"""Which of these parts the head of a classifier has, by how it pools."""


def describe(tensors: Tensors, blocks: int = 0, channels: int = 3) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network.

    blocks: residual blocks a level, where the shapes allow several numbers. channels: of an image.
    Errors: ValueError where the names are not those of such a model.
    """
    require(tensors, NEEDED, "no UNet of guided-diffusion")
    shape = lambda name: tuple(tensors[name].shape)
    count = 1 + max(int(m[1]) for m in (re.match(r"input_blocks\.(\d+)\.", name) for name in tensors) if m)
    several = () if blocks else _level_blocks(tensors, count)
    blocks = blocks or (several or (_blocks(tensors, count),))[0]
    levels, width = len(several) or count // (blocks + 1), shape("time_embed.0.weight")[1]
    before = [sum(several[:level]) + level if several else level * (blocks + 1) for level in range(levels)]
    first = [f"input_blocks.{n + 1}" for n in before]
    widths = [shape(f"{name}.0.in_layers.2.weight")[0] for name in first]
    ratio = lambda w: w // width if w % width == 0 else w / width
    multipliers = (ratio(shape("input_blocks.0.0.weight")[0]), *(ratio(w) for w in widths[1:]))
    change = f"input_blocks.{blocks + 1}.0"
    kinds = {"block": f"{change}.in_layers.2.weight", "conv": f"{change}.op.weight"}
    extra = shape("input_blocks.0.0.weight")[1] - channels
    known = {0: (), channels: ("low_res",), channels + 1: ("inpaint",), 2 * channels + 1: ("inpaint", "low_res")}
    if extra not in known:
        raise ValueError(f"input_blocks.0.0.weight reads {channels + extra} channels where an image has {channels}")
    return {
        "size": (SIDES.get(levels, 64),) * 2,
        "channels": channels,
        "width": width,
        "multipliers": multipliers,
        "blocks": blocks,
        **({"level_blocks": several} if several else {}),
        "attention": tuple(2**n for n, name in enumerate(first) if f"{name}.1.norm.weight" in tensors),
        "middle_attention": "middle_block.1.in_layers.2.weight" not in tensors,
        "only_context": _only_context(tensors, first),
        "scale_shift": shape(f"{first[0]}.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resample": next((k for k, name in kinds.items() if name in tensors), "mean") if levels > 1 else "block",
        "extra_inputs": known[extra],
        "learn_variance": "out.2.weight" in tensors and shape("out.2.weight")[0] == 2 * channels,
    }


def _only_context(tensors: Tensors, first: list[str]) -> tuple[int, ...]:
    """Downsampling factors of attention that gives queries alone; first: the first stage of each level.

    Errors: ValueError where the middle differs from the lowest level.
    """
    several = [tensors.get(f"{name}.1.qkv.weight") for name in (*first, "middle_block")]
    alone = [None if x is None else x.shape[0] == x.shape[1] for x in several]
    if None not in alone[-2:] and alone[-1] != alone[-2]:
        raise ValueError("middle_block.1.qkv.weight: positions read each other there or in the last level, not in both")
    return tuple(2**n for n in range(len(first)) if alone[n] or (alone[-1] and n == len(first) - 1))


def _level_blocks(tensors: Tensors, count: int) -> tuple[int, ...]:
    """Residual blocks of each level, where a level of the decoder ends in resampling; () if all levels have as many."""
    ends = _ends(tensors)
    stages = [stop - start for start, stop in zip([-1, *ends], [*ends, count - 1], strict=True)]
    return () if len(set(stages)) == 1 or not ends else tuple(n - 1 for n in reversed(stages))


def _ends(tensors: Tensors) -> list[int]:
    """Stages of the decoder that end in resampling."""
    pattern = r"output_blocks\.(\d+)\.(1\.in_layers|1\.conv|2)\."
    return sorted({int(m[1]) for m in (re.match(pattern, name) for name in tensors) if m})


def _blocks(tensors: Tensors, count: int) -> int:
    """Residual blocks a level: the number that fits the levels' attention, channels and resampling."""
    has = lambda prefix: any(name.startswith(prefix) for name in tensors)
    width = lambda i: tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0]
    plain = lambda i: f"input_blocks.{i}.0.in_layers.2.weight" in tensors
    attends = lambda i: has(f"input_blocks.{i}.1.")

    def alike(i: int, j: int) -> bool:
        return width(i) == width(j) and attends(i) == attends(j)

    def fits(n: int) -> bool:
        levels = [range(start + 1, start + n + 1) for start in range(0, count, n + 1)]
        changes = range(n + 1, count, n + 1)  # there is no attention there, and the channels stay
        if not all(plain(i) and plain(level[0]) and alike(i, level[0]) for level in levels for i in level):
            return False
        if any(attends(i) or has(f"input_blocks.{i}.0.skip_connection.") for i in changes):
            return False
        found = _ends(tensors)
        return not found or found == list(range(n, count - 1, n + 1))

    found = [n for n in range(1, count) if count % (n + 1) == 0 and fits(n)]
    if not found:
        raise ValueError("input_blocks: no number of residual blocks a level makes these; say `blocks`")
    return found[0]


def describe_text(tensors: Tensors) -> Fields:
    """The sizes of GLIDE's caption encoder."""
    length, width = tensors["positional_embedding"].shape
    return {
        "vocabulary": tensors["token_embedding.weight"].shape[0],
        "length": length,
        "width": width,
        "depth": sum(name.endswith(".attn.c_proj.weight") for name in tensors),
        "padding": "padding_embedding" in tensors,
        "final_norm": "final_ln.weight" in tensors,
    }


def describe_pool(tensors: Tensors) -> Fields:
    """How a classifier pools, of how many classes, and for which side of the last features (0: any)."""
    if "out.2.positional_embedding" in tensors:
        side = round((tensors["out.2.positional_embedding"].shape[1] - 1) ** 0.5)
        return {"pool": "attention", "classes": tensors["out.2.c_proj.weight"].shape[0], "side": side}
    for pool, last in {"spatial": "out.2.weight", "spatial_v2": "out.3.weight", "adaptive": "out.3.weight"}.items():
        rank = 4 if pool == "adaptive" else 2
        if last in tensors and len(tensors[last].shape) == rank:
            return {"pool": pool, "classes": tensors[last].shape[0], "side": 0}
    raise ValueError("no pooling that is known among the names out.*: this is no classifier of guided-diffusion")


Attention = Callable[[str, str, nnx.Variable], Source]
"""(published name of an attention and a dot, name of a variable in ours, the variable) -> its line."""


def table(model: nnx.Module, attention: Attention | None = None, condition: Table | None = None) -> Table:
    """The published name and layout of each variable of a UNet, or of a classifier of noised images.

    attention: gives the lines of attentions that are not guided-diffusion's own. condition: lines of the condition,
    under `condition.`, if it is neither a class nor GLIDE's caption.
    """
    variables = {k: v for k, v in named(model).items() if condition is None or not k.startswith("condition.")}
    middle = ("before", "attention", "after") if "attention.norm.w" in variables else ("before", "after")
    attends = {m[1] for m in (re.match(r"up\.(\d+)\.attention\.", name) for name in variables) if m}
    has = {part for part in ("norm", "position", "into") if any(k.startswith(f"head.{part}") for k in variables)}
    pool = next((pool for pool, parts in POOL_PARTS.items() if parts == has), "") if "head.out.w" in variables else ""

    whole = WHOLE | {f"condition.{k}": v for k, v in TEXT.items()} | POOLS.get(pool, {})
    whole |= {} if "condition.position" in variables else {"condition.table": "label_emb"}
    alone = {"condition.position": "positional_embedding", "condition.padding": "padding_embedding"}

    def layer(ours: str) -> str:
        if m := re.match(r"(down|up)\.(\d+)\.(block|attention|resample)\.(.*)", ours):
            way, n, part, rest = m.groups()
            after = {"block": 0, "attention": 1}.get(part, 1 + (n in attends))
            down = f"input_blocks.{int(n) + 1}.{int(part == 'attention')}"
            place = down if way == "down" else f"output_blocks.{n}.{after}"
            return f"{place}.{ATTENTION[rest] if part == 'attention' else BLOCK.get(rest, rest)}"
        if m := re.match(r"(before|after|attention)\.(.*)", ours):
            names = ATTENTION if m[1] == "attention" else BLOCK
            return f"middle_block.{middle.index(m[1])}.{names.get(m[2], m[2])}"
        return whole[ours]

    def theirs(name: str) -> str:
        if name in alone or name == "head.position":
            return (alone | POOLS.get(pool, {}))[name]
        ours, leaf = name.rsplit(".", 1)
        return f"{layer(ours)}.{'weight' if leaf == 'w' else 'bias'}"

    def layout(name: str, variable: nnx.Variable) -> str:
        flat = r"(attention|head)\.(qkv|context|out)\.w$"
        if name == "head.position":
            return "c t -> t c"
        if name.startswith("condition."):
            return LINEAR if re.search(r"blocks\..*\.(qkv|into|out)\.w$", name) else ""
        if variable.ndim == 4:
            return CONV
        if name == "head.out.w" and pool == "adaptive":
            return "f c 1 1 -> c f"
        if re.search(flat, name) and (not name.startswith("head.") or pool == "attention"):
            return "f c 1 -> c f"
        return LINEAR if variable.ndim == 2 else ""

    def line(name: str, variable: nnx.Variable) -> Source:
        m = re.match(r"(?:(?P<way>down|up)\.(?P<n>\d+)\.)?attention\.(?P<rest>.*)", name)
        if attention is None or m is None:
            return source(theirs(name), layout=layout(name, variable))
        place = {"down": lambda n: f"input_blocks.{n + 1}.1.", "up": lambda n: f"output_blocks.{n}.1."}
        return attention(place[m["way"]](int(m["n"])) if m["way"] else "middle_block.1.", m["rest"], variable)

    return {k: line(k, v) for k, v in variables.items()} | dict(condition or {})
