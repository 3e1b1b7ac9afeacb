"""The zoo: trained models inside the package, which a name alone loads: `t2i.load("emoji-64")`.

Each is a folder of `models/`, whose name is its own: a released model, `card.json` and a picture of what it draws,
`grid.png`. Imports neither JAX nor the models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from t2i_jax.core.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent / "models"
"""The folders of the models."""
CARD, PICTURE = "card.json", "grid.png"


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo, as its card describes it."""

    name: str
    folder: Path
    title: str
    """one line: what it draws, and of what prompts"""
    family: str
    size: tuple[int, int]
    """rows and columns of its images"""
    licence: str
    """of the weights, and of the pictures that it was trained on"""
    needs: str = ""
    """the command that installs a package which it reads besides this one"""
    figures: Mapping[str, float] = field(default_factory=dict)
    """what was measured, by name"""

    @property
    def picture(self) -> Path:
        """A grid of prompts and images of it."""
        return self.folder / PICTURE

    @property
    def bytes(self) -> int:
        """All of its files together."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


def models() -> dict[str, ZooModel]:
    """The models of the zoo by name. Errors: `ConfigError` for a card that cannot be read."""
    found = sorted(FOLDER.glob(f"*/{CARD}"))
    return {card.parent.name: read_card(card) for card in found}


def read_card(path: Path) -> ZooModel:
    """The model that a card describes. Errors: `ConfigError` that names the file and the field."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cut short, or no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; an object with fields is wanted")
    known = [f.name for f in fields(ZooModel) if f.name not in ("name", "folder")]
    for name in content:
        if name not in known:
            raise ConfigError(f"{path}: a card has no field '{name}'{did_you_mean(name, known)}")
    for name in ("title", "family", "licence"):
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise ConfigError(f"{path}: {name}: a text is wanted")
    size = content.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ConfigError(f"{path}: size: rows and columns of an image are wanted, as [64, 64]")
    figures = content.get("figures", {})
    if not isinstance(figures, dict) or not all(isinstance(x, int | float) for x in figures.values()):
        raise ConfigError(f"{path}: figures: a number for each name is wanted")
    if not isinstance(content.get("needs", ""), str):
        raise ConfigError(f"{path}: needs: a text is wanted")
    return ZooModel(path.parent.name, path.parent, **{**content, "size": tuple(size), "figures": figures})


def find(name: str | Path) -> Path | None:
    """The folder of a model of the zoo, or of a part of it, as `emoji-64/codec`; None for what has no such name.

    A file or folder of the working directory that has the name of a model is taken instead of it.
    """
    word, _, part = str(name).partition("/")
    if not _is_word(word) or Path(word).exists() or not (FOLDER / word / CARD).is_file():
        return None
    folder = FOLDER / word / part
    return folder if folder.is_dir() and ".." not in Path(part).parts else None


def shared(part: str, folder: str | Path) -> str:
    """The path from a model of the zoo to a part of another one, which models of the zoo share; "" for all others."""
    own, other = Path(folder).resolve(), (find(part) or Path(part)).resolve()
    inside = own.parent == FOLDER.resolve() and FOLDER.resolve() in other.parents
    return os.path.relpath(other, own) if part and inside and own not in other.parents else ""


def hint(name: str | Path) -> str:
    """The end of an error about a model that is not there: the nearest name of the zoo, or nothing."""
    word = str(name)
    return did_you_mean(word, models(), 0.5) if _is_word(word) else ""


def _is_word(word: str) -> bool:
    """Whether a model is named by a word, and not by a path or an address."""
    return bool(word) and not set(word) & set("/\\:\0") and word not in (".", "..")
