"""External text: bytes of files, strings of JSON and of the command line.

Bytes are UTF-8, or UTF-16 or UTF-32 with a byte order mark; other encodings are refused, not guessed. A lone surrogate
in a string (half of an emoji in JSON, a non-UTF-8 byte of a file name or an argument) becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from t2i_jax.core.errors import DataError
from t2i_jax.core.sniff import HEAD, pointer, sniff

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16, so it is tested first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def decode_text(data: bytes) -> str:
    """Decode bytes to text, without a byte order mark.

    Errors: `DataError` that names the first invalid byte, counted from 0, and the likely encoding or file type; also
    for a pointer to a file that was not fetched.
    """
    if kind := pointer(data[:HEAD]):
        raise DataError(f"byte 0: it is {kind}")
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 3 * abs(data[::2].count(0) - data[1::2].count(0)) > len(data) > 3:
        raise DataError("byte 0: this looks like UTF-16 without a byte order mark; save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        mark = 3 if encoding == "utf-8-sig" else 0  # the decoder does not count the mark
        at = error.start + mark
        if encoding.startswith("utf-8"):
            kind = sniff(data[:HEAD]) if min(data[:HEAD]) < 9 else ""  # text in another encoding has no such bytes
            likely = f"it is {kind}" if kind else "likely cp1252 or latin-1; save the text as UTF-8"
            raise DataError(f"byte {at} (0x{data[at]:02x}) is no UTF-8: {likely}") from error
        raise DataError(f"byte {at} is no {encoding.upper()}, though the text begins with its mark") from error


def clean_text(text: str) -> str:
    """Clean a caption or prompt: halves of surrogate pairs are joined, lone ones become U+FFFD, NUL becomes a space,
    and a byte order mark and whitespace at the ends are removed."""
    if not text.isprintable():  # surrogates, NUL and the mark are not printable
        text = mend(text).replace("\0", " ").lstrip("\ufeff")
    return text.strip()


def mend(text: str) -> str:
    """`text` with lone surrogates replaced, so that UTF-8 can encode it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_lines(text: str) -> list[str]:
    """The lines of a text: they end with \\n, \\r\\n or \\r alone. U+2028, U+0085 and form feeds are part of a line."""
    return re.split(r"\r\n|\n|\r", text)


def text_lines(data: bytes) -> list[str]:
    """The non-blank lines of bytes, cleaned. Errors: `DataError` as in `decode_text`."""
    return [line for line in map(clean_text, split_lines(decode_text(data))) if line]


def read_lines(path: str | os.PathLike) -> list[str]:
    """The non-blank lines of a text file, cleaned: prompts, or the captions of an image.

    Errors: `DataError` that names the file and the first invalid byte; OSError if it cannot be read.
    """
    try:
        return text_lines(Path(path).read_bytes())
    except DataError as error:
        raise DataError(f"{mend(os.fspath(path))}: {error}") from error
