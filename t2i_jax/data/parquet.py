"""Random access to the rows of Parquet files."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2i_jax.core.sniff import sniff_file
from t2i_jax.data.files import Recent, files_of, mounted
from t2i_jax.data.order import Parts
from t2i_jax.data.records import DataError, Reader, Record, as_captions, join_captions

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

    from t2i_jax.data.sources import Parquet


class ParquetReader(Parts, Reader):
    """Rows by number; a row group is read whole, and the last `cache` of them are kept."""

    def __init__(self, config: Parquet):
        self.config = config
        self.captions = config.captions.split("+") if config.captions else []
        named = (config.image, *self.captions, config.key, *config.fields)
        self.columns = [column for column in named if column]
        self.groups: list[tuple[Path, int, int]] = []
        """file, row group, row of the file at which it begins"""
        sizes: list[int] = []
        for path in parquet_files(config.path):
            rows = self._check(path)
            starts = np.cumsum([0, *rows[:-1]]).tolist()
            self.groups += [(path, group, first) for group, first in enumerate(starts)][: len(rows)]
            sizes += rows
        super().__init__(sizes)
        if not len(self):
            raise DataError(f"{config.path}: the parquet files have no rows")
        self.tables: Recent[int, pa.Table] = Recent(self._read, config.cache)

    def _check(self, path: Path) -> list[int]:
        """Rows of each row group. Errors: `DataError` for other files, and for a missing or unsuitable column."""
        schema, metadata = _head(path)
        for column in self.columns:
            if column not in schema.names:
                raise DataError(f"{path}: there is no column '{column}'; the columns are {', '.join(schema.names)}")
        if fault := _no_images(schema.field(self.config.image).type):
            raise DataError(f"{path}: the column '{self.config.image}' holds {fault}")
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _read(self, g: int) -> pa.Table:
        from pyarrow import parquet

        path, group, _ = self.groups[g]
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=self.columns)

    def key(self, i: int) -> str:
        """The file and the row in it."""
        g, row = self.part(i)
        path, _, first = self.groups[g]
        return f"{path}:{first + row}"

    def __getitem__(self, i: int) -> Record:
        config, (g, number) = self.config, self.part(i)
        row = self.tables[g].slice(number, 1).to_pylist()[0]
        key = row[config.key] if config.key else None
        key = self.key(i).removeprefix(f"{self.groups[g][0].parent}/") if key is None else key
        captions = [as_captions(row[name], f"the column '{name}' is empty there") for name in self.captions]
        captions = captions or [as_captions(None, "Parquet.captions is None")]
        return {
            "image": _image(row[config.image], config.image),
            **join_captions(captions, config.weights),
            "key": str(key),
            **{name: row[name] for name in config.fields},
        }


def _head(path: Path) -> tuple[pa.Schema, parquet.FileMetaData]:
    """Errors: `DataError` for other files."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata
    except (ArrowException, OSError) as error:
        kind = sniff_file(path) if path.is_file() else "a folder"
        about = f"it is {kind}" if kind not in ("", "a Parquet file") else error
        raise DataError(f"{path}: this is no whole parquet file ({about})") from error


def schema_of(path: Path) -> pa.Schema:
    """The columns of a parquet file. Errors: `DataError` for other files."""
    return _head(path)[0]


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may hold images, those with a usual name first."""
    from pyarrow import types

    usual = ("image", "img", "jpg", "png", "picture", "photo")
    found = [f.name for f in schema if not _no_images(f.type) and not types.is_null(f.type)]
    return sorted(found, key=lambda name: usual.index(name.lower()) if name.lower() in usual else len(usual))


def parquet_files(path: str) -> list[Path]:
    """The files of `path`; of the copy of a repository of the Hugging Face Hub those in its folder `data`.

    Errors: `DataError` where there are none, and where such a folder has several splits.
    """
    mounted(path)
    data = os.path.join(path, "data")
    top = os.listdir(path) if os.path.isdir(path) else ()
    if not os.path.isdir(data) or any(name.endswith(".parquet") for name in top):
        return files_of(path, ".parquet")
    files = files_of(data, ".parquet")
    splits = Counter(file.name.partition("-")[0] for file in files)
    if len(splits) > 1:
        names = ", ".join(f'"{os.path.join(data, split)}-*"' for split in splits)
        raise DataError(f"{path}: the folder data holds several splits; name the files of one: {names}")
    return files


def _no_images(kind: pa.DataType) -> str:
    """What a column of this type holds if not images; empty if it may hold images."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _no_images(kind.value_type)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        return "" if "bytes" in names else f"structs of {', '.join(names)}, without 'bytes'"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "strings (paths?), not image files as bytes"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return f"lists ({kind}), not one image a row"
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return (
        "" if binary or types.is_fixed_size_binary(kind) or types.is_null(kind) else f"{kind}, not image files as bytes"
    )


def _image(value: dict[str, bytes] | bytes | None, column: str) -> bytes:
    """The image file in a cell. Errors: `DataError` where there is none."""
    found = value["bytes"] if isinstance(value, dict) else value
    if found is None:
        path = value.get("path") if isinstance(value, dict) else None
        has = f"; there is only a path, '{path}'" if path else ""
        raise DataError(f"the column '{column}' is null there{has}")
    return found
