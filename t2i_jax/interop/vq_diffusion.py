"""Names of VQ-Diffusion's models (Gu et al. 2022; Tang et al. 2022), their configuration, and their codec.

A released file holds `ema`, the denoiser's tensors alone, and `model`, with the prefix `transformer.`, and the codec as
`content_codec.`; both hold CLIP's text tower as `condition_emb.`, which is CLIP's own file.
"""

from __future__ import annotations

import math
import re

import numpy as np

from t2i_jax.core.conditions import Condition
from t2i_jax.interop.names import CONV, LINEAR, Fields, Table, Tensors, by_head, layers, require, source
from t2i_jax.networks.condition import ClassEmbedder, CrossAttnFeatures
from t2i_jax.nn.positions import AxialPositions
from t2i_jax.nn.transformer import Transformer
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
    scheduled = shape("log_at")[0] if "log_at" in tensors else 100
    steps = shape(f"{first}ln1.emb.weight")[0] if learned else steps or scheduled
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


def table(
    transformer: Transformer,
    condition: Condition,
    *,
    learned_times: bool,
    class_norm: bool,
    conv_mlp: bool,
    importance: bool,
) -> Table:
    """VQ-Diffusion's names for a `models.vq_diffusion.VQDiffusion` that `describe` gave.

    class_norm: a table of classes before the MLP; importance: the history of losses by which times are sampled.
    """
    crossed = condition.spec.classes is None  # else a class enters by the norms
    mine, h = f"{BLOCK}attn1." if crossed else f"{BLOCK}attn.", transformer.head_size
    linears = {"blocks.attention.out": f"{mine}proj", "output": "transformer.to_logits.1"}
    norms, timed = {"norm": "transformer.to_logits.0"}, {"blocks.attention_norm": f"{BLOCK}ln1"}
    lines = {
        "tokens.w": source("transformer.content_emb.emb.weight"),
        "rows": source("transformer.content_emb.height_emb.weight"),
        "columns": source("transformer.content_emb.width_emb.weight"),
        **by_head("blocks.attention.qkv", [mine + name for name in ("query.", "key.", "value.")], h=h),
    }
    if crossed:
        timed |= {"blocks.cross_norm": f"{BLOCK}ln1_1"}
        linears |= {"blocks.cross.q": f"{BLOCK}attn2.query", "blocks.cross.out": f"{BLOCK}attn2.proj"}
        lines |= by_head("blocks.cross.kv", [f"{BLOCK}attn2.key.", f"{BLOCK}attn2.value."], h=h)
    tables = timed if learned_times else {}
    if class_norm:
        timed, tables = (one | {"blocks.mlp_norm": f"{BLOCK}ln2"} for one in (timed, tables))
    else:
        norms |= {"blocks.mlp_norm": f"{BLOCK}ln2"}
    into, out, layout = ("conv1", "conv2", CONV) if conv_mlp else ("0", "2", LINEAR)
    lines |= layers({"blocks.mlp.into": f"{BLOCK}mlp.{into}", "blocks.mlp.out": f"{BLOCK}mlp.{out}"}, layout)
    linears |= {f"{ours}.out": f"{theirs}.linear" for ours, theirs in timed.items()}
    lines |= {f"{ours}.table.w": source(f"{theirs}.emb.weight") for ours, theirs in tables.items()}
    if isinstance(condition, CrossAttnFeatures) and condition.trained_null:
        lines["condition.null"] = source("empty_text_embed")
    lines |= {"history": source("Lt_history"), "count": source("Lt_count")} if importance else {}
    return lines | layers(linears, LINEAR) | layers(norms)


def buffers(chain: Chain, depth: int, importance: bool, context: int) -> dict[str, np.ndarray]:
    """Buffers of the published program: logs of its schedule, an unused mask of `context` vectors, and, where the model
    has none, an empty history of losses."""
    s = chain.schedule
    near, far = {"a": s.a, "b": s.b, "c": s.c}, {"a": s.alpha_bar, "b": s.beta_bar, "c": s.gamma_bar}
    with np.errstate(divide="ignore"):
        found = {
            **{f"log_{x}t": np.log(y) for x, y in near.items()},
            **{f"log_cumprod_{x}t": np.log(y) for x, y in far.items()},
            "log_1_min_ct": np.log1p(-s.c),
            "log_1_min_cumprod_ct": np.log1p(-s.gamma_bar),
        }
    found |= {} if importance else {name: np.zeros(chain.steps) for name in ("Lt_history", "Lt_count")}
    if context:
        found |= {f"{BLOCK.format(n)}attn2.mask": np.tril(np.ones((1, 1, context, context))) for n in range(depth)}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def used_codes(full_to_used: np.ndarray) -> np.ndarray:
    """Which code of the codec each code of the model is: int (used,), from the file that maps every code of the codec
    (8192, say) to one of those that the model has (2887): the first that maps there, as the authors have it.

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
