"""Where records come from. A source is a small config; `open()` gives random access to its records.

A record is a dictionary with "image" (the bytes of an image file, or an array (i, j) or (i, j, c)), "captions" (a list
of clean strings, maybe empty), "key" (a string that names it in a log) and whatever else the source has: "label",
"license", "style", or arrays computed beforehand ("codes", "latents", "features").
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from t2i_jax.core.config import read_json
from t2i_jax.core.sniff import sniff_file
from t2i_jax.core.text import decode_text
from t2i_jax.data.files import Files, files_of, most_files, mounted
from t2i_jax.data.folder import open_folder
from t2i_jax.data.order import Parts
from t2i_jax.data.parquet import ParquetReader
from t2i_jax.data.records import (
    INDEX,
    WEIGHTS,
    DataError,
    Reader,
    Record,
    as_captions,
    check_weights,
    clean_captions,
    decode,
    shard_name,
)
from t2i_jax.data.tar import TarReader

FEATURES = "features.json"
"""Describes the records of a data set that tfds prepared."""


@dataclass(frozen=True)
class Folder:
    """Images below a folder, each with its captions in a `.txt` file of the same name, one caption a line, or where
    `captions` says."""

    path: str
    """The folder; its subfolders are searched too, linked ones included. Names that begin with a dot are not."""
    captions: tuple[str, ...] = ("txt",)
    """Kinds of captions: "txt" and "caption" (files of these endings, one caption a line), "json:FIELD" (of a JSON file
    of the same name), "metadata:COLUMN" (of a `metadata.jsonl` or `.csv`), "folder:TEMPLATE" (a photo of a {})."""
    weights: tuple[float, ...] = ()
    """How often each kind is drawn, in any unit, where an image has several; () is equally often."""
    classes: bool = False
    """Number the folders right below `path`, in the order of their names: the class of an image is the number of its
    folder."""

    def open(self) -> Reader:
        return open_folder(self.path, self.captions, self.weights, self.classes)


@dataclass(frozen=True)
class ArrayRecord:
    """A data set written by this library: `t2i data build`, `t2i encode` or `write_records`."""

    path: str
    """The folder that holds `index.json`, or a data set prepared by tfds with features named as in a record."""
    split: str = "train"
    """Which part of it; several are joined by "+", as in "train+val"."""
    every: int = 1
    """Only every n-th record of each part, for trials on less."""

    def open(self) -> Reader:
        if self.every < 1:
            raise DataError(f"ArrayRecord.every is {self.every}; 1 takes all records")
        reader = self._whole()
        return reader if self.every == 1 else Strided(reader, self.every)

    def _whole(self) -> Reader:
        mounted(self.path)
        index, features = Path(self.path, INDEX), Path(self.path, FEATURES)
        if features.exists():
            try:
                fields = tuple(read_json(features)["featuresDict"]["features"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{features}: does not describe the records of a data set: {error}") from error
            return Tfds(self.path, self.split, captions="captions", label="label", fields=fields).open()
        if not index.exists():
            raise DataError(f"{self.path}: this folder has no {INDEX}: no data set was written here")
        try:
            splits = read_json(index)["splits"]
            if not isinstance(splits, dict) or not all(isinstance(about, dict) for about in splits.values()):
                raise ValueError("its splits are no objects")
            shards = {split: (int(about["shards"]), about.get("order")) for split, about in splits.items()}
        except (ValueError, KeyError, TypeError) as error:
            kind = sniff_file(index)
            raise DataError(f"{index}: this is no index of a data set; it is {kind or 'damaged'}") from error
        readers = []
        for split in self.split.split("+"):
            if split not in shards:
                raise DataError(f"{self.path}: there is no split '{split}'; it has {', '.join(shards)}")
            count, order = shards[split]
            files = [Path(self.path, shard_name(split, i, count)) for i in range(count)]
            counts = _counts(files)
            records = ArrayRecords([(str(f), 0, n) for f, n in zip(files, counts, strict=True)])
            # Files of blocks follow each other; else records were dealt to them in turn.
            readers.append(_Interleaved(records, 1 if order == "blocks" else count))
        return readers[0] if len(readers) == 1 else Concat(readers)


class RecordFile(Protocol):
    """A reader of `array_record`, which has no types."""

    def num_records(self) -> int: ...
    def read(self, numbers: Sequence[int]) -> Sequence[bytes]: ...
    def close(self) -> None: ...


def _open_records(path: str) -> RecordFile:
    from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportMissingImports]

    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)


def _counts(files: Sequence[Path]) -> list[int]:
    """How many records each file of a data set holds. Errors: `DataError` for one that is missing or not whole."""
    for file in files:
        if not file.exists():
            raise DataError(f"{file}: the file is missing, though the data set counts it")
    with ThreadPoolExecutor(most_files(16)) as pool:
        return list(pool.map(_count, files))


def _count(path: Path) -> int:
    """How many records a file holds. Errors: `DataError` where it is none of ArrayRecord."""
    try:
        reader = _open_records(str(path))
        count = reader.num_records()
        reader.close()
        return count
    except (RuntimeError, ValueError, OSError) as error:
        kind = sniff_file(path)
        raise DataError(f"{path}: this is no whole ArrayRecord file ({f'it is {kind}' if kind else error})") from error


class ArrayRecords(Parts):
    """The bytes of records in parts of ArrayRecord files: (path, first record, records) of each."""

    def __init__(self, parts: Sequence[tuple[str, int, int]]):
        super().__init__(count for _, _, count in parts)
        self.parts = list(parts)
        self.files: Files[str, RecordFile] = Files(_open_records)

    def place(self, i: int) -> tuple[str, int]:
        """The file of a record, and its number there."""
        part, number = self.part(i)
        path, first, _ = self.parts[part]
        return path, first + number

    def __getitem__(self, i: int) -> bytes:
        path, number = self.place(i)
        return self.files[path].read([number])[0]


@dataclass
class _Interleaved(Reader):
    """Records that were dealt to shards in turn, in the order in which they were written."""

    reader: ArrayRecords
    shards: int

    def __len__(self) -> int:
        return len(self.reader)

    def _stored(self, i: int) -> int:
        row, shard = divmod(i, self.shards)
        full, rest = divmod(len(self), self.shards)
        return shard * full + min(shard, rest) + row

    def key(self, i: int) -> str:
        path, number = self.reader.place(self._stored(i))
        return f"{path}:{number}"

    def __getitem__(self, i: int) -> Record:
        record = decode(self.reader[self._stored(i)])
        if "captions" in record:
            stored = record["captions"]
            # Stored features have a row for each caption, a blank one included.
            record["captions"] = clean_captions(stored) if "features" in record else as_captions(stored)
        return record


@dataclass(frozen=True)
class TarShards:
    """webdataset tar files as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` of each sample.

    A key ends at the first dot of a name, or at the last where what follows the first is no ending that is known.
    Each tar file is scanned once, by several processes, and the offsets of its members are kept: in the folder
    `.t2i-index` of the shards, in the user's cache if that folder cannot be written, else in memory. `t2i data index`
    does it beforehand.
    """

    path: str
    """A tar file, a folder of them, or a glob such as "shards/000*.tar"."""
    caption: str = "txt"
    """"txt" for the .txt member (the whole of it is one caption), else the name of a field of the .json member; several
    are joined by "+", as in "txt+alt_text"."""
    fields: tuple[str, ...] = ()
    """Fields of the .json member to take over into the record."""
    weights: tuple[float, ...] = ()
    """How often each of several is drawn, in any unit, where an image has them; () is equally often."""
    truncated: str = "error"
    """A tar that is cut short: "error" stops, "skip" goes on with the samples before the cut and logs the loss."""

    def open(self) -> Reader:
        if self.truncated not in ("error", "skip"):
            raise DataError(f"TarShards.truncated is '{self.truncated}'; it must be 'error' or 'skip'")
        check_weights(self.weights, self.caption.split("+"), "TarShards.weights")
        tars, skip = files_of(self.path, ".tar"), self.truncated == "skip"
        return TarReader(tars, self.caption, self.fields, skip, self.weights)


@dataclass(frozen=True)
class Parquet:
    """Parquet files with a column of image files (binary, or a struct with the field "bytes").

    One access reads a whole row group, so for training write them with some ten rows a group, or copy the source once
    with `write_records(out, Parquet(path).open())`.
    """

    path: str
    """A parquet file, a folder of them (or one whose folder `data` holds those of one split), or a glob."""
    image: str = "image"
    """The column of images."""
    captions: str | None = "caption"
    """The column of captions, a string or a list of strings; `None` where there is none. Several are joined by "+"."""
    key: str | None = None
    """The column that names a record; without one it is named by file and row."""
    fields: tuple[str, ...] = ()
    """More columns to take over into the record, for instance "label"."""
    cache: int = 16
    """How many row groups a process keeps in memory."""
    weights: tuple[float, ...] = ()
    """How often each of several columns of captions is drawn, in any unit; () is equally often."""

    def open(self) -> Reader:
        check_weights(self.weights, (self.captions or "").split("+"), "Parquet.weights")
        if self.cache < 1:
            raise DataError(f"Parquet.cache is {self.cache}; it is at least 1")
        return ParquetReader(self)


@dataclass(frozen=True)
class Tfds:
    """A TensorFlow Datasets data set prepared with `file_format="array_record"`; read without TensorFlow."""

    name: str
    """Name of the data set ("coco_captions/2014"), or the folder of a prepared version."""
    split: str = "train"
    """A split as tfds writes it: "train", "train[:90%]", "train+validation"."""
    data_dir: str | None = None
    """Folder of the prepared data sets; `None` is tfds's default."""
    image: str = "image"
    """The feature with the image."""
    captions: str | None = "caption"
    """The feature with the captions, inner ones after a slash ("captions/text"); `None` names the label instead."""
    template: str = "a photo of a {}"
    """The caption of a label, when there are no captions."""
    label: str | None = None
    """The feature with the class number."""
    fields: tuple[str, ...] = ()
    """More features to take over into the record, for instance "style"."""

    def open(self) -> Reader:
        import tensorflow_datasets as tfds

        builder: Any  # tfds's decorators hide the signatures
        if os.path.isdir(self.name):
            try:
                builder = tfds.builder_from_directory(self.name)
            except Exception as error:  # of tfds, protobuf or JSON, where a file is damaged
                raise DataError(f"{self.name}: tfds cannot read this folder: {str(error).splitlines()[0]}") from error
        else:
            builder = tfds.builder(self.name, data_dir=self.data_dir)
        features = builder.info.features
        wanted = [("image", self.image), ("captions", self.captions), ("label", self.label)]
        for field, feature in wanted + [("fields", name) for name in self.fields]:
            if feature and feature.split("/")[0] not in features:
                raise DataError(
                    f"{self.name}: Tfds.{field} is '{feature}'; the features are {', '.join(sorted(features))}"
                )
        if self.captions is None and self.label is None:
            raise DataError(f"{self.name}: Tfds needs `captions` or `label` to say what an image shows")
        label = features[self.label] if self.label else None
        names = label.names if isinstance(label, tfds.features.ClassLabel) else None
        # The pipeline decodes images itself, so they stay bytes here.
        decoders = {self.image: tfds.decode.SkipDecoding()}
        try:
            parts = builder.info.splits[self.split].file_instructions
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            raise DataError(f"{self.name}: there is no split '{self.split}'; it has {splits}") from error
        reader = builder.as_data_source(split=self.split, decoders=decoders)
        if builder.info.file_format.value == "array_record":  # its own reader keeps every shard open
            _counts([Path(part.filename) for part in parts])
            reader.data_source = ArrayRecords([(str(p.filename), p.skip, p.take) for p in parts])
        texts = tuple(name for name in self.fields if isinstance(features[name], tfds.features.Text))
        return _TfdsReader(self, reader, tuple(names or ()), texts)


@dataclass
class _TfdsReader(Reader):
    config: Tfds
    reader: Sequence[Record]
    names: Sequence[str]
    texts: Sequence[str]
    """which of the fields are strings; tfds gives them as bytes"""

    def __len__(self) -> int:
        return len(self.reader)

    def key(self, i: int) -> str:
        return f"{self.config.name}:{self.config.split}:{i}"

    def __getitem__(self, i: int) -> Record:
        config, example = self.config, self.reader[i]
        record: Record = {"key": self.key(i)} | {name: example[name] for name in config.fields}
        record |= {name: decode_text(record[name]) for name in self.texts} | {"image": example[config.image]}
        if config.label:
            record["label"] = int(example[config.label])
        if config.captions:
            value: Any = example
            for part in config.captions.split("/"):
                value = [v[part] for v in value] if isinstance(value, list) else value[part]
            record["captions"] = as_captions(value)
        elif self.names and not 0 <= record["label"] < len(self.names):
            record["captions"] = as_captions(None, f"the label {record['label']} has no name")
        else:
            name = self.names[record["label"]] if self.names else str(record["label"])
            record["captions"] = as_captions(config.template.format(name.replace("_", " ")))
        return record


Single = Folder | ArrayRecord | TarShards | Parquet | Tfds


@dataclass(frozen=True)
class Mixture:
    """Several sources, each shuffled and repeated on its own, drawn from in fixed proportions."""

    sources: tuple[Single, ...]
    """The sources."""
    weights: tuple[float, ...] | None = None
    """Their shares of the examples, in any unit; `None` is in proportion to their sizes."""

    def open(self) -> Concat:
        if not self.sources:
            raise DataError("Mixture.sources is empty")
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise DataError(f"Mixture has {len(self.sources)} sources and {len(self.weights)} weights")
        if self.weights is not None and not all(w > 0 for w in self.weights):
            raise DataError(f"Mixture.weights are {self.weights}; they must be positive")
        return Concat([source.open() for source in self.sources])


Source = Single | Mixture


class Strided:
    """Every n-th record of a reader, from the first."""

    def __init__(self, reader: Reader, every: int):
        self.reader, self.every = reader, every

    def key(self, i: int) -> str:
        return self.reader.key(i * self.every)

    def notes(self, captions: bool) -> list[str]:
        return self.reader.notes(captions)

    def __len__(self) -> int:
        return -(-len(self.reader) // self.every)

    def __getitem__(self, i: int) -> Record:
        return self.reader[i * self.every]


OF_CAPTIONS = ("captions", WEIGHTS, "features", "text_mask")
"""What a record says of its image in words, and what was computed from the words."""


class Swapped:
    """Records with the captions of other records, the same ones whenever they are read."""

    def __init__(self, reader: Reader, seed: int):
        self.reader = reader
        order = np.random.default_rng(seed).permutation(len(reader))
        self.other = np.empty_like(order)
        self.other[order] = np.roll(order, 1)  # one cycle: no record keeps its own

    def key(self, i: int) -> str:
        return self.reader.key(i)

    def notes(self, captions: bool) -> list[str]:
        return self.reader.notes(captions)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        other = self.reader[int(self.other[i])]
        kept = {name: value for name, value in self.reader[i].items() if name not in OF_CAPTIONS}
        return kept | {name: other[name] for name in OF_CAPTIONS if name in other}


class Concat(Parts):
    """Readers in turn, one after the other."""

    def __init__(self, readers: Sequence[Reader]):
        super().__init__(map(len, readers))
        self.readers = readers

    def key(self, i: int) -> str:
        part, row = self.part(i)
        return self.readers[part].key(row)

    def notes(self, captions: bool) -> list[str]:
        return [note for reader in self.readers for note in reader.notes(captions)]

    def __getitem__(self, i: int) -> Record:
        part, row = self.part(i)
        return self.readers[part][row]
