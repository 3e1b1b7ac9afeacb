"""File types by their first bytes: errors can then name a web page, an unfetched pointer, a compressed file."""

from __future__ import annotations

import os

HEAD = 1024
"""Number of bytes that `sniff` reads."""

ARCHIVES = (
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x04\x22\x4d\x18", "an LZ4 file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip file"),
    (b"Rar!\x1a\x07", "a RAR file"),
)
PACKED = frozenset(("a zip file", *(name for _, name in ARCHIVES)))
"""File types that have to be unpacked before reading."""
MAGIC = (
    *ARCHIVES,
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"BM", "a BMP image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"%PDF-", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\x05\x16\x07", "an AppleDouble file of macOS"),
)
BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"crx ": "a raw image of a camera"}
BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC image")


def sniff(head: bytes) -> str:
    """A noun phrase for the file type, such as "a gzip file"; "" if unknown.

    head: the first `HEAD` bytes of the file, or all of a shorter one.
    """
    if not head:
        return "an empty file"
    if found := pointer(head):
        return found
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file"
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        if first.endswith((b"/data.pkl", b"/.data/serialization_id", b"/.format_version")):
            return "a PyTorch file"
        return "a NumPy archive (.npz)" if first.endswith(b".npy") else "a zip file"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle (an old PyTorch file?)"
    if is_msgpack(head):
        return "a msgpack file (a checkpoint of Flax?)"
    if head[257:262] == b"ustar":
        return "a tar file"
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "a video")
    if not head.strip(b"\0"):
        return "a file of NUL bytes"
    return _text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def is_msgpack(head: bytes) -> bool:
    """Whether a file begins as a msgpack dictionary whose first name is a short ASCII word, as checkpoints of Flax
    do."""
    if not head:
        return False
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else len(head))  # after the number of names
    name = head[at + 1 : at + 1 + (head[at] & 0x1F)] if at < len(head) and 0xA1 <= head[at] <= 0xBF else b""
    return name.isascii() and name.decode("latin1").isprintable() and bool(name)


def pointer(head: bytes) -> str:
    """As `sniff`, for pointer texts of files that were not fetched."""
    if head.startswith(b"version https://git-lfs.github.com"):
        return "a Git LFS pointer in place of the file (`git lfs pull` fetches it)"
    if head.lstrip(b"/.").startswith((b"annex/objects", b"git/annex/objects")):
        return "a git-annex pointer in place of the file (`git annex get` fetches it)"
    return ""


def sniff_file(path: str | os.PathLike) -> str:
    """`sniff` of the file at `path`. Errors: OSError if it cannot be read."""
    with open(path, "rb") as file:
        return sniff(file.read(HEAD))


def _text(head: bytes) -> str:
    low = head.lower()
    if low.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page"
    if low.startswith((b"<?xml", b"<svg")):
        return "an SVG drawing" if b"<svg" in low else "an XML document"
    if low[:1] == b"<":
        return "a web page"
    if low.startswith((b"{", b"[")):
        return "a JSON file"
    return "a text file" if low and all(c in b"\t\n\r\f" or 32 <= c < 127 for c in low) else ""
