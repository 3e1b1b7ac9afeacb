"""Reads a folder of images whose captions are in files of the same names, in tables, or in the names of folders.

Where a caption is, its kind says: "txt" and "caption" are files of that ending (`a.txt` of `a.png`), one caption a
line, "json:FIELD" is a field of a JSON file (`a.json` or `a.png.json`), "metadata:COLUMN" a column of `metadata.jsonl`
or `metadata.csv`, as imagefolder of the Hugging Face Hub has them, in the image's folder or one above it, and
"folder:TEMPLATE" the name of the folder, in the place of {} of the template.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2i_jax.core.errors import DataError
from t2i_jax.core.outputs import MAKER
from t2i_jax.core.text import decode_text, mend, read_lines, split_lines
from t2i_jax.data.files import ending, mounted, some, walk
from t2i_jax.data.files import kinds as kinds_of
from t2i_jax.data.images import image_endings
from t2i_jax.data.records import Captions, Record, as_captions, check_weights, join_captions, words_of

LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files of other programs with the captions of a folder."""
TABLES = LISTS[:2]
"""Those that are read."""
NAMES = ("file_name", "filename", "file", "image", "image_path", "path")
"""Columns of a table that may name the image, the first that is there."""
KINDS = ("txt", "caption", "json", "metadata", "folder")
Row = Mapping[str, object]


def check_kinds(kinds: Sequence[str], weights: Sequence[float]) -> None:
    """Errors: `DataError` for kinds of captions that there are not, and for weights that do not belong to them."""
    if not kinds:
        raise DataError("Folder.captions is empty; it names kinds, of which 'txt' is the usual one")
    for kind in kinds:
        name, colon, rest = kind.partition(":")
        if name not in KINDS or (name in ("json", "metadata") and not rest) or (name in ("txt", "caption") and colon):
            known = "'txt', 'caption', 'json:FIELD', 'metadata:COLUMN' and 'folder:TEMPLATE'"
            raise DataError(f"Folder.captions has '{kind}'; the kinds are {known}")
    check_weights(weights, kinds, "Folder.weights")


def read_table(path: Path) -> dict[str, Row]:
    """The rows of a `metadata.jsonl` or `metadata.csv` by the image that they are of, relative to its folder.

    Errors: `DataError` that names the file, and the line that is no row.
    """
    found: dict[str, Row] = {}
    try:
        text = decode_text(path.read_bytes())
        for line, row in _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text):
            name = next((row[n] for n in NAMES if row.get(n)), None)
            if not isinstance(name, str):
                raise DataError(f"line {line} names no image; a row has one of {', '.join(NAMES)}")
            found[os.path.normpath(name.replace("\\", "/"))] = row
    except (DataError, OSError, csv.Error) as error:
        raise DataError(f"{mend(str(path))}: {error}") from error
    return found


def _csv_rows(text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, {str(k).strip(): v for k, v in row.items()}


def _json_rows(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            yield number, _object(line, f"line {number} is")


def _object(text: str, what: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} no JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{what} no JSON object, but a {type(row).__name__}")
    return row


@dataclass
class FolderReader:
    """Images below `path` by their names relative to it."""

    path: str
    names: Sequence[str]
    texts: Mapping[str, str]
    """the caption files that are not called as usual, .TXT, by the image"""
    about: str
    about_captions: str
    kinds: Sequence[str] = ("txt",)
    weights: Sequence[float] = ()
    """probabilities of the kinds, in any unit"""
    tables: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    """rows of tables by folder"""
    labels: Mapping[str, int] = field(default_factory=dict)
    """classes by the folder right below `path`; empty where there are none"""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        record: Record = {"image": Path(self.path, name).read_bytes(), "key": mend(name)}
        if (folder := name.partition("/")[0]) in self.labels:
            record["label"] = self.labels[folder]
        return record | self.captions(name)

    def captions(self, name: str) -> Record:
        """The captions of an image, of all kinds in turn, and where the kinds have weights the weight of each."""
        return join_captions([self._of_kind(name, kind) for kind in self.kinds], self.weights)

    def _of_kind(self, name: str, kind: str) -> Captions:
        """The captions of one kind."""
        stem = os.path.splitext(name)[0]
        kind, _, rest = kind.partition(":")
        if kind in ("txt", "caption"):
            usual = stem + f".{kind}"
            return _of_lines(Path(self.path, self.texts.get(name, usual) if kind == "txt" else usual))
        if kind == "folder":
            words = os.path.basename(os.path.dirname(name)).replace("_", " ").replace("-", " ")
            return as_captions(mend((rest or "{}").replace("{}", words)) if words else None, "it is in no folder")
        try:
            row = self._row(name) if kind == "metadata" else self._json(name, stem)
        except FileNotFoundError:
            return as_captions(None, f"there is no {mend(str(Path(self.path, stem)))}.json")
        except (DataError, OSError) as error:
            captions = Captions()
            captions.fault = mend(str(error))
            return captions
        what = "no row of a table is of it" if kind == "metadata" and not row else f"'{rest}' is not given for it"
        return as_captions(words_of(row, rest), what)

    def _json(self, name: str, stem: str) -> Row:
        """The object of the JSON file of an image."""
        whole = Path(self.path, name + ".json")
        file = whole if whole.exists() else Path(self.path, stem + ".json")
        return _object(decode_text(file.read_bytes()), f"{mend(str(file))} is")

    def _row(self, name: str) -> Row:
        """The row of an image in the table of its folder, or the nearest one above it."""
        folder = os.path.dirname(name)
        while True:
            rows = self.tables.get(folder, {})
            if (row := rows.get(os.path.relpath(name, folder or "."))) is not None:
                return row
            if not folder:
                return {}
            folder = os.path.dirname(folder)

    def key(self, i: int) -> str:
        return mend(os.path.join(self.path, self.names[i]))

    def notes(self, captions: bool) -> list[str]:
        note = self.about_captions if captions else self.about
        return [note] if note else []


def _of_lines(file: Path) -> Captions:
    found = Captions()
    try:
        found += read_lines(file)
        found.missing = f"{mend(str(file))} is blank"
    except FileNotFoundError:
        found.missing = f"there is no {mend(str(file))}"
    except (DataError, OSError) as error:
        found.fault = mend(str(error))
    return found


def open_folder(
    path: str, kinds: Sequence[str] = ("txt",), weights: Sequence[float] = (), classes: bool = False
) -> FolderReader:
    """Find the images below a folder; classes: number the folders right below it.

    Errors: `DataError` where there are none, and for kinds that there are not and tables that cannot be read.
    """
    mounted(path)
    check_kinds(kinds, weights)
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
            + (f"it holds {kinds_of(others)}" if others else "it is empty")
        )
    names.sort()
    wanted = any(kind.startswith("metadata:") for kind in kinds)
    listed = [file for file in others if wanted and os.path.basename(file) in TABLES]
    tables: dict[str, dict[str, Row]] = {}
    for file in sorted(listed):
        tables.setdefault(os.path.dirname(file), {}).update(read_table(Path(path, file)))
    # What `t2i sample` wrote has sheets of several images, too, which are no examples.
    drawn = {at for at, rows in tables.items() if rows and all(r.get("made_by") == MAKER for r in rows.values())}
    names = [n for n in names if os.path.dirname(n) not in drawn or os.path.basename(n) in tables[os.path.dirname(n)]]
    stems = {name: os.path.splitext(name)[0] for name in names}
    odd = {n: captions[s] for n, s in stems.items() if s in captions and not captions[s].endswith(".txt")}
    if wanted and not listed:
        raise DataError(f"{path}: Folder.captions wants a table, and there is no {' and no '.join(TABLES)}")
    read = {f".{kind.partition(':')[0]}" for kind in kinds}
    rest = [file for file in others if ending(file) not in read and file not in listed]
    about = f"{path}: files of other kinds are not read: {kinds_of(rest)}" if rest else ""
    plain = tuple(kinds) == ("txt",)
    said = _missing(path, stems, captions, others) if plain else ""
    folders = sorted({name.partition("/")[0] for name in names if "/" in name}) if classes else []
    numbers = {folder: n for n, folder in enumerate(folders)}
    return FolderReader(path, names, odd, mend(about), mend(said), kinds, weights, tables, numbers)


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
        + (f"; not read are {kinds_of(instead)}" if instead else "")
    )
