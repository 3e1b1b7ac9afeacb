"""The forms of a compiled program's text (HLO): computations, instructions, loops, groups of devices.

XLA promises nothing about its text, and it changes between versions. So nothing else reads it, and a form that is not
known is an `UnknownForm`: no cost is silently left out.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from t2i_jax.core.jaxprs import UnknownForm

WIDTHS = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0}

_instruction = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_array = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_operand = re.compile(r"(?:.*\s)?%([\w.\-]+)((?:#\d+)*)")
"""An instruction by its name, or an element of the tuple that it gives: `%loop#2` (jax 0.12)."""


@dataclasses.dataclass
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: list[str]
    text: str
    root: bool

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(dtype, shape, layout) of its result, or of each element."""
        return [
            (t, tuple(int(n) for n in s.split(",") if n), layout or "") for t, s, layout in _array.findall(self.type)
        ]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[0][1] if self.arrays else ()

    def size(self, hbm: bool = False) -> float:
        """Bytes of its result, or of the part in HBM."""
        return sum(width(t) * math.prod(s) for t, s, layout in self.arrays if not (hbm and "S(" in layout))

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.text)
        return found.group(1) if found else ""

    def listed(self, name: str) -> list[str]:
        """The names of an attribute that lists several."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.text)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []

    @property
    def number(self) -> int:
        """Of a parameter."""
        return int(self.text[1:].split(")")[0])


def width(dtype: str) -> float:
    """Bytes of one number."""
    if dtype in WIDTHS:
        return WIDTHS[dtype]
    bits = re.search(r"\d+", dtype)
    if not bits:
        raise UnknownForm(f"type '{dtype}' in a compiled program", "its width is not known")
    return int(bits.group()) / 8


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one it begins with. Errors: `UnknownForm`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and " = " not in line.split("->")[0] and not line.startswith("HloModule"):
                current = computations.setdefault(head.group(2), {})
                entry = head.group(2) if head.group(1) else entry
        elif re.match(r"\}(, execution_thread=\S*)?\s*$", line):  # a kernel's description may have lines that begin so
            current = None
        elif found := _instruction.match(line):
            root, name, rest = found.groups()
            end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
            call = re.match(r"\s*([\w\-]+)\(", rest[end:])
            if not call:
                continue
            start = end + call.end() - 1
            stop = _close(rest, start)
            literal = call.group(1) in ("parameter", "constant")
            operands = [] if literal else _operands(rest[start:stop], current, name)
            body = rest[start:stop] if literal else ""
            current[name] = Instruction(name, rest[:end], call.group(1), operands, body + rest[stop:], bool(root))
    if entry not in computations:
        raise UnknownForm("a compiled program", "no computation is marked as its entry")
    return computations, entry


def _operands(text: str, current: Computation, user: str) -> list[str]:
    """Names of the operands in `(%a, f32[] %b, %c#1)`; what takes an element out of a tuple becomes an instruction."""
    names = []
    for part in filter(None, _elements(text)):
        found = _operand.fullmatch(part)
        if not found:
            raise UnknownForm(f"'{user}' in a compiled program", f"its operand '{part[:100]}' cannot be read")
        name = found.group(1)
        if name not in current:
            raise UnknownForm(f"'{user}' in a compiled program", f"its operand {name} is not defined before it")
        for index in found.group(2).split("#")[1:]:
            part = _elements(current[name].type)[int(index)]
            whole, name = name, f"{name}#{index}"
            current[name] = Instruction(name, part, "get-tuple-element", [whole], f"), index={index}", False)
        names.append(name)
    return names


def _elements(type: str) -> list[str]:
    """The parts of a list in brackets: `(f32[], /*index=1*/(s32[2]{0}, pred[]))` has two."""
    parts, depth = [""], 0
    for c in re.sub(r"/\*.*?\*/", "", type.strip())[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def called(computations: dict[str, Computation], i: Instruction, *attributes: str) -> str:
    """The name of the computation that an instruction runs, named by the first of these attributes that it has."""
    name = next(filter(None, map(i.attribute, attributes)), "")
    if name not in computations:
        raise UnknownForm(f"'{i.op}' in a compiled program", f"{' or '.join(attributes)} names no computation")
    return name


def _close(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def root(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.root)


def trips(computations: dict[str, Computation], within: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if that depends on data."""
    known = re.search(r'known_trip_count"?:?\{"?n"?:"?(\d+)', loop.text)
    if known:
        return int(known.group(1))
    condition = computations[called(computations, loop, "condition")]
    test, values = root(condition), condition
    if test.op == "fusion":  # the comparison inside: its parameters are the operands of the fusion
        values = computations[called(computations, test, "calls")]
        outer, test = test, root(values)
        place = lambda i: condition[outer.operands[i.number]]
    else:
        place = lambda i: i
    if test.op != "compare" or len(test.operands) != 2:
        return None
    sides = [_through(values, n) for n in test.operands]
    sides = [_through(condition, place(s).name) if s.op == "parameter" and place(s) is not s else s for s in sides]
    limits = [number(s) for s in sides]
    if sum(n is not None for n in limits) != 1:
        return None
    limit = next(n for n in limits if n is not None)
    counter = sides[0] if limits[0] is None else sides[1]
    index = counter.attribute("index")
    if counter.op != "get-tuple-element" or not index:
        return None
    first = (
        _through(within, within[loop.operands[0]].operands[int(index)]) if within[loop.operands[0]].operands else None
    )
    begin = number(first) if first else None
    return abs(limit - begin) if begin is not None else abs(limit)


def _through(computation: Computation, name: str) -> Instruction:
    while computation[name].op in ("copy", "bitcast", "convert") and computation[name].operands:
        name = computation[name].operands[0]
    return computation[name]


def number(i: Instruction) -> int | None:
    """The value of an integer constant; None for other instructions."""
    found = re.match(r"\((-?\d+)\)", i.text) if i.op == "constant" else None
    return int(found.group(1)) if found else None


def group(i: Instruction) -> tuple[int, ...]:
    """The partitions of the first group of a collective, in any of the ways in which HLO writes groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", i.text):
        return tuple(int(n) for n in listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.text):
        shape, dims, turn = ([int(n) for n in g.split(",")] if g else None for g in iota.groups())
        ids = np.arange(math.prod(dims or ())).reshape(dims)
        ids = ids.transpose(turn) if turn else ids
        return tuple(int(n) for n in ids.reshape(shape)[0])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", i.text):
        axes = re.findall(r"'([^']+)'=(\d+)", mesh.group(1))
        named = re.findall(r"'([^']+)'", mesh.group(3))
        ids = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
        return tuple(int(n) for n in ids[tuple(slice(None) if a in named else 0 for a, _ in axes)].ravel())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", i.text):
        return tuple(int(n) for n in pairs.groups())
    raise UnknownForm(f"'{i.op}' in a compiled program", f"its groups of devices cannot be read: {i.text[:100]}")
