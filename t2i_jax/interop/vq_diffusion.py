"""Names of VQ-Diffusion's models (Gu et al. 2022; Tang et al. 2022), their configuration, and their codec.

A released file holds `ema`, the denoiser's tensors alone, and `model`, with the prefix `transformer.`, and the codec as
`content_codec.`; both hold CLIP's text tower as `condition_emb.`, which is CLIP's own file.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from t2i_jax.interop.names import CONV, LINEAR, Fields, Source, Table, Tensors, require, source
from t2i_jax.networks.condition import ClassEmbedder, CrossAttnFeatures
from t2i_jax.nn.positions import AxialPositions
from t2i_jax.noise.discrete import Chain

PART = "transformer."
NEEDED = ("transformer.content_emb.emb.weight", "transformer.to_logits.1.weight")
"""Names that every such file has."""
CODEC_NEEDED = ("content_codec.enc.encoder.conv_in.weight", "content_codec.dec.decoder.conv_in.weight")
"""Names of the codec in a file with a whole model."""
UNUSED = r"^condition_emb\.|^log_|attn2\.mask$|^zero_vector$"
BLOCK = "transformer.blocks.{}."
NULL_CLASS = 1001
"""Classes of the released file with a learned null class; the other has 1000."""


def describe(
    tensors: Tensors,
    *,
    grid: tuple[int, int] | None = None,
    heads: int = 16,
    steps: int = 0,
    length: int = 77,
    activation: str = "GELU2",
    class_type: str = "adalayernorm",
    null_class: bool | None = None,
) -> Fields:
    """The fields of the family's configuration that the shapes of `tensors` (arrays or abstract) belong to.

    grid: rows and columns of codes, square unless given: 16 x 16, or as many as a stored attention mask has. heads: 16
    in all released files. steps: T where neither a table of times nor a schedule has it. length: vectors of a caption.
    activation, class_type: by their published names. null_class: the last class is the unconditional one; unless given,
    it is so in the file of 1001 classes, and the others take the mean of all.
    """
    require(tensors, NEEDED, "no VQ-Diffusion model")
    if "transformer.content_emb.height_emb.weight" not in tensors:
        raise ValueError("no transformer.content_emb.height_emb.weight: of pos_emb_type only 'embedding' was released")
    first = BLOCK.format(0)
    shape = lambda name: tuple(tensors[name].shape)
    classes, width = shape("transformer.content_emb.emb.weight")
    if activation not in ("GELU", "GELU2"):
        raise ValueError(f"activation {activation!r}: VQ-Diffusion has 'GELU' and 'GELU2'")
    if class_type not in ("adalayernorm", "adainsnorm"):
        raise ValueError(f"class_type {class_type!r}: classes have a table, with 'adalayernorm' or 'adainsnorm'")
    if grid is None:
        mask = f"{first}attn2.mask"
        side = math.isqrt(shape(mask)[-1]) if mask in tensors else 16
        grid = (side, side)
    learned = f"{first}ln1.emb.weight" in tensors
    if learned:
        steps = shape(f"{first}ln1.emb.weight")[0]
    else:
        steps = steps or (shape("log_at")[0] if "log_at" in tensors else 100)
    conv = f"{first}mlp.conv1.weight" in tensors
    rows = lambda side: shape(f"transformer.content_emb.{side}_emb.weight")[0]
    fields: Fields = {
        "chain": Chain(classes - 1, steps),
        "grid": grid,
        "width": width,
        "depth": 1 + max(int(m[1]) for k in tensors if (m := re.match(r"transformer\.blocks\.(\d+)\.", k))),
        "heads": heads,
        "mlp": shape(f"{first}mlp.conv1.weight" if conv else f"{first}mlp.0.weight")[0],
        "activation": "quick_gelu" if activation == "GELU2" else "gelu",
        "conv_mlp": conv,
        "times": "learned" if learned else "sinusoidal",
        "positions": AxialPositions((rows("height"), rows("width"))),
        "importance": "Lt_history" in tensors,
    }
    if f"{first}attn2.key.weight" in tensors:
        null = "empty_text_embed" in tensors
        length = shape("empty_text_embed")[0] if null else length
        condition = CrossAttnFeatures(shape(f"{first}attn2.key.weight")[1], length, trained_null=null)
        return fields | {"condition": condition, "condition_dropout": 0.1 if null else 0.0}
    if f"{first}ln2.linear.weight" not in tensors:
        return fields | {"condition": ClassEmbedder(0), "condition_dropout": 0.0, "aux_loss_weight": 1e-3}
    count = shape(f"{first}ln2.emb.weight")[0]
    null = count == NULL_CLASS if null_class is None else null_class
    return fields | {
        "condition": ClassEmbedder(count - null),
        "mean_null": not null,
        "class_norm": "layer" if class_type == "adalayernorm" else "instance",
        "condition_dropout": 0.1 if null else 0.0,
        "aux_loss_weight": 1e-3,
    }


def table(config: Any) -> Table:
    """VQ-Diffusion's names for a `models.vq_diffusion.VQDiffusion` that `describe` gave."""
    norm = lambda ours, theirs: {f"{ours}.w": source(f"{theirs}.weight"), f"{ours}.b": source(f"{theirs}.bias")}

    def linear(ours: str, theirs: str) -> Table:
        return {f"{ours}.w": source(f"{theirs}.weight", layout=LINEAR), f"{ours}.b": source(f"{theirs}.bias")}

    def several(ours: str, *theirs: str) -> Table:
        """Linears of theirs as one of ours, head by head."""
        sizes = {"h": config.transformer.head_size}
        weights, biases = ([f"{name}.{kind}" for name in theirs] for kind in ("weight", "bias"))
        return {
            f"{ours}.w": source(*weights, layout="a (n h) d -> d (n a h)", **sizes),
            f"{ours}.b": source(*biases, layout="a (n h) -> (n a h)", **sizes),
        }

    def timed(ours: str, theirs: str, learned: bool) -> Table:
        lines = linear(f"{ours}.out", f"{theirs}.linear")
        return {**lines, f"{ours}.table.w": source(f"{theirs}.emb.weight")} if learned else lines

    crossed = config.block.context > 0
    mine = f"{BLOCK}attn1" if crossed else f"{BLOCK}attn"
    lines: dict[str, Source] = {"tokens.w": source("transformer.content_emb.emb.weight")}
    for ours, theirs in {"rows": "height", "columns": "width"}.items():
        lines[ours] = source(f"transformer.content_emb.{theirs}_emb.weight")
    lines |= timed("blocks.attention_norm", f"{BLOCK}ln1", config.times == "learned")
    lines |= several("blocks.attention.qkv", *(f"{mine}.{name}" for name in ("query", "key", "value")))
    lines |= linear("blocks.attention.out", f"{mine}.proj")
    if crossed:
        lines |= timed("blocks.cross_norm", f"{BLOCK}ln1_1", config.times == "learned")
        lines |= linear("blocks.cross.q", f"{BLOCK}attn2.query")
        lines |= several("blocks.cross.kv", f"{BLOCK}attn2.key", f"{BLOCK}attn2.value")
        lines |= linear("blocks.cross.out", f"{BLOCK}attn2.proj")
    lines |= timed("blocks.mlp_norm", f"{BLOCK}ln2", True) if config.rows else norm("blocks.mlp_norm", f"{BLOCK}ln2")
    for ours, conv, fc in (("into", "conv1", "0"), ("out", "conv2", "2")):
        if config.conv_mlp:
            lines[f"blocks.mlp.{ours}.w"] = source(f"{BLOCK}mlp.{conv}.weight", layout=CONV)
            lines[f"blocks.mlp.{ours}.b"] = source(f"{BLOCK}mlp.{conv}.bias")
        else:
            lines |= linear(f"blocks.mlp.{ours}", f"{BLOCK}mlp.{fc}")
    lines |= norm("norm", "transformer.to_logits.0")
    lines |= linear("output", "transformer.to_logits.1")
    if isinstance(condition := config.conditioning.what, CrossAttnFeatures) and condition.trained_null:
        lines["condition.null"] = source("empty_text_embed")
    if config.importance:
        lines |= {"history": source("Lt_history"), "count": source("Lt_count")}
    return lines


def buffers(config: Any) -> dict[str, np.ndarray]:
    """Buffers of the published program: logs of its schedule, an unused mask, and, where the model has none, an empty
    history of losses."""
    chain = config.chain
    s = chain.schedule
    with np.errstate(divide="ignore"):
        found = {f"log_{x}t": np.log(y) for x, y in zip("abc", (s.a, s.b, s.c), strict=True)}
        far = (s.alpha_bar, s.beta_bar, s.gamma_bar)
        found |= {f"log_cumprod_{x}t": np.log(y) for x, y in zip("abc", far, strict=True)}
        found |= {"log_1_min_ct": np.log1p(-s.c), "log_1_min_cumprod_ct": np.log1p(-s.gamma_bar)}
    found |= {} if config.importance else {name: np.zeros(chain.steps) for name in ("Lt_history", "Lt_count")}
    if config.block.context:
        seen = np.tril(np.ones((1, 1, config.length, config.length)))
        found |= {f"{BLOCK.format(n)}attn2.mask": seen for n in range(config.transformer.depth)}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def used_codes(full_to_used: np.ndarray) -> np.ndarray:
    """Which code of the codec each code of the model is: int (used,), from the file that maps every code of the codec
    (8192, say) to one of those the model knows (2887): the first that maps there, as the authors have it.

    Errors: ValueError where some used code has no code of the codec.
    """
    full_to_used = np.asarray(full_to_used).reshape(-1).astype(np.int64)
    used, first = np.unique(full_to_used, return_index=True)
    first, used = first[used >= 0], used[used >= 0]
    if not np.array_equal(used, np.arange(len(used))):
        missing = sorted(set(range(int(used.max()) + 1)) - set(used.tolist()))
        raise ValueError(f"the map of used codes leaves out {len(missing)} of them, {missing[:5]} for example")
    return first


def codec_tensors(tensors: Tensors, full_to_used: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The codec inside a released file (its `model`), or taming-transformers' own file, under the names of that, and
    with the codebook of the used codes alone, so that the model's codes are decoded without a map.

    Encoding with it gives each vector the nearest USED code, where the authors map an unused nearest one.
    """
    inside = re.compile(r"^content_codec\.(?:enc|dec)\.")
    mine = {inside.sub("", k): v for k, v in tensors.items() if inside.match(k)} or dict(tensors)
    if full_to_used is None:
        return mine
    rows = used_codes(full_to_used)
    books = r"quantize\.(embedding|embedding\.weight|embed\.weight|cluster_size|proj\.weight|proj\.bias)"
    return {k: np.asarray(v)[rows] if re.fullmatch(books, k) else v for k, v in mine.items()}
