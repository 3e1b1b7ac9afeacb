"""Random access into webdataset tar files, by the indexes of `tar_index`."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2i_jax.core.sniff import PACKED
from t2i_jax.core.tar_scan import BLOCK, MEMBERS
from t2i_jax.core.text import decode_text, mend
from t2i_jax.data.files import Descriptor, Files, kinds
from t2i_jax.data.order import Parts
from t2i_jax.data.records import Captions, DataError, Record, as_captions, join_captions, words_of
from t2i_jax.data.tar_index import TarEntry, index_tars, open_table, raise_error

log = logging.getLogger(__name__)
LOG_EVERY = 10.0
"""Seconds between lines about how far the indexing is."""
LOOKED_AT = 100
"""Tar files that are looked at to say how many samples have no captions."""


class TarReader(Parts):
    """Samples of tar files; reading one sample touches nothing but its own bytes.

    Errors: `DataError` where there is no sample, for a file that is no tar, and for one that is cut short unless
    `skip_truncated`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        caption: str,
        fields: Sequence[str],
        skip_truncated: bool,
        weights: Sequence[float] = (),
    ):
        self.kinds, self.fields, self.weights = caption.split("+"), tuple(fields), tuple(weights)
        count, last = 0, time.monotonic()

        def check(tar: Path, entry: TarEntry | Exception) -> None:
            nonlocal count, last
            raise_error(tar, entry)
            count += 1
            if time.monotonic() - last > LOG_EVERY:
                last = time.monotonic()
                log.warning("%d of %d tar files are indexed (`t2i data index` does so beforehand)", count, len(shards))
            if isinstance(entry, TarEntry) and not entry.whole:
                if not skip_truncated:
                    raise DataError(fault_of_tar(entry))
                log.warning("%s", fault_of_tar(entry, True))

        entries = index_tars(shards, seen=check)
        self.entries = [entries[tar] for tar in shards]
        super().__init__(entry.samples for entry in self.entries)
        self.files, self.tables = Files(Descriptor), Files(open_table)
        if not len(self):
            names = [name for entry in self.entries for name in self.tables[entry].header.get("ignored", ())]
            has = f"they hold {kinds(names)}" if names else "they are empty"
            raise DataError(f"{shards[0]}: no sample with an image (KEY.jpg, .png, .webp, ...) in the tar files; {has}")

    def _place(self, i: int) -> tuple[TarEntry, int]:
        """The tar file of sample i, and its number there."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard, row = self.part(i % len(self))
        return self.entries[shard], row

    def key(self, i: int) -> str:
        """The tar file and the name of the image in it, without its ending."""
        entry, row = self._place(i)
        name = "?"
        with contextlib.suppress(tarfile.TarError, DataError, OSError):  # reading the record will say what is wrong
            at, size = (self.tables[entry].value(c, row) * BLOCK for c in ("image", "image_head"))
            name = f"byte {at - size}"
            name = _name(self.files[entry.tar].read(at - size, size))
        folder, _, name = name.rpartition("/")
        return mend(f"{entry.tar}:{os.path.join(folder, name.rpartition('.')[0] or name)}")

    def notes(self, captions: bool) -> list[str]:
        missing = seen = 0
        for entry in self.entries[:LOOKED_AT] if captions else ():
            names = {"txt_size" if kind == "txt" else "json_size" for kind in self.kinds}
            sizes = np.stack([self.tables[entry].column(name) for name in sorted(names)])
            missing += int((sizes.max(0) < 0).sum())
            seen += sizes.shape[1]
        if not missing:
            return []
        wanted = " or ".join("a .txt member" if k == "txt" else f"'{k}' of a .json member" for k in self.kinds)
        other = "" if self.kinds != ["txt"] else "; TarShards.caption names a field of the .json members instead"
        first = "first " if len(self) > seen else ""
        folder = self.entries[0].tar.parent
        return [f"{folder}: {missing} of the {first}{seen} samples have no {wanted}{other}"]

    def __getitem__(self, i: int) -> Record:
        entry, row = self._place(i)
        table, file = self.tables[entry], self.files[entry.tar]
        at = table.value("image", row)
        read = lambda block, size: file.read(block * BLOCK, size) if size >= 0 else None
        image = read(at, table.value("image_size", row))
        text, extra, label = (read(at + table.value(m, row), table.value(f"{m}_size", row)) for m in MEMBERS[1:])
        key = self.key(i)
        record: Record = {"image": image, "key": key.removeprefix(mend(f"{entry.tar.parent}/"))}
        missing = self._instead(extra) if text is None else ""
        several = [as_captions(text, missing) if kind == "txt" else _field(extra, kind) for kind in self.kinds]
        record |= join_captions(several, self.weights)
        found = _object(extra) if self.fields else {}
        record |= {name: found[name] for name in self.fields if name in found}
        if label is not None:  # what is no number a model of classes refuses
            text = label.decode("utf-8", "replace").strip()
            record["label"] = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
        return record

    def about(self, i: int) -> dict[str, object]:
        """The object of the .json member of sample i; empty without one. Errors: `DataError` where it is none."""
        entry, row = self._place(i)
        table = self.tables[entry]
        size = table.value("json_size", row)
        if size < 0:
            return {}
        return _object(self.files[entry.tar].read((table.value("image", row) + table.value("json", row)) * BLOCK, size))

    def _instead(self, extra: bytes | None) -> str:
        with contextlib.suppress(DataError):
            if has := ", ".join(_object(extra)):
                return f"there is no .txt member; TarShards.caption can name a field of the .json member, of {has}"
        return "there is no .txt member"


def _field(extra: bytes | None, name: str) -> Captions:
    """The captions in a field of the .json member, whose faults matter where captions are needed."""
    if extra is None:
        return as_captions(None, "there is no .json member")
    try:
        found = _object(extra)
    except DataError as error:
        captions = Captions()
        captions.fault = str(error)
        return captions
    has = ", ".join(found) or "nothing"
    return as_captions(words_of(found, name), f"the .json member has no '{name}'; it has {has}")


def fault_of_tar(entry: TarEntry, skipped: bool = False) -> str:
    """Why the tar file of an index cannot be read to its end, and what can be done, or is done if it is skipped."""
    about = open_table(entry).header
    kind, cut = about.get("kind", ""), about.get("cut")
    if kind:
        unpack = "; unpack it, as records are read in any order" if kind in PACKED else ""
        return f"{entry.tar}: no tar file: it is {kind}{'; it is left out' if skipped else unpack}"
    if skipped:
        return f"{entry.tar}: cut short ({cut}); going on with its first {entry.samples} samples"
    return (
        f"{entry.tar}: the tar file is cut short or damaged after {about.get('keys')} samples ({cut}); "
        "fetch it again, or set TarShards.truncated to 'skip'"
    )


def _name(header: bytes) -> str:
    """The name of the member with this header, or these headers where the name is a long one."""
    if len(header) == tarfile.BLOCKSIZE:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
        return tar.next().name


def _object(extra: bytes | None) -> dict[str, object]:
    """The .json member of a sample. Errors: `DataError` where it is no JSON object."""
    if extra is None:
        return {}
    try:
        found = json.loads(decode_text(extra))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the .json member is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"the .json member is no JSON object, but a {type(found).__name__}")
    return found
