"""Where records come from. A source is a small config; `open()` gives random access to its records.

A record is a dictionary with "image" (the bytes of a picture file, or uint8 (i, j, c)), "captions" (a list of strings,
maybe empty), "key" (a string that names it in a log) and whatever else the source has: "label", "license", "style",
or arrays computed beforehand ("codes", "latents", "features"). What `open()` returns has `len()` and `[i]`, can be
read by many threads at once, and can be pickled: worker processes get a copy.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from t2i_jax.data.records import INDEX, DataError, Record, decode, shard_name
from t2i_jax.data.tar import TarReader

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class Reader(Protocol):
    """Random access to records."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Record: ...


def mounted(path: str) -> None:
    """Errors: `DataError` for the address of an object store, saying how its records can be read."""
    if "://" in path:
        raise DataError(
            f"{path}: records are read in any order from files; mount the bucket (gcsfuse for gs://, mount-s3 for "
            "s3://) and name the folder where it is mounted"
        )


def files_of(path: str, suffix: str) -> list[Path]:
    """The files that `path` means: a file, a folder of `*suffix`, or a glob. Errors: `DataError` if there are none."""
    mounted(path)
    found = sorted(glob(os.path.join(path, f"*{suffix}"))) if os.path.isdir(path) else sorted(glob(path))
    if not found:
        what = f"the folder holds no *{suffix} file" if os.path.isdir(path) else "there is no such file or folder"
        raise DataError(f"{path}: {what}")
    return [Path(f) for f in found]


@dataclass(frozen=True)
class Folder:
    """Pictures below a folder, each with its captions in a `.txt` file of the same name, one caption a line."""

    path: str
    """The folder; its subfolders are searched too."""

    def open(self) -> Reader:
        mounted(self.path)
        if not os.path.isdir(self.path):
            raise DataError(f"{self.path}: there is no such folder")
        names = sorted(
            os.path.relpath(os.path.join(at, name), self.path)
            for at, _, names in os.walk(self.path, followlinks=True)
            for name in names
            if name.lower().endswith(PICTURES)
        )
        if not names:
            raise DataError(f"{self.path}: the folder holds no picture ({', '.join(PICTURES)})")
        return _FolderReader(self.path, names)


@dataclass
class _FolderReader:
    path: str
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        file = Path(self.path, self.names[i])
        text = file.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
        captions = [line.strip() for line in lines if line.strip()]
        return {"image": file.read_bytes(), "captions": captions, "key": self.names[i]}


@dataclass(frozen=True)
class ArrayRecord:
    """A data set written by this library: `t2i data build`, `t2i encode` or `write_records`."""

    path: str
    """The folder that holds `index.json`."""
    split: str = "train"
    """Which part of it; several are joined by "+", as in "train+val"."""
    every: int = 1
    """Only every n-th record of each part, for trials on less."""

    def open(self) -> Reader:
        if self.every < 1:
            raise DataError(f"ArrayRecord.every is {self.every}; 1 takes all records")
        reader = self._whole()
        return reader if self.every == 1 else Thinned(reader, self.every)

    def _whole(self) -> Reader:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        mounted(self.path)
        index = Path(self.path, INDEX)
        if not index.exists():
            raise DataError(f"{self.path}: this folder has no {INDEX}: no data set was written here")
        splits = json.loads(index.read_text())["splits"]
        readers = []
        for split in self.split.split("+"):
            if split not in splits:
                raise DataError(f"{self.path}: there is no split '{split}'; it has {', '.join(splits)}")
            shards = splits[split]["shards"]
            files = [Path(self.path, shard_name(split, i, shards)) for i in range(shards)]
            for file in files:
                if not file.exists():
                    raise DataError(f"{file}: the file is missing, though {INDEX} counts it")
            # Files of blocks lie one behind the other; else records were dealt to them in turn.
            dealt = 1 if splits[split].get("order") == "blocks" else shards
            readers.append(_Dealt(ArrayRecordDataSource([str(f) for f in files]), dealt))
        return readers[0] if len(readers) == 1 else Joined(readers)


@dataclass
class _Dealt:
    """Records that were dealt to shards in turn, in the order in which they were written."""

    reader: Any
    shards: int

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        row, shard = divmod(i, self.shards)
        full, rest = divmod(len(self), self.shards)
        return decode(self.reader[shard * full + min(shard, rest) + row])


@dataclass(frozen=True)
class TarShards:
    """webdataset tar files as img2dataset writes them: `key.jpg`, `key.txt` and `key.json` one behind the other.

    Where the members lie is scanned once and kept beside the shards (in memory if that folder is read-only).
    """

    path: str
    """A tar file, a folder of them, or a glob such as "shards/000*.tar"."""
    caption: str = "txt"
    """"txt" for the .txt member (the whole of it is one caption), else the name of a field of the .json member."""
    fields: tuple[str, ...] = ()
    """Fields of the .json member to take over into the record."""
    truncated: str = "error"
    """A tar that is cut short: "error" stops, "skip" goes on with the samples before the cut and logs the loss."""

    def open(self) -> Reader:
        if self.truncated not in ("error", "skip"):
            raise DataError(f"TarShards.truncated is '{self.truncated}'; it must be 'error' or 'skip'")
        return TarReader(files_of(self.path, ".tar"), self.caption, self.fields, self.truncated == "skip")


@dataclass(frozen=True)
class Parquet:
    """Parquet files with a column of encoded pictures (binary, or a struct with the field "bytes").

    One access reads a whole row group, so for training write them with some ten rows a group, or copy the source once
    with `write_records(out, Parquet(path).open())`.
    """

    path: str
    """A parquet file, a folder of them, or a glob."""
    image: str = "image"
    """The column of pictures."""
    captions: str = "caption"
    """The column of captions: a string or a list of strings."""
    key: str | None = None
    """The column that names a record; without one it is named by file and row."""
    fields: tuple[str, ...] = ()
    """More columns to take over into the record, for instance "label"."""
    cache: int = 16
    """How many row groups a process keeps in memory."""

    def open(self) -> Reader:
        return _ParquetReader(self)


class _ParquetReader:
    def __init__(self, config: Parquet):
        from pyarrow import ArrowInvalid, parquet

        self.config = config
        self.columns = [config.image, config.captions, *([config.key] if config.key else []), *config.fields]
        self.groups: list[tuple[Path, int]] = []
        starts = [0]
        for path in files_of(config.path, ".parquet"):
            try:
                file = parquet.ParquetFile(path)
            except ArrowInvalid as error:
                raise DataError(f"{path}: this is no whole parquet file ({error})") from error
            for column in self.columns:
                if column not in file.schema_arrow.names:
                    has = ", ".join(file.schema_arrow.names)
                    raise DataError(f"{path}: there is no column '{column}'; the columns are {has}")
            for group in range(file.num_row_groups):
                self.groups.append((path, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
        self.starts = np.array(starts)
        if not len(self):
            raise DataError(f"{config.path}: the parquet files have no rows")
        self._cold()

    def _cold(self) -> None:
        self.tables: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("tables", "lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._cold()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _table(self, g: int) -> Any:
        from pyarrow import parquet

        with self.lock:
            if g not in self.tables:
                path, group = self.groups[g]
                self.tables[g] = parquet.ParquetFile(path).read_row_group(group, columns=self.columns)
            self.tables.move_to_end(g)
            table = self.tables[g]
            while len(self.tables) > self.config.cache:
                self.tables.popitem(last=False)
        return table

    def __getitem__(self, i: int) -> Record:
        g = int(np.searchsorted(self.starts, i, side="right")) - 1
        row = self._table(g).slice(i - self.starts[g], 1).to_pylist()[0]
        image, captions = row[self.config.image], row[self.config.captions]
        key = row[self.config.key] if self.config.key else f"{self.groups[g][0].name}:{i}"
        return {
            "image": image["bytes"] if isinstance(image, dict) else image,
            "captions": _listed(captions),
            "key": str(key),
            **{name: row[name] for name in self.config.fields},
        }


def _listed(captions: Any) -> list[str]:
    """One caption, several or none as a list of strings; bytes are UTF-8."""
    if captions is None:
        return []
    several = captions if isinstance(captions, list | tuple | np.ndarray) else [captions]
    return [c.decode("utf-8", "replace") if isinstance(c, bytes) else c for c in several if c is not None]


@dataclass(frozen=True)
class Tfds:
    """A TensorFlow Datasets data set prepared with `file_format="array_record"`; read without TensorFlow."""

    name: str
    """Name of the data set ("coco_captions/2014"), or the folder of a prepared version."""
    split: str = "train"
    """tfds's own language of splits: "train", "train[:90%]", "train+validation"."""
    data_dir: str | None = None
    """Where the prepared data sets lie; `None` is tfds's default."""
    image: str = "image"
    """The feature with the picture."""
    captions: str | None = "caption"
    """The feature with the captions, inner ones after a slash ("captions/text"); `None` names the label instead."""
    template: str = "a photo of a {}"
    """The caption of a label, when there are no captions."""
    label: str | None = None
    """The feature with the class number."""

    def open(self) -> Reader:
        import tensorflow_datasets as tfds

        builder: Any  # tfds's decorators hide the signatures
        if os.path.isdir(self.name):
            builder = tfds.builder_from_directory(self.name)
        else:
            builder = tfds.builder(self.name, data_dir=self.data_dir)
        features = builder.info.features
        for field, feature in (("image", self.image), ("captions", self.captions), ("label", self.label)):
            if feature and feature.split("/")[0] not in features:
                raise DataError(
                    f"{self.name}: Tfds.{field} is '{feature}'; the features are {', '.join(sorted(features))}"
                )
        if self.captions is None and self.label is None:
            raise DataError(f"{self.name}: Tfds needs `captions` or `label` to say what a picture shows")
        names = getattr(features[self.label], "names", None) if self.label else None
        # The pipeline decodes pictures itself, so they stay bytes here.
        decoders = {self.image: tfds.decode.SkipDecoding()}
        reader = builder.as_data_source(split=self.split, decoders=decoders)
        return _TfdsReader(self, reader, tuple(names or ()))


@dataclass
class _TfdsReader:
    config: Tfds
    reader: Any
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> Record:
        config, example = self.config, self.reader[i]
        record: Record = {"image": example[config.image], "key": f"{config.name}:{config.split}:{i}"}
        if config.label:
            record["label"] = int(example[config.label])
        if config.captions:
            value = example
            for part in config.captions.split("/"):
                value = [v[part] for v in value] if isinstance(value, list) else value[part]
            record["captions"] = _listed(value)
        else:
            name = self.names[record["label"]] if self.names else str(record["label"])
            record["captions"] = [config.template.format(name.replace("_", " "))]
        return record


Single = Folder | ArrayRecord | TarShards | Parquet | Tfds


@dataclass(frozen=True)
class Mixture:
    """Several sources, each shuffled and repeated on its own, drawn from in fixed proportions."""

    sources: tuple[Single, ...]
    """The sources."""
    weights: tuple[float, ...] | None = None
    """Their shares of the examples, in any unit; `None` is in proportion to their sizes."""

    def open(self) -> Joined:
        if not self.sources:
            raise DataError("Mixture.sources is empty")
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise DataError(f"Mixture has {len(self.sources)} sources and {len(self.weights)} weights")
        if self.weights is not None and not all(w > 0 for w in self.weights):
            raise DataError(f"Mixture.weights are {self.weights}; they must be positive")
        return Joined([source.open() for source in self.sources])


Source = Single | Mixture


class Thinned:
    """Every n-th record of a reader, from the first."""

    def __init__(self, reader: Reader, every: int):
        self.reader, self.every = reader, every

    def __len__(self) -> int:
        return -(-len(self.reader) // self.every)

    def __getitem__(self, i: int) -> Record:
        return self.reader[i * self.every]


class Joined:
    """Readers one behind the other."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = readers
        self.starts = np.cumsum([0, *(len(r) for r in readers)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Record:
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.readers[which][int(i - self.starts[which])]
