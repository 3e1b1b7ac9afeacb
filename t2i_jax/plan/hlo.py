"""What a compiled program does, from its HLO text: products, traffic and collectives, loops counted as they run.

XLA's own cost analysis counts the body of a loop once, however often it runs (seen for TPUs: a scan over 3 and over 6
layers gives the same FLOPs). So the text is read here: the trip count of each `while` from its condition, and with it
the FLOPs of every dot and convolution, the bytes that every top-level instruction moves to and from HBM (buffers in
on-chip memory, `S(1)` in their layout, are left out; of an operand that is only sliced the slice counts), and every
collective once per channel, though an asynchronous one appears in several fusions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from t2i_jax.core.jaxprs import UnknownForm
from t2i_jax.plan.hlo_text import Computation, Instruction, called, group, parse, root, trips, width

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "after-all", "partition-id", "replica-id", "iota", "optimization-barrier",
}  # fmt: skip


def convolution_flops(i: Instruction, within: Computation) -> float:
    """2 for each pair of numbers that a convolution multiplies; products with padding or holes do not count.

    The TPU compiler writes batched products as convolutions with holes, of which most of the window is empty.
    """
    left, kernel = (within[n].shape for n in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if not labels:
        raise UnknownForm(f"'{i.op}' in a compiled program", f"it has no dim_labels: {i.text[:100]}")
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.text)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}
    rank = sum(c.isdigit() for c in out)
    numbers = lambda name, default: [int(n) for n in fields.get(name, "x".join([default] * rank)).split("x") if n]
    sizes, strides = numbers("size", "1"), numbers("stride", "1")
    holes, spread = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    pads = [int(p.split("_")[0]) for p in fields.get("pad", "x".join(["0_0"] * rank)).split("x") if p]
    pairs = 1.0
    for d in range(rank):
        places = np.arange(i.shape[out.index(str(d))])[:, None] * strides[d] - pads[d]
        places = places + np.arange(sizes[d])[None] * spread[d]
        reach = (left[lhs.index(str(d))] - 1) * holes[d]
        pairs *= float(np.sum((places >= 0) & (places <= reach) & (places % holes[d] == 0)))
    batches = re.search(r"batch_group_count=(\d+)", i.text)
    return (
        2
        * pairs
        * i.shape[out.index("b")]
        * i.shape[out.index("f")]
        * kernel[rhs.index("i")]
        / (int(batches.group(1)) if batches else 1)
    )


KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
"""Products over (queries, keys, head dimension) in the kernels for TPUs that `nn.kernels` uses."""


def kernel_flops(i: Instruction, within: Computation) -> float:
    """Of an attention kernel: all pairs of queries and keys, as if they were written out. 0 for other kernels."""
    products = next((n for name, n in KERNELS.items() if name in i.name), 0)
    operands = [within[n] for n in i.operands if n in within]
    looks = [o.shape for o in operands if len(o.shape) > 2 and o.arrays[0][0] in ("bf16", "f16", "f32")]
    if not products or len(looks) < 2:
        return 0.0
    q, k = looks[:2]
    return 2.0 * products * math.prod(q) * k[-2]


def flops(i: Instruction, within: Computation, computations: dict[str, Computation]) -> float:
    """Of the products in an instruction, those inside a fusion included."""
    if i.op == "convolution":
        return convolution_flops(i, within)
    if i.op == "custom-call":
        return kernel_flops(i, within)
    if i.op == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        if not dims:
            raise UnknownForm(f"'{i.op}' in a compiled program", f"it has no lhs_contracting_dims: {i.text[:100]}")
        shape = within[i.operands[0]].shape
        return 2.0 * math.prod(i.shape) * math.prod(shape[int(d)] for d in dims.group(1).split(",") if d)
    if i.op.endswith(("-dot", "-convolution")):
        raise UnknownForm(f"'{i.op}' in a compiled program", "an unknown kind of product")
    if i.op == "fusion":
        inner = computations[called(computations, i, "calls")]
        return sum(flops(j, inner, computations) for j in inner.values())
    return 0.0


SLICES = ("dynamic-slice", "slice", "gather")
SAME = ("bitcast", "copy", "convert", "reshape", "transpose")
"""inside a fusion these only say otherwise what is read or written"""


def traffic(i: Instruction, within: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that an instruction reads from and writes to HBM."""
    if i.op in FREE or i.op.endswith("-done") or "AllocateBuffer" in i.text:
        return 0.0
    if i.op in ("async-start", "async-update") and i.attribute("calls") in computations:
        return 0.0  # the called computation is counted itself; the type here includes operands that are only sliced
    operands = [within[n] for n in i.operands if n in within]
    if i.op.removesuffix("-start") in SLICES:
        part = sum(width(t) * math.prod(s) for t, s, _ in i.arrays[1:2]) if i.op.endswith("-start") else i.size()
        on_chip = any("S(" in layout for _, _, layout in (i.arrays[1:2] if i.op.endswith("-start") else i.arrays))
        return part * bool(operands[0].size(hbm=True)) + part * (not on_chip)
    if i.op.endswith("-start"):  # what it gives names what it takes too
        return i.size(hbm=True)
    if i.op == "dynamic-update-slice":
        return 2 * operands[1].size(hbm=True)
    if i.op == "send":  # its result is its operand
        return operands[0].size(hbm=True)
    if i.op != "fusion":
        return i.size(hbm=True) + sum(o.size(hbm=True) for o in operands)
    inner = computations[called(computations, i, "calls")]
    given = {j.number: j.name for j in inner.values() if j.op == "parameter"}
    read = (min(_read(inner, given[n], computations), o.size(hbm=True)) for n, o in enumerate(operands) if n in given)
    end = root(inner)
    results = [inner[n] for n in end.operands] if end.op == "tuple" else [end]
    # A result that takes the place of an operand is written where it was changed alone.
    kept = (
        {int(k) for k, _ in re.findall(r"\{(\d+)\}: \((\d+), ", i.text)}
        if "output_to_operand_aliasing" in i.text
        else set()
    )
    written = (
        min(_written(inner, j, computations, k in kept), width(t) * math.prod(shape))
        for k, (j, (t, shape, layout)) in enumerate(zip(results, i.arrays, strict=False))
        if "S(" not in layout
    )
    return sum(read) + sum(written)


def _read(inner: Computation, name: str, computations: dict[str, Computation]) -> float:
    """Bytes that a fusion reads of one of its parameters: of what is only sliced the slices, else infinite: all."""
    total = 0.0
    for j in inner.values():
        if name not in j.operands or j.op in ("tuple", "custom-call", "get-tuple-element"):
            continue
        first = j.operands[0] == name
        if j.op in SLICES and first:
            total += j.size()
        elif j.op in SAME or (j.op == "dynamic-update-slice" and first):  # it may be read once it is updated
            total += _read(inner, j.name, computations)
        elif j.op == "fusion":
            nested = computations[called(computations, j, "calls")]
            given = {p.number: p.name for p in nested.values() if p.op == "parameter"}
            total += sum(_read(nested, given[n], computations) for n, o in enumerate(j.operands) if o == name)
        else:
            return math.inf
    return total


def _written(inner: Computation, j: Instruction, computations: dict[str, Computation], kept: bool) -> float:
    """Bytes that a fusion writes of one of its results: of an update in place the update, else infinite: all."""
    while j.op in SAME and j.operands[0] in inner:
        j = inner[j.operands[0]]
    if j.op == "fusion":
        nested = computations[called(computations, j, "calls")]
        return _written(nested, root(nested), computations, kept)
    if j.op == "dynamic-update-slice":
        return inner[j.operands[1]].size()
    return 0.0 if kept or j.op == "parameter" else math.inf


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program: `size` bytes a run, of one chip's whole array; `ids` is one of its groups, which
    are numbers within a slice. One between slices is of all of them, chip by chip of the same number."""

    kind: str
    size: float
    group: int
    ids: tuple[int, ...]
    times: int
    asynchronous: bool
    between: bool = False
    """between slices"""

    @property
    def name(self) -> str:
        return self.kind + " between slices" * self.between


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one chip for one run of the program."""

    flops: float
    flops_once: float
    """loops counted once, as the compiler's own analysis does"""
    bytes: float
    operations: tuple[tuple[float, float], ...]
    """(FLOPs, bytes) of all instructions that have any, times how often they run; without asynchronous copies"""
    collectives: tuple[Collective, ...]
    unknown_loops: int
    """loops whose length depends on data; counted once"""
    unknown_kernels: tuple[str, ...]
    """hand-written kernels whose products are not counted"""


def between_slices(i: Instruction) -> str:
    """The kind of collective that the runtime carries out between slices, from what the program sends to it."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.text)
    kind = named.group(1).lower().replace("_", "-") if named else ""
    if kind not in KINDS:
        raise UnknownForm(f"'{i.op}' in a compiled program", f"its kind of transfer is not known: {i.text[:300]}")
    return kind


def offloaded(i: Instruction) -> list[str]:
    """The computations that another core of the chip carries out for an instruction, as SparseCores do collectives."""
    return i.listed("called_computations") if i.op == "custom-call" else []


def count(text: str) -> Costs:
    """The costs of a compiled program (`compiled.as_text()`). Errors: `UnknownForm`."""
    return _count(*parse(text))


def _count(computations: dict[str, Computation], entry: str) -> Costs:
    operations: list[tuple[float, float]] = []
    found: dict[tuple[str, str], Collective] = {}
    kernels: set[str] = set()
    total = once = moved = 0.0
    unknown = 0

    def collective(i: Instruction, within: Computation, inside: str, times: int) -> None:
        kind = i.op.removesuffix("-start")
        if kind == "send" and "xla_megascale_runtime" in i.text:
            kind, size = between_slices(i), within[i.operands[0]].size()
            found[kind, i.attribute("channel_id") or i.name] = Collective(kind, size, 0, (), times, True, True)
            return
        if kind not in KINDS:
            return
        operands = sum(within[n].size() for n in i.operands if n in within)
        size = (
            operands if kind != "all-gather" else max(i.size(), operands) - (operands if i.op.endswith("-start") else 0)
        )
        ids = group(i)
        kind = "reduce-scatter" if kind == "all-reduce" and "reduce-scatter" in inside else kind
        later = i.op.endswith("-start") or "async" in inside or any("Async" in j.text for j in within.values())
        channel = (kind, i.attribute("channel_id") or i.name)
        old = found.get(channel)
        if old is None or old.times < times or (later and not old.asynchronous):
            found[channel] = Collective(kind, size, len(ids), ids, max(times, old.times if old else 0), later)

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, Computation, str, int]]:
        nonlocal unknown
        for i in computations[name].values():
            yield i, computations[name], name, times
            if i.op == "while":
                n = trips(computations, computations[name], i)
                unknown += n is None
                yield from walk(called(computations, i, "body"), times * (1 if n is None else n))
            elif i.op in ("call", "async-start"):
                yield from walk(called(computations, i, "to_apply", "calls"), times)
            elif i.op == "conditional":
                two = lambda i: [called(computations, i, f"{c}_computation") for c in ("true", "false")]
                for branch in i.listed("branch_computations") or two(i):
                    yield from walk(branch, times)

    for i, within, name, times in walk(entry, 1):
        collective(i, within, name, times)
        for inner in [called(computations, i, "calls")] if i.op == "fusion" else offloaded(i):
            for j in computations[inner].values():
                collective(j, computations[inner], f"{name} {inner}" if i.op != "fusion" else inner, times)
        if "tpu_custom_call" in i.text and not kernel_flops(i, within):
            kernels.add(i.name.split(".")[0])
        work, size = flops(i, within, computations), traffic(i, within, computations)
        total, once, moved = total + work * times, once + work, moved + size * times
        if work or (size and not i.op.endswith("-start")):
            operations.append((work * times, size * times))
    return Costs(total, once, moved, tuple(operations), tuple(found.values()), unknown, tuple(sorted(kernels)))


def spared(text: str) -> float:
    """Bytes of HBM traffic that a program spares, at least, by results of fusions that stay in on-chip memory for who
    reads them next. What is fetched there ahead spares nothing. Less of a larger batch finds room."""
    computations, entry = parse(text)
    before = _count(computations, entry).bytes
    for computation in computations.values():
        for i in computation.values():
            of = computation[i.operands[0]] if i.op == "get-tuple-element" else i
            if of.op == "fusion":
                i.type = i.type.replace("S(1)", "")
    return _count(computations, entry).bytes - before
