"""Reads a folder of images whose captions are in text files of the same names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2i_jax.core.errors import DataError
from t2i_jax.core.text import mend, read_lines
from t2i_jax.data.files import ending, kinds, mounted, some, walk
from t2i_jax.data.images import image_endings
from t2i_jax.data.records import Captions, Record

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files of other programs with the captions of a folder."""


@dataclass
class FolderReader:
    """Images below `path` by their names relative to it."""

    path: str
    names: Sequence[str]
    texts: Mapping[str, str]
    """the caption files that are not called as usual, .TXT, by the image"""
    about: str
    about_captions: str

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        captions = self._captions(Path(self.path, self.texts.get(name, os.path.splitext(name)[0] + ".txt")))
        return {"image": Path(self.path, name).read_bytes(), "captions": captions, "key": mend(name)}

    def _captions(self, file: Path) -> Captions:
        found = Captions()
        try:
            found += read_lines(file)
            found.missing = f"{mend(str(file))} is blank"
        except FileNotFoundError:
            found.missing = f"there is no {mend(str(file))}"
        except (DataError, OSError) as error:
            found.fault = mend(str(error))
        return found

    def key(self, i: int) -> str:
        return mend(os.path.join(self.path, self.names[i]))

    def notes(self, captions: bool) -> list[str]:
        note = self.about_captions if captions else self.about
        return [note] if note else []


def open_folder(path: str) -> FolderReader:
    """Find the images below a folder. Errors: `DataError` where there are none."""
    mounted(path)
    if not os.path.isdir(path):
        is_file = "this is a file; name the folder that holds it"
        raise DataError(f"{path}: {is_file if os.path.exists(path) else 'there is no such folder'}")
    endings = image_endings()
    names, captions, others = [], {}, []
    for file in walk(path):
        end = ending(file)
        if end in endings:
            names.append(file)
        elif end == ".txt" and (file.endswith(".txt") or file[:-4] not in captions):
            captions[file[:-4]] = file
        elif end != ".txt":
            others.append(file)
    if not names:
        usual = ".jpg, .png, .webp, ..."
        raise DataError(
            f"{path}: the folder holds no image ({usual}); "
            + (f"it holds {kinds(others)}" if others else "it is empty")
        )
    names.sort()
    stems = {name: os.path.splitext(name)[0] for name in names}
    odd = {n: captions[s] for n, s in stems.items() if s in captions and not captions[s].endswith(".txt")}
    about = f"{path}: files of other kinds are not read: {kinds(others)}" if others else ""
    return FolderReader(path, names, odd, mend(about), mend(_missing(path, stems, captions, others)))


def _missing(path: str, stems: Mapping[str, str], captions: Mapping[str, str], others: Sequence[str]) -> str:
    """How many images have no caption file, where such files are looked for, and which files are there instead."""
    missing = [name for name, stem in stems.items() if stem not in captions]
    if not missing:
        return ""
    wanted = {*missing, *(stems[name] for name in missing)}  # a.png.json as well as a.json
    listed = [file for file in others if os.path.splitext(file)[0] in wanted or os.path.basename(file) in LISTS]
    instead = listed + [file for stem, file in captions.items() if stem in wanted]
    return (
        f"{path}: {len(missing)} of {len(stems)} images have no caption file ({some(missing)}); captions are looked "
        "for in a .txt file of the same name in the same folder, one a line"
        + (f"; not read are {kinds(instead)}" if instead else "")
    )
