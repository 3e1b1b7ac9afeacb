"""Finds a model's tensors in a file of weights.

Training programs save weights in dictionaries, {"model": ..., "ema": ...}, and with prefixes before names, "module."
or "_orig_mod.". Names that every file of a format has show where they begin.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from t2i_jax.interop.names import Tensors
from t2i_jax.interop.tensorfile import Lazy, Reader
from t2i_jax.interop.torchfile import StandIn, is_tensor, tensors_below

log = logging.getLogger(__name__)

WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that parallel and compiled modules add at any depth; published names have none of them."""
BOOKKEEPING = re.compile(r"(^|\.)(n_averaged|num_updates|decay|initted|step|global_step|epoch|iteration)$")
"""Names of bookkeeping entries of training programs and weight averages."""
AVERAGE = re.compile(r"(^|_)(ema|swa|averaged?)(_|$)")
"""Parts of names of averaged weights."""
KEYS = ("model", "module", "state_dict")
"""Keys of weights, best first."""
DEEPEST = 8
"""How many levels of nested dictionaries are searched."""


class Node(NamedTuple):
    """A dictionary with tensors in it."""

    keys: tuple[str, ...]
    """of the dictionaries around it"""
    readers: dict[str, list[Reader]]
    """readers of the tensors, by name without WRAPPERS: one, or several whose names differ in these alone"""


class Place(NamedTuple):
    """Where the names of a model begin."""

    node: Node
    prefix: str

    def rank(self, part: str) -> tuple[bool, bool, int]:
        """Sort key, best first: averages, names under `part`, dictionaries of KEYS."""
        words = (*self.node.keys, *self.prefix.split("."))
        known = min((KEYS.index(key) for key in self.node.keys if key in KEYS), default=len(KEYS))
        return not any(map(AVERAGE.search, words)), not self.prefix.endswith(part), known

    def __str__(self) -> str:
        return (
            repr(".".join((*self.node.keys, self.prefix)).strip(".")) if self.node.keys or self.prefix else "the rest"
        )


def located(content: object, *needed: tuple[str, ...], part: str = "", file: str = "the file") -> Lazy:
    """The tensors of a model in the content of a file, their names as published.

    needed: names that every file of the kind has; further ones are tried where the first are not there. part: prefix
    of the model's names in files that hold other models too. Averaged weights are taken before others, and logged.
    Where the needed names are nowhere it is the largest dictionary, for an error that names its keys.
    Errors: ValueError where there are no tensors, or where several sets of them fit.
    """
    nodes = list(_nodes(content))
    if not nodes:
        raise ValueError(f"{file}: holds {_kind(content)}; a dictionary of tensors, or a whole module, is wanted")
    whole = Node((), defaultdict(list))
    for node in nodes:
        for name, readers in node.readers.items():
            whole.readers[".".join((*node.keys, name))] += readers
    tries = ([p for node in some for p in _places(node, names)] for some in (nodes, [whole]) for names in needed)
    places = sorted(next(filter(None, tries), []), key=lambda place: place.rank(part))
    if not places:
        return _tensors(Place(max(nodes, key=lambda node: len(node.readers)), ""), file)
    best, others = places[0], places[1:]
    if others and others[0].rank(part) == best.rank(part):
        raise ValueError(f"{file}: the names of the model are there more than once: {', '.join(map(str, places))}")
    averages = [key for key in content if AVERAGE.search(str(key))] if isinstance(content, Mapping) else []
    lost = [key for key in averages if isinstance(content[key], Mapping | list) and content[key]]
    if lost and best.rank(part)[0]:
        log.warning(f"{file}: '{lost[0]}' does not hold this model by its names; {best} is taken")
    if others:
        log.warning(f"{file}: the weights under {best} are taken, not those under {', '.join(map(str, others))}")
    return _tensors(_averaged(best), file)


def holds(tensors: Tensors, *needed: tuple[str, ...]) -> bool:
    """Whether names under some prefix are the needed ones of a kind of file."""
    node = Node((), {name: [] for name in tensors})
    return any(True for names in needed for _ in _places(node, names))


def _nodes(content: object, keys: tuple[str, ...] = ()) -> Iterator[Node]:
    if isinstance(content, StandIn):  # a module saved whole
        content = dict(tensors_below(content))
    if not isinstance(content, Mapping) or len(keys) > DEEPEST:
        return
    readers = defaultdict(list)
    for name in content:
        lazy = isinstance(content, Lazy)
        if isinstance(name, str) and (lazy or is_tensor(content[name])) and not BOOKKEEPING.search(name):
            plain = ".".join(word for word in name.split(".") if word not in WRAPPERS)
            readers[plain].append(partial(content.__getitem__, name))
        elif not lazy:
            yield from _nodes(content[name], (*keys, str(name)))
    if readers:
        yield Node(keys, readers)


def _places(node: Node, needed: tuple[str, ...]) -> Iterator[Place]:
    first, *rest = needed
    for name in node.readers:
        prefix = name.removesuffix(first)
        found = name.endswith(first) and (not prefix or prefix.endswith("."))
        if found and all(f"{prefix}{other}" in node.readers for other in rest):
            yield Place(node, prefix)


def _tensors(place: Place, file: str) -> Lazy:
    mine = {name: readers for name, readers in place.node.readers.items() if name.startswith(place.prefix)}
    if double := [name for name, readers in mine.items() if len(readers) > 1]:
        raise ValueError(
            f"{file}: holds {double[0]} {len(mine[double[0]])} times, under names that differ in "
            f"{', '.join(sorted(WRAPPERS))} alone; it is not clear which is meant"
        )
    return Lazy({name.removeprefix(place.prefix): readers[0] for name, readers in mine.items()})


def _averaged(place: Place) -> Place:
    """The place with averaged weights of latent diffusion instead, if the file has them for all of its names.

    They are `model_ema.` and the names within `model.` without their dots.
    """
    readers = place.node.readers
    mine = [name for name in readers if name.startswith(place.prefix)]
    flat = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in mine}
    if not place.prefix.startswith("model.") or not all(name in readers for name in flat.values()):
        return place
    return Place(Node(place.node.keys, {name: readers[average] for name, average in flat.items()}), place.prefix)


def _kind(content: object) -> str:
    if isinstance(content, list | tuple):
        return f"a list of {len(content)} things without names"
    if isinstance(content, Mapping):
        return f"no tensors (its keys are {', '.join(map(str, list(content)[:5])) or 'none'})"
    return f"a {content.name if isinstance(content, StandIn) else type(content).__name__}"
