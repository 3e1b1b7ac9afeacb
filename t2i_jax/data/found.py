"""What a folder, files or a name hold, as a source: which kinds of files there are, and where their captions are."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_jax.core.errors import DataError
from t2i_jax.core.sniff import sniff_file
from t2i_jax.core.text import decode_text, mend
from t2i_jax.data.files import contents, ending, files_of, mounted, some, walk
from t2i_jax.data.folder import TABLES, read_table
from t2i_jax.data.images import image_endings
from t2i_jax.data.parquet import image_columns, parquet_files, schema_of
from t2i_jax.data.records import INDEX, words_of
from t2i_jax.data.sources import FEATURES, ArrayRecord, Folder, Mixture, Parquet, Single, Source, TarShards, Tfds
from t2i_jax.data.tar import TarReader

WORDS = ("caption", "captions", "text", "texts", "prompt", "prompts", "description", "sentence", "sentences")
"""Usual names of captions, the best ones first."""
PARTS = ("caption", "prompt", "description", "sentence", "text", "alt", "title", "tags")
"""What is in other names of captions."""
NOT_WORDS = ("url", "path", "file", "key", "id", "sha", "hash", "width", "height", "license", "author", "status")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
LOOKED_AT = 64
"""Records that are looked at for the names of fields."""


@dataclass(frozen=True)
class FoundSource:
    """A source, and what it was taken for."""

    source: Source
    about: tuple[str, ...]
    """sentences on what was chosen"""
    classes: tuple[str, ...] = ()
    """names of classes, where images have numbers of them"""


def find_source(data: str, captions: bool = True) -> FoundSource:
    """The source that a path, a glob, an address or a name of a data set means. captions: False looks for classes by
    folders where pictures have captions, too.

    A folder may hold pictures at any depth, tar files, parquet files, a data set of this library or of tfds; several of
    these at once are mixed. Errors: `DataError` that says what is there instead.
    """
    mounted(data)
    if not data:
        raise DataError("the name of the data is empty; it is a folder, files, or a data set of tfds")
    if not os.path.lexists(data):
        return _elsewhere(data)
    if not os.path.isdir(data):
        return _file(data)
    if os.path.exists(os.path.join(data, INDEX)) or os.path.exists(os.path.join(data, FEATURES)):
        return _prepared(data)
    images, tars, parquets, others = [], [], [], []
    for name in walk(data):
        end = ending(name)
        kind = (
            images if end in image_endings() else tars if end == ".tar" else parquets if end == ".parquet" else others
        )
        kind.append(name)
    prepared = {os.path.dirname(name) for name in others if os.path.basename(name) in (INDEX, FEATURES)}
    if prepared and not images and not tars and not parquets:
        return _joined([_prepared(os.path.join(data, folder)) for folder in sorted(prepared)])
    parquets = [name for name in parquets if os.path.basename(name) not in ("metadata.parquet",)]
    found = [_folder(data, images, others, captions)] if images else []
    found += [_tars(os.path.join(data, folder)) for folder in sorted({os.path.dirname(name) for name in tars})]
    found += _parquets(data, parquets)
    if not found:
        packed = [name for name in others if ending(name) in (".zip", ".tar.gz", ".tgz", ".7z", ".rar", ".tar.bz2")]
        hint = f"; unpack {mend(packed[0])} first" if packed else ""
        raise DataError(f"{data}: no pictures, tar files or parquet files in it; {contents(data)}{hint}")
    return _joined(found)


def _joined(found: Sequence[FoundSource]) -> FoundSource:
    if len(found) == 1:
        return found[0]
    sources: list[Single] = []
    for one in found:
        sources += list(one.source.sources) if isinstance(one.source, Mixture) else [one.source]
    # Numbers of classes of several sources do not mean the same.
    sources = [replace(s, classes=False) if isinstance(s, Folder) else s for s in sources]
    return FoundSource(Mixture(tuple(sources)), tuple(line for one in found for line in one.about))


def _elsewhere(data: str) -> FoundSource:
    """What a glob or the name of a tfds data set means."""
    if any(mark in data for mark in "*?["):
        files = files_of(data, "")
        endings = {ending(file.name) for file in files}
        if endings == {".tar"}:
            return _tars(data)
        if endings == {".parquet"}:
            return FoundSource(*_parquet(data))
        raise DataError(f"{data}: a glob names tar files or parquet files; these are {', '.join(sorted(endings))}")
    if os.sep in data.partition("/")[0] or data.startswith((".", "/", "~")) or "\0" in data:
        raise DataError(f"{data!r}: there is no such file or folder")
    return _tfds(data)


def _file(data: str) -> FoundSource:
    end = ending(data)
    if end == ".tar":
        return _tars(data)
    if end == ".parquet":
        return FoundSource(*_parquet(data))
    if os.path.basename(data) in TABLES:
        return find_source(os.path.dirname(data) or ".")
    kind = sniff_file(Path(data))
    hint = "; unpack it first" if "zip" in kind or end in (".gz", ".tgz", ".zip", ".tar.gz") else ""
    raise DataError(
        f"{data}: it is {kind or 'of no known kind'}{hint}; a folder, tar files, parquet files or the name of a tfds "
        "data set are read"
    )


def _prepared(folder: str) -> FoundSource:
    """A data set that this library or tfds has written."""
    source = ArrayRecord(folder)
    if os.path.exists(os.path.join(folder, FEATURES)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # tfds says what is wrong
            features = json.loads(Path(folder, FEATURES).read_text("utf-8"))["featuresDict"]["features"]
            if {"image", "captions", "key"} <= set(features):
                return FoundSource(source, (f"{folder}: a data set of this library, split '{source.split}'",))
        return _tfds(folder)
    if "train" not in (splits := _splits(folder)) and splits:
        source = replace(source, split="+".join(splits))
    return FoundSource(source, (f"{folder}: a data set of this library, split '{source.split}'",))


def _splits(folder: str) -> list[str]:
    try:
        return list(json.loads(Path(folder, INDEX).read_text("utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # opening it says what is wrong


# -- folders


def _folder(data: str, images: Sequence[str], others: Sequence[str], captions: bool) -> FoundSource:
    """Images below a folder, and where their captions are."""
    files = set(others)
    stems = {os.path.splitext(name)[0]: name for name in images}
    having = lambda end: sum(stem + end in files or stem + end.upper() in files for stem in stems)
    kinds = [end[1:] for end in (".txt", ".caption") if having(end)]
    named = [n for stem, name in stems.items() for n in (name + ".json", stem + ".json") if n in files]
    kinds += [f"json:{field}" for field in caption_fields(_objects(data, named))]
    tables = [name for name in others if os.path.basename(name) in TABLES]
    rows = [row for table in tables for row in list(read_table(Path(data, table)).values())[:LOOKED_AT]]
    kinds += [f"metadata:{field}" for field in caption_fields(rows)]
    unread = [name for name in others if os.path.basename(name) == "metadata.parquet"]
    about = [f"{mend(data)}: a folder of {len(images)} pictures"]
    alone = [name for name in others if ending(name) in (".txt", ".caption") and os.path.splitext(name)[0] not in stems]
    about += [f"{len(alone)} text files are of no picture ({some(alone)})"] if alone else []
    about += [f"{mend(data)}: {mend(unread[0])} is not read; a metadata.jsonl is"] if unread else []
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if "train" in tops and tops <= set(SPLITS):
        found = find_source(os.path.join(data, "train"), captions)
        return replace(found, about=(*found.about, f"of the splits {', '.join(sorted(tops))}, train is taken"))
    if kinds and captions:
        about.append(f"captions are those of {', '.join(kinds)}" + (", equally often" if len(kinds) > 1 else ""))
        return FoundSource(Folder(data, tuple(kinds), (1.0,) * len(kinds) if len(kinds) > 1 else ()), tuple(about))
    if len(tops) == 1 and "" not in tops:  # the classes may be one folder deeper
        return find_source(os.path.join(data, *tops), captions)
    classes = tuple(sorted(map(mend, tops)))
    if "" not in tops and 2 * len(tops) <= len(images):
        about.append(f"{len(classes)} classes by the folders {some(classes)}")
        return FoundSource(Folder(data, classes=True), tuple(about), classes)
    return FoundSource(Folder(data), (*about, "no captions, and no classes by folders"))


def _objects(data: str, names: Sequence[str]) -> list[Mapping[str, object]]:
    found = []
    for name in names[:LOOKED_AT]:
        try:
            value = json.loads(decode_text(Path(data, name).read_bytes()))
        except (OSError, ValueError, RecursionError):
            continue  # its record says what is wrong
        found += [value] if isinstance(value, dict) else []
    return found


def caption_fields(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """The fields of rows that hold captions, by their names and values, the most usual names first."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(str(name) for name, value in row.items() if _is_text(value) and _is_name(str(name)))
    order = lambda name: (WORDS.index(name.lower()) if name.lower() in WORDS else len(WORDS), -counts[name], name)
    return sorted(counts, key=order)


def _is_name(name: str) -> bool:
    words = name.lower().replace("-", "_").split("_")
    return name.lower() in WORDS or (
        any(part in name.lower() for part in PARTS) and not any(w in NOT_WORDS for w in words)
    )


def _is_text(value: object) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(text, str) and text.strip() for text in several)


# -- tar files


def _tars(path: str) -> FoundSource:
    """webdataset tar files, and where their captions are."""
    reader = TarReader(files_of(path, ".tar"), "txt", (), True)
    places = range(0, len(reader), max(1, len(reader) // LOOKED_AT))
    source = TarShards(path, truncated="skip")
    records = [reader[i] for i in places]
    labels = [record["label"] for record in records if "label" in record]
    about = [f"{mend(path)}: tar files of {len(reader)} samples"]
    objects = []
    for i in places:
        try:
            objects.append(reader.about(i))
        except DataError:
            continue  # its record says what is wrong
    texts = {caption for record in records for caption in record["captions"]}
    # What img2dataset writes twice, as text and as a field, is one kind.
    fields = [f for f in caption_fields(objects) if any(words_of(row, f) not in (None, *texts) for row in objects)]
    if kinds := ["txt"] * bool(texts) + fields:
        about.append(f"captions are those of {', '.join(kinds)}" + (", equally often" if len(kinds) > 1 else ""))
        return FoundSource(replace(source, caption="+".join(kinds)), tuple(about))
    if labels and all(isinstance(label, int) for label in labels):
        most = max(record["label"] for i in range(len(reader)) if isinstance((record := reader[i]).get("label"), int))
        names = tuple(map(str, range(most + 1)))
        return FoundSource(source, (*about, f"no captions; {most + 1} classes by the .cls members"), names)
    return FoundSource(source, (*about, "no captions"))


# -- parquet


def _parquets(data: str, names: Sequence[str]) -> list[FoundSource]:
    """The parquet files below a folder; of a copy of a repository of the hub the training split."""
    if not names:
        return []
    folders = sorted({os.path.dirname(name) for name in names})
    if any(os.path.basename(folder) == "train" for folder in folders):
        folders = [folder for folder in folders if os.path.basename(folder) not in SPLITS[1:]]
    found = []
    for folder in folders:
        here = [os.path.basename(name) for name in names if os.path.dirname(name) == folder]
        splits = Counter(name.partition("-")[0] for name in here)
        at = os.path.join(data, folder) if folder else data
        if len(splits) > 1 and "train" in splits:
            found.append(FoundSource(*_parquet(os.path.join(at, "train-*.parquet"))))
        else:
            found.append(FoundSource(*_parquet(at)))
    return found


def _parquet(path: str) -> tuple[Source, tuple[str, ...], tuple[str, ...]]:
    """Parquet files with their columns of images and captions, or classes."""
    file = parquet_files(path)[0]
    schema = schema_of(file)
    images = image_columns(schema)
    if not images:
        raise DataError(f"{file}: no column of images; its columns are {', '.join(schema.names)}")
    texts = [name for name in schema.names if _is_name(name) and _holds_text(schema.field(name).type)]
    order = lambda name: WORDS.index(name.lower()) if name.lower() in WORDS else len(WORDS)
    texts.sort(key=order)
    about = [f"{mend(path)}: parquet files; images are the column '{images[0]}'"]
    if texts:
        about.append(f"captions are those of {', '.join(texts)}" + (", equally often" if len(texts) > 1 else ""))
        return Parquet(path, images[0], "+".join(texts)), tuple(about), ()
    names = class_names(schema.metadata)
    if "label" in schema.names and str(schema.field("label").type).startswith(("int", "uint")):
        classes = names or _classes(path)
        source = Parquet(path, images[0], None, fields=("label",))
        return source, (*about, f"no captions; {len(classes)} classes by the column 'label'"), classes
    return Parquet(path, images[0], None), (*about, "no captions"), ()


def _classes(path: str) -> tuple[str, ...]:
    """The classes that the column 'label' numbers."""
    from pyarrow import parquet

    columns = (parquet.read_table(file, columns=["label"])["label"].to_pylist() for file in parquet_files(path))
    most = max((n for column in columns for n in column if n is not None), default=-1)
    return tuple(map(str, range(most + 1)))


def class_names(metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...]:
    """The names of the classes of 'label' that a data set of the hub keeps with its schema; () without them."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(map(str, names))
    except (KeyError, ValueError, TypeError):
        return ()


def _holds_text(kind: object) -> bool:
    return any(word in str(kind) for word in ("string", "utf8")) and not str(kind).startswith(("struct", "map"))


# -- tfds


def _tfds(name: str) -> FoundSource:
    """A data set of tfds, by its name or its folder, and its features of images and captions or classes."""
    import tensorflow_datasets as tfds

    builder: Any  # tfds's decorators hide the signatures
    try:
        builder = tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)
        features, splits = builder.info.features, list(builder.info.splits)
    except Exception as error:  # of tfds, whatever it is
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if os.path.isdir(name):
            raise DataError(f"{name}: tfds cannot read this folder: {first}") from error
        raise DataError(f"{name}: there is no such file or folder, and no data set of tfds is called so") from error
    if not splits:
        raise DataError(
            f"{name}: this data set of tfds is not prepared on this machine; "
            f"tfds.builder('{name}', file_format='array_record').download_and_prepare() does it"
        )
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    if not images:
        raise DataError(f"{name}: no feature of it is an image; there are {', '.join(sorted(features))}")
    image = "image" if "image" in images else images[0]
    split = "train" if "train" in splits else splits[0]
    about = (f"{name}: a data set of tfds, split '{split}'",)
    texts = [k for k, f in features.items() if _is_name(k) and _tfds_text(f)]
    texts.sort(key=lambda k: WORDS.index(k) if k in WORDS else len(WORDS))
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    if texts:
        path = texts[0] + ("/text" if "'text': Text(" in str(features[texts[0]]) else "")
        return FoundSource(Tfds(name, split, image=image, captions=path), (*about, f"captions are its '{path}'"))
    if labels:
        label = "label" if "label" in labels else labels[0]
        source = Tfds(name, split, image=image, captions=None, label=label)
        return FoundSource(source, (*about, f"captions are the names of its classes, '{label}'"))
    raise DataError(f"{name}: it has neither captions nor classes; there are {', '.join(sorted(features))}")


def _tfds_text(feature: object) -> bool:
    """Whether a feature of tfds is a text, several, or a sequence of dictionaries with one."""
    return "Text(" in str(feature) or "string" in str(feature)
