"""Tensors under published names into our models, and back, by one table a format.

A table has a line for each variable of a model: its name in a published file, and the layout of its dimensions there.

    {"blocks.mlp.gate.w": source("layers.{}.feed_forward.w1.weight", layout=LINEAR)}

`{}` counts layers, which are one stacked array here. Several names are joined along a new first dimension, which the
layout then places. A layout is a pattern of einops from theirs to ours; read backwards it leads from ours to theirs.
Where one tensor of theirs holds several variables, or holds rows in another order, a line names its `rows`. An empty
name is that of zeros which the file does not have: keys without a bias, of queries and values with one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from einops import EinopsError, pack, rearrange, unpack
from flax import nnx

from t2i_jax.core.params import named, rebuild

log = logging.getLogger(__name__)

MOST = 20
"""Lines of an error."""
SCALES = re.compile(r"(^|\.)(scaled_fp8|weight_scale|weight_scale_inv|scale_weight|scale_input|input_scale)$")
"""Names of the scales that belong to quantised weights."""
LINEAR = "f d -> d f"
CONV = "f c i j -> i j c f"
POINTWISE = "f c 1 1 -> c f"


class Source(NamedTuple):
    """The name and layout of a variable in a published file."""

    names: tuple[str, ...]
    layout: str
    sizes: dict[str, int]
    rows: np.ndarray | None = None
    """which rows of the tensor this variable is, in the order of ours; None is all of them"""
    height: int = 0
    """rows that the whole tensor has, where `rows` says"""
    parts: tuple[int, ...] = ()
    """rows of each of several matrices that this variable concatenates; else they are a new dimension"""
    axis: int = 0
    """dimension of the tensor that `rows` count"""

    @property
    def places(self) -> tuple[slice | np.ndarray | None, ...]:
        """The index of `rows` in the whole tensor."""
        return (*(slice(None),) * self.axis, self.rows)

    @property
    def stacked(self) -> bool:
        return "{}" in self.names[0]

    def layer(self, n: int) -> tuple[str, ...]:
        return tuple(name.format(n) for name in self.names) if self.stacked else self.names

    def ours(self, tensors: list[np.ndarray]) -> np.ndarray:
        """One layer's tensors, but for those without a name, as one array of ours."""
        if not all(self.names):
            left, zeros = iter(tensors), np.zeros(tensors[0].shape, tensors[0].dtype)
            tensors = [next(left) if name else zeros for name in self.names]
        if self.parts:
            tensors = [pack(tensors, "* d" if tensors[0].ndim > 1 else "*")[0]]
        joined = tensors[0] if len(tensors) == 1 else rearrange(tensors, "a ... -> a ...")
        if self.rows is not None:
            if joined.shape[self.axis] != self.height:
                raise ValueError(f"{joined.shape[self.axis]} rows where {self.height} are wanted")
            joined = joined[self.places]
        return rearrange(joined, self.layout, **self.sizes) if self.layout else joined

    def theirs(self, array: np.ndarray) -> list[np.ndarray]:
        """The tensors that `ours` would make `array` of."""
        if self.layout:
            left, right = self.layout.split("->")
            parts = {left.split()[0]: len(self.names)} if len(self.names) > 1 and not self.parts else {}
            array = rearrange(array, f"{right} -> {left}", **parts, **self.sizes)
        if self.parts:
            array = array if self.rows is None else array[np.argsort(self.rows)]
            return unpack(array, [(n,) for n in self.parts], "* d" if array.ndim > 1 else "*")
        return [array] if len(self.names) == 1 else list(array)


M = TypeVar("M", bound=nnx.Module)
Table = Mapping[str, Source]
Fields = dict[str, Any]
"""Fields of a configuration by name, ours or that of a published JSON file."""
Tensors = Mapping[str, np.ndarray]
"""Arrays, or abstract ones, by name."""

KINDS = (
    (r"lora_|\.lora\.|\.hada_w|\.lokr_w", "a LoRA: changes to a model, without the model"),
    (
        r"^(model\.)?diffusion_model\.|^(first_stage_model|cond_stage_model|conditioner)\.",
        "the single-file kind of checkpoint (CompVis, ComfyUI); the folder of diffusers is wanted",
    ),
    (r"^control(_model|net)", "a ControlNet: an addition to a model, without the model"),
    (r"^(emb_params|string_to_param)", "a textual inversion: an embedding, without the model"),
    (r"(^|\.)exp_avg(_sq)?$|^momentum_buffer$", "the state of an optimiser, without the model"),
)
"""Regular expressions of names in files that are mistaken for models, and the kind of such a file."""


def require(tensors: Tensors, needed: Sequence[str], what: str, file: str = "") -> None:
    """Errors: ValueError where `tensors` lack a name of `needed`, with some of theirs and with what they are: `what`,
    such as "no model of DiT", unless they are of KINDS."""
    missing = [name for name in needed if name not in tensors]
    if not missing:
        return
    some = ", ".join(list(tensors)[:3]) + ", ..." * (len(tensors) > 3)
    kinds = [kind for pattern, kind in KINDS if any(re.search(pattern, name) for name in tensors)]
    among = f"no {' nor '.join(missing[:3])} among {len(tensors)} names ({some})"
    raise ValueError(f"{file and f'{file}: '}this is {[*kinds, what][0]}: {among}")


def source(
    *names: str,
    layout: str = "",
    rows: np.ndarray | None = None,
    height: int = 0,
    parts: tuple[int, ...] = (),
    axis: int = 0,
    **sizes: int,
) -> Source:
    """A line of a table: their name or names, the einops pattern to ours, and sizes that the pattern needs.

    rows, height: the rows that the variable is of a tensor with `height` rows. All variables of a tensor together make
    it whole again. parts: rows of several matrices that our variable concatenates. axis: the dimension of the tensor
    that its rows are.
    """
    return Source(names, layout, sizes, rows, height, parts, axis)


def layers(
    names: Mapping[str, str],
    layout: str = "",
    biases: bool = True,
    ends: tuple[str, str] = ("weight", "bias"),
    between: str = ".",
) -> dict[str, Source]:
    """Lines of layers, by our name and theirs: their `.weight` is our `.w`, in this layout, and their `.bias` our `.b`,
    if they have biases; ends: other names for these; between: what separates them from the name."""
    lines = {f"{ours}.w": source(f"{theirs}{between}{ends[0]}", layout=layout) for ours, theirs in names.items()}
    return lines | {f"{ours}.b": source(f"{theirs}{between}{ends[1]}") for ours, theirs in names.items() if biases}


Rename = str | Callable[[re.Match[str]], str]


def renamed(name: str, rules: Iterable[tuple[str, Rename]]) -> str:
    """The name after `rules`, which are regular expressions and what replaces them, one after the other."""
    for pattern, to in rules:
        name = re.sub(pattern, to, name)
    return name


def under(table: Table, ours: str = "", theirs: str = "") -> dict[str, Source]:
    """The lines of a part of a model, whose names begin with `ours` in ours and with `theirs` in theirs."""
    return {f"{ours}{k}": v._replace(names=tuple(f"{theirs}{n}" for n in v.names)) for k, v in table.items()}


def below(tensors: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def by_head(
    ours: str, theirs: Sequence[str], rows: str = "a (n h)", biases: bool = True, **sizes: int
) -> dict[str, Source]:
    """Lines of queries, keys and values (or of two of them), which are one matrix of ours, head by head.

    theirs: what comes before `weight` and `bias` in their names. rows: einops pattern of the outputs, "a (n h)" of one
    tensor each and "(a n h)" of one for all. sizes: of the pattern.
    """
    ends = {"weight": " d", "bias": ""} if biases else {"weight": " d"}
    return {
        f"{ours}.{end[0]}": Source(tuple(name + end for name in theirs), f"{rows}{d} ->{d} (n a h)", sizes)
        for end, d in ends.items()
    }


def by_kv_head(rows: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Rows int (n + 2 m, h) of all queries, keys and values, in our order: by key-value head, each with its queries."""
    parts = np.split(rows, [heads, heads + kv_heads])
    return np.concatenate([part.reshape(kv_heads, -1) for part in parts], 1).reshape(-1)


def to_ours(model: M, tensors: Tensors, table: Table, ignore: str = "", file: str = "the file") -> M:
    """`model` (abstract or not) with `tensors` in the place of its variables, in the dtypes of the variables.

    tensors: NumPy arrays, or traced ones: `jax.eval_shape` of this function checks a file's names and shapes without
    reading it. ignore: regular expression of names that need no place. The arrays stay on the host. A warning names
    tensors with numbers that are not finite.
    Errors: ValueError that lists variables without a line, and missing, unused, quantised or wrongly shaped tensors.
    """
    wanted, used, read, narrow = named(model), set(), [], set()
    wrong = [f"{ours}: the table has no line for it" for ours in wanted.keys() - table.keys()]
    wrong += [f"{ours}: a line of the table, but nothing in the model" for ours in table.keys() - wanted.keys()]
    found = {}
    for ours, line in table.items():
        if ours not in wanted:
            continue
        variable = wanted[ours]
        layers, arrays = [], []
        for n in range(variable.shape[0] if line.stacked else 1):
            layers.append(tuple(filter(None, line.layer(n))))
            used |= set(layers[-1])
            if missing := [f"{name}: missing" for name in layers[-1] if name not in tensors]:
                wrong += missing
                if len(wrong) > 1000:  # a depth that no file has
                    break
                continue
            parts = [tensors[name] for name in layers[-1]]
            narrow |= {name for name, part in zip(layers[-1], parts, strict=True) if "float8" in str(part.dtype)}
            array, mismatch = _fit(line, layers[-1], parts, ours, variable)
            arrays.append(array)
            wrong += mismatch
        if not wrong:
            array = rearrange(arrays, "l ... -> l ...") if line.stacked else arrays[0]
            if array.dtype != variable.dtype:
                with np.errstate(over="ignore"):  # counted below
                    array = array.astype(variable.dtype)
            if isinstance(array, np.ndarray):
                names = (", ".join(layer) for layer in layers)
                read += zip(names, array if line.stacked else [array], strict=True)
            found[ours] = variable.replace(array)
    wrong += [f"{k}: unused" for k in tensors if k not in used and not (ignore and re.search(ignore, k))]
    wrong += [f"{k}: float8 with scales, not plain weights" for k in tensors if narrow and SCALES.search(k)]
    if wrong:
        more = [f"and {len(wrong) - MOST} more"] if len(wrong) > MOST else []
        raise ValueError(f"{file} does not fit this model:\n  " + "\n  ".join(sorted(wrong)[:MOST] + more))
    if narrow:
        log.warning(f"{file}: {len(narrow)} tensors are float8, of 2 or 3 bits of mantissa; float16 is more exact")
    warn_not_finite(read, file)
    return rebuild(model, found)


def warn_not_finite(arrays: Iterable[tuple[str, np.ndarray]], file: str) -> None:
    """Logs one line that names and counts what is NaN or infinite."""
    bad = [(name, array) for name, array in arrays if not np.isfinite(array).all()]
    for name, array in bad[:1]:
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        more = f"; {len(bad) - 1} more tensors have such numbers" if len(bad) > 1 else ""
        log.warning(f"{file}: {name} has {nan} NaN and {infinite} infinite of {array.size} numbers{more}")


def _fit(
    line: Source, names: tuple[str, ...], parts: list[np.ndarray], ours: str, variable: nnx.Variable
) -> tuple[np.ndarray | None, list[str]]:
    """One layer of a variable from its tensors, or what is wrong with them."""
    wanted = variable.shape[1:] if line.stacked else variable.shape
    for name, part in zip(names, parts, strict=True):
        if np.dtype(part.dtype).kind in "iub" and np.dtype(variable.dtype).kind not in "iub":
            return None, [f"{name}: {part.dtype} where floats are wanted: it is quantised"]
    try:
        array = line.ours(parts)
        if array.shape == wanted:
            return array, []
    except (EinopsError, ValueError, TypeError):  # shapes that the layout cannot take, or parts that are not alike
        pass
    return None, [f"{', '.join(names)}: {[tuple(p.shape) for p in parts]} does not make {ours} {wanted}"]


def to_theirs(model: nnx.Module, table: Table) -> dict[str, np.ndarray]:
    """The variables of `model` under their names and in their layouts: what `to_ours` reads."""
    return arrays_to_theirs({name: np.asarray(v[...]) for name, v in named(model).items()}, table)


def arrays_to_theirs(arrays: Tensors, table: Table) -> dict[str, np.ndarray]:
    """The tensors that hold these arrays of ours; other parts of such a tensor are 0."""
    whole: dict[str, np.ndarray] = {}
    for name, array, line in _lines(arrays, table):
        if line.rows is None or line.parts:
            whole[name] = array
        else:
            shape = (*array.shape[: line.axis], line.height, *array.shape[line.axis + 1 :])
            whole.setdefault(name, np.zeros(shape, array.dtype))[line.places] = array
    return whole


def _lines(arrays: Tensors, table: Table) -> Iterator[tuple[str, np.ndarray, Source]]:
    for ours, array in arrays.items():
        line = table[ours]
        for n, part in enumerate(array if line.stacked else [array]):
            for name, theirs in zip(line.layer(n), line.theirs(part), strict=True):
                if name:
                    yield name, np.asarray(theirs, order="C"), line  # not ascontiguousarray, it has no scalars
