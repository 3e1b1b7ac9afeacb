"""Folders as Hugging Face lays them out: `config.json`, and weights in one file or in shards, in several variants."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from t2i_jax.core.config import read_json
from t2i_jax.core.sniff import sniff_file
from t2i_jax.interop.names import Fields
from t2i_jax.interop.tensorfile import Lazy, Reader, SafeTensors, content
from t2i_jax.interop.wrapping import located

log = logging.getLogger(__name__)

FILE = re.compile(
    r"(?P<stem>[^.]+?)(?:\.(?P<variant>.+?))?(?P<shard>-(?P<n>\d{5})-of-(?P<of>\d{5}))?(?:\.(?P<after>.+?))?"
    r"\.(?P<kind>safetensors|bin|pt|pth|ckpt)(?P<index>\.index(?:\.(?P<last>.+))?\.json)?",
    re.IGNORECASE,
)
"""`model.fp16.safetensors`, `model-00001-of-00002.fp16.safetensors`, `model.safetensors.index.fp16.json`, ..."""
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Names of weights, best first; other names come after them."""
VARIANTS = ("", "fp32", "ema", "bf16", "fp16", "fp8", "non_ema")
"""Best first."""
OTHERS = r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)"
"""Beginnings of the names of files that accompany weights and hold none."""


class Settings(Fields):
    """The fields of a JSON file. Errors: ValueError naming file and field for one that it lacks."""

    def __init__(self, path: Path, fields: Fields):
        super().__init__(fields)
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(f"{self.path}: has no '{key}'; it has {', '.join(list(self)[:8]) or 'no fields'}")


def settings(path: str | Path) -> Settings:
    """The contents of a JSON file. Errors: FileNotFoundError; ValueError naming the file where it is no JSON."""
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) if path.parent.is_dir() else ""
        raise FileNotFoundError(
            f"{path.parent}: no {path.name} in it, as Hugging Face has it; it holds {there or 'nothing'}"
        )
    return Settings(path, read_json(path))


def config(folder: str | Path) -> Settings:
    """The contents of `config.json`. Errors: FileNotFoundError without it, ValueError where it cannot be read."""
    return settings(Path(folder) / "config.json")


def check_supported(fields: Fields, known: Mapping[str, tuple[object, ...]], file: str = "config.json") -> None:
    """Errors: ValueError naming a field of a JSON file with another value than the known ones; it may lack the
    field."""
    for field, values in known.items():
        if field in fields and fields[field] not in values:
            raise ValueError(f"{file}: {field} is {fields[field]!r}; what can be read is {values[0]!r}")


class Found(NamedTuple):
    """One copy of the weights in a folder."""

    file: Path
    """the file, its index, or the first shard of those without one"""
    stem: str
    variant: str
    kind: str
    is_index: bool
    shards: int
    """how many belong to it where there is no index, else 0"""
    pointer: bool
    """it was not downloaded"""

    @property
    def rank(self) -> tuple[bool, int, int, bool, bool, bool, str]:
        """Sort key, best first."""
        variant = VARIANTS.index(self.variant) if self.variant in VARIANTS else len(VARIANTS)
        stem = STEMS.index(self.stem) if self.stem in STEMS else len(STEMS)
        return self.pointer, variant, stem, self.kind != "safetensors", self.shards > 0, self.is_index, self.file.name


class Weights(Lazy):
    """The tensors of a folder, a file, or an index of shards, by published name; each is read when it is asked for.

    needed, part: as for `wrapping.located`. Of several variants in a folder the widest is taken and logged: fp32
    before bf16 before fp16, averaged weights before others.
    Errors: FileNotFoundError for a folder without weights, or with shards missing; ValueError for a file that holds
    none or is damaged.
    """

    def __init__(self, path: str | Path, *needed: tuple[str, ...], part: str = ""):
        path = Path(path)
        files = _chosen(path) if path.is_dir() else _shards(path) if path.suffix.lower() == ".json" else [path]
        if not path.is_dir() and (m := FILE.fullmatch(path.name)) and m["shard"] and int(m["of"]) > 1:
            raise ValueError(f"{path}: is shard {int(m['n'])} of {int(m['of'])}; name the folder or the index instead")
        whole = content(files[0]) if len(files) == 1 else Lazy(dict(_joined(files)))
        super().__init__(located(whole, *needed, part=part, file=str(files[0] if len(files) == 1 else path)).readers)


def _joined(files: list[Path]) -> Iterator[tuple[str, Reader]]:
    """Readers of all tensors of the shards. Errors: ValueError where two shards have one name."""
    known: dict[str, Path] = {}
    for file in files:
        part = content(file)
        part = part if isinstance(part, SafeTensors) else located(part, file=str(file))
        for name, reader in part.readers.items():
            if name in known:
                raise ValueError(f"{file}: holds {name}, and so does {known[name].name}")
            known[name] = file
            yield name, reader


def _chosen(folder: Path) -> list[Path]:
    """The files of the best weights in a folder."""
    found = {}
    for file in sorted(folder.iterdir()):
        m = FILE.fullmatch(file.name)
        if m is None or not file.is_file() or re.match(OTHERS, file.name):
            continue
        variant = next((v.lower() for v in (m["variant"], m["after"], m["last"]) if v), "")
        kind, pointer = m["kind"].lower(), "pointer" in sniff_file(file)
        one = Found(file, m["stem"].lower(), variant, kind, bool(m["index"]), int(m["of"] or 0), pointer)
        found.setdefault(one[1:], one)
    indexed = {(one.stem, one.variant, one.kind) for one in found.values() if one.is_index}
    copies = [one for one in found.values() if not one.shards or one[1:4] not in indexed]
    if not copies:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        known = ", ".join(f"{stem}.safetensors" for stem in STEMS)
        raise FileNotFoundError(f"{folder}: no weights in it; one of {known}, or .bin, is wanted; it holds {there}")
    copies.sort(key=lambda one: one.rank)
    best = copies[0]
    if best.stem not in STEMS and len({one.stem for one in copies}) > 1:
        names = ", ".join(one.file.name for one in copies)
        raise ValueError(f"{folder}: holds {names}; name the file that is meant")
    if others := [one.file.name for one in copies if one.variant != best.variant or one.pointer != best.pointer]:
        log.warning(f"{folder}: the weights in {best.file.name} are taken, not those in {', '.join(others)}")
    elif best.variant == "non_ema":
        log.warning(f"{best.file}: the weights are not averaged; there are no others in the folder")
    if best.is_index:
        return _shards(best.file)
    if not best.shards:
        return [best.file]
    names = [re.sub(r"-\d{5}-of-", f"-{n + 1:05d}-of-", best.file.name) for n in range(best.shards)]
    return _there(folder, names, f"of {best.shards} shards")


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Errors: ValueError where it is no index, FileNotFoundError without them."""
    names = settings(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: has no weight_map from names to files: it is no index of weights")
    files = sorted(set(names.values()))
    if odd := [name for name in files if Path(name).name != name]:
        raise ValueError(f"{index}: names {odd[0]}, which is not in the same folder")
    return _there(index.parent, files, f"{index.name} names")


def _there(folder: Path, names: list[str], source: str) -> list[Path]:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {source} {', '.join(missing)}, which is not there")
    return [folder / name for name in names]
