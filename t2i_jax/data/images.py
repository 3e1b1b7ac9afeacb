"""The one way to open an image, and the one way to open a mask."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from t2i_jax.core.errors import DataError
from t2i_jax.core.sniff import HEAD, sniff
from t2i_jax.core.text import mend

NOT_IMAGES = frozenset(("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC", "PSD", "GBR", "CUR"))
"""Formats of pillow that are not read: drawings that run other programs, videos, measurements, working files."""
SRGB = ImageCms.createProfile("sRGB")
SAME = 2
"""Levels by which a profile may differ from sRGB and still is taken for it."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24
"""Where a PNG has the number of its bits."""

Box = tuple[float, float, float, float]
ImageSource = bytes | np.ndarray | os.PathLike


class TooSmall(DataError):
    """An image that is whole, but smaller than asked for."""


def image_endings() -> frozenset[str]:
    """Endings (".jpg", ...) of the files that `open_image` reads, those of plug-ins that are registered included."""
    return frozenset(e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - NOT_IMAGES)


def open_image(image: ImageSource, size: int = 0, smallest: float = 0.8, smallest_side: int = 0) -> Image.Image:
    """An RGB image in sRGB, upright, its transparency on white, of several frames the first.

    Args:
        image: the bytes of an image file, whatever its name; its `Path` (a string is none, so that no record of a data
            set can name a file of this machine); or an array (i, j) or (i, j, c) with 1
            to 4 channels (grey, grey and alpha, RGB, RGBA), whose numbers become 8 bits as `levels` has it.
        size: side of the squares that will be cut out; 0 for an image at its full size. A JPEG is decoded at a half, a
            quarter or an eighth where its short side then still is `draft_side`.
        smallest: the smallest square, as a share of the short side; 1 where all have the full side.
        smallest_side: the shortest side that is taken.

    `info["box"]` of what it gives has the edges (left, top, right, bottom) of the image in its pixels: of a reduced
    JPEG the last column and row may lie partly outside. A colour profile that cannot be read is ignored, and so is a
    broken EXIF. Errors: `DataError` that names the file, where there is a path, for what is no whole image; `TooSmall`
    for an image whose short side is under `smallest_side`.
    """
    if isinstance(image, os.PathLike):
        with _naming(image):
            return open_image(Path(image).read_bytes(), size, smallest, smallest_side)
    colour, alpha, profile, box = _planes(image, draft_side(size, smallest), smallest_side)
    colour = _to_srgb(colour, profile)
    colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha) if alpha else colour
    colour.info["box"] = box
    return colour


def size_of(image: object) -> tuple[int, int]:
    """Rows and columns of an upright image, without decoding it: of a file's bytes, or an array; (0, 0) for neither."""
    if isinstance(image, np.ndarray) and image.ndim in (2, 3):
        return image.shape[0], image.shape[1]
    if not isinstance(image, bytes):
        return 0, 0
    try:
        with Image.open(io.BytesIO(image)) as opened:
            columns, rows = opened.size
            with suppress(Exception):  # a broken EXIF is none
                if opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                    return columns, rows
            return rows, columns
    except Exception:  # the record is broken, which is found where it is read
        return 0, 0


def draft_side(size: int, smallest: float = 1.0) -> int:
    """The short side at which a JPEG has to be decoded for squares of `size`, the smallest of them that share of it.

    Twice what the square needs, three times where crops are random: the resampling then decides what is seen, and not
    the coarse filter of the decoder. For images of much detail the PSNR to the full decode is at least 43 dB, and 48 dB
    for random crops; small squares need a little more for it.
    """
    return math.ceil(size * (3 if smallest < 1 else 2 if size >= 96 else 2.25) / smallest)


def open_mask(mask: ImageSource) -> np.ndarray:
    """The region to inpaint: bool (i, j), True where a mask is white (luminance times alpha above one half).

    mask: bytes, a path or an array as `open_image` takes them; a boolean array is taken as it is. White is the largest
    value of 8 or 16 bits that the numbers need, or 1 where there are no others than 0 and 1.
    Errors: `DataError` that names the file for what is no image, and where nothing or everything is marked.
    """
    if isinstance(mask, os.PathLike):
        with _naming(mask):
            return open_mask(Path(mask).read_bytes())
    grey, alpha, *_ = _planes(mask, by_values=True)
    grey = grey.getchannel("L") if grey.mode == "LAB" else grey.convert("L")
    light = _full(np.asarray(grey)) * (_full(np.asarray(alpha)) / 255 if alpha else 1.0)
    marked = light > 127
    if not marked.any():
        raise DataError(f"the mask marks nothing to draw: white marks, and its brightest is {light.max():.0f} of 255")
    if marked.all():
        raise DataError("the mask marks the whole image: paint black what is to be kept, or leave the mask out")
    return marked


def levels(x: np.ndarray, peak: float = 0) -> np.ndarray:
    """Numbers as 8 bits.

    `peak`, where it is given, is white. Otherwise black is 0, or the least value where one is negative; white is 1 for
    floats up to 1, else the first of 255, 65535 and the largest value that none exceeds. Floats from -0.5 to 2 are
    clipped to [0, 1], as sharpening and highlights leave it by a little. NaN is black.
    Errors: `DataError` for what is no number or has no finite one.
    """
    floating = x.dtype.kind == "f" or x.dtype.name == "bfloat16"
    if x.dtype == np.uint8:
        return x
    if not floating and x.dtype.kind not in "biu":
        raise DataError(f"an image is an array of numbers, not of {x.dtype}")
    peak = peak or {"bool": 1, "uint16": 65535}.get(x.dtype.name, 0)
    x = x.astype(np.float32)
    finite = x[np.isfinite(x)]
    if not finite.size:
        raise DataError("the image has no finite value")
    low, high = float(finite.min()), float(finite.max())
    if peak:
        low, high = 0.0, float(peak)
    elif floating and low >= -0.5 and high <= 2:
        low, high = 0.0, 1.0
    elif low >= 0:
        low, high = 0.0, next((p for p in (255.0, 65535.0) if high <= p), high)
    x = np.nan_to_num(x, nan=low, posinf=high, neginf=low)
    return np.rint(np.clip((x - low) * (255 / max(high - low, 1e-30)), 0, 255)).astype(np.uint8)


@contextmanager
def _naming(path: os.PathLike) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise type(error)(f"{mend(os.fspath(path))}: {error}") from error


def _full(x: np.ndarray) -> np.ndarray:
    """8 bits as float32; where there is only 0 and 1, 1 is white."""
    return x.astype(np.float32) * (255 if x.max() == 1 else 1)


def _planes(
    image: bytes | np.ndarray, draft: int = 0, smallest_side: int = 0, by_values: bool = False
) -> tuple[Image.Image, Image.Image | None, bytes | None, Box]:
    """An upright image as its colour (L, RGB, CMYK or LAB), its alpha (L), its colour profile, and its edges in pixels.

    by_values: numbers of more than 8 bits are scaled by the largest value present, not by the largest possible.
    """
    if isinstance(image, np.ndarray):
        wide = by_values and image.dtype == np.uint16
        colour, alpha = _array_planes(image.astype(np.int64) if wide else image, smallest_side)
        return colour, alpha, None, (0, 0, *colour.size)
    if not isinstance(image, bytes):
        hint = f" ({image[:60]!r}: a path is none)" if isinstance(image, str) else ""
        raise DataError(f"an image is the bytes of a file or an array, not {type(image).__name__}{hint}")
    try:
        opened, (w, h) = _decoded(image, draft, smallest_side)
        colour, alpha = _split(opened, 0 if by_values else _peak(opened))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        kind = sniff(image[:HEAD])
        known = f"{kind}, of a kind that is not read here, or damaged" if kind.endswith("image") else kind
        raise DataError(f"no image: it is {known or 'of no known kind'}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{error} (the limit is PIL.Image.MAX_IMAGE_PIXELS)") from error
    except Exception as error:  # any error of pillow over a damaged file
        raise DataError(f"the image is cut short or damaged: {type(error).__name__}: {error}") from error
    try:
        turn = TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))  # pyright: ignore[reportArgumentType]
    except Exception:  # a broken EXIF is none
        turn = None
    box = (0, 0, w, h)
    if turn is not None:
        box = _turned_box(turn, w, h, *colour.size)
        colour, alpha = colour.transpose(turn), alpha.transpose(turn) if alpha else None
    return colour, alpha, opened.info.get("icc_profile"), box


def _turned_box(turn: Image.Transpose, w: float, h: float, width: int, height: int) -> Box:
    """The edges (0, 0, w, h) of an image width x height after it is turned."""
    name = turn.name
    x = width - w if name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "ROTATE_90", "TRANSVERSE") else 0
    y = height - h if name in ("FLIP_TOP_BOTTOM", "ROTATE_180", "ROTATE_270", "TRANSVERSE") else 0
    return (
        (y, x, y + h, x + w) if name in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270") else (x, y, x + w, y + h)
    )


def _array_planes(x: np.ndarray, smallest_side: int) -> tuple[Image.Image, Image.Image | None]:
    shape, x = x.shape, x[..., None] if x.ndim == 2 else x
    if x.ndim != 3 or not 1 <= x.shape[-1] <= 4 or not x.size:
        raise DataError(f"an image array is (i, j) or (i, j, c) with 1 to 4 channels, not {shape}")
    _check_side((x.shape[1], x.shape[0]), smallest_side)
    x = levels(x)
    count = x.shape[-1]
    colour = Image.fromarray(np.ascontiguousarray(x[..., 0] if count < 3 else x[..., :3]))
    return colour, Image.fromarray(np.ascontiguousarray(x[..., -1])) if count % 2 == 0 else None


def _check_side(size: tuple[int, int], smallest_side: int) -> None:
    if min(size) < smallest_side:
        raise TooSmall(f"the image is {size[0]}x{size[1]}, with a side under {smallest_side}")


def _formats() -> list[str]:
    Image.preinit()  # the usual ones first
    Image.init()
    return [name for name in Image.ID if name not in NOT_IMAGES]


def _decoded(data: bytes, draft: int, smallest_side: int) -> tuple[Image.Image, tuple[float, float]]:
    """The first frame, decoded, and the width and height of the image in its pixels.

    Of a PNG only the chunks that the image needs have to be valid.
    """
    fault = None
    for keep in ((), (b"tRNS", b"eXIf", b"iCCP"), (b"tRNS",)):
        if keep and not data.startswith(PNG):
            break
        try:
            opened = Image.open(io.BytesIO(_chunks(data, keep) if keep else data), formats=_formats())
            _check_side(opened.size, smallest_side)
            reduced = opened.draft(None, (draft, draft)) if draft else None
            _check_planes(opened)
            opened.load()
            clear = opened.info.get("transparency")
            if opened.format == "PNG" and isinstance(clear, int | tuple) and opened.mode in ("L", "RGB"):
                opened.info["transparency"] = _clear(clear, data[PNG_DEPTH])
            return opened, reduced[1][2:] if reduced else opened.size
        except (DataError, Image.DecompressionBombError):
            raise
        except Exception as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _check_planes(opened: Image.Image) -> None:
    """Errors: `DataError` for a TIFF of which pillow would take other bytes for pixels."""
    if _tag(opened, 284, 1) == 2 and _tag(opened, 277, 1) > 1 and _tag(opened, 258, 8) > 8:
        raise DataError("a TIFF with colours of more than 8 bits in separate planes is not read")


def _clear(clear: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """The transparent colour of a PNG in 8 bits; pillow converts the pixels but not this colour."""
    if isinstance(clear, tuple):
        return tuple(c >> 8 for c in clear) if bits == 16 else clear
    return clear * (255 // ((1 << bits) - 1)) if bits < 8 else clear


def _chunks(data: bytes, keep: tuple[bytes, ...]) -> bytes:
    """A PNG with its critical chunks and those of the others that are named."""
    at, parts = len(PNG), [PNG]
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind[:1].isupper() or kind in keep:
            parts.append(data[at : at + size + 12])
        at += size + 12
    return b"".join(parts)


def _tag(opened: Image.Image, number: int, default: int) -> int:
    """The first value of a tag of a TIFF."""
    value: object = opened.tag_v2.get(number, default) if opened.format == "TIFF" else default  # pyright: ignore
    return int(value[0] if isinstance(value, tuple) else value)


def _peak(opened: Image.Image) -> int:
    """White of numbers with more than 8 bits, where the format says it; else 0."""
    bits, signed = _tag(opened, 258, 16), _tag(opened, 339, 1) == 2
    if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
        return (1 << min(bits, 16)) - 1
    return (1 << bits - 1) - 1 if opened.mode == "I" and opened.format == "TIFF" and signed and bits < 32 else 0


def _split(opened: Image.Image, peak: int) -> tuple[Image.Image, Image.Image | None]:
    """Colour (L, RGB, CMYK or LAB) and alpha (L) of a decoded image."""
    clear = opened.info.get("transparency")
    if opened.mode in ("I", "F") or opened.mode.startswith("I;16"):
        x = np.asarray(opened)
        if opened.mode == "I" and _tag(opened, 258, 0) == 32 and _tag(opened, 339, 1) == 1:
            x = x.view(np.uint32)  # which pillow reads as signed
        if peak and x.min() < 0:
            peak = 0
        grey = levels(x.astype(np.int64) if x.dtype == np.uint16 and not peak else x, peak)
        if _tag(opened, 262, 1) == 0:  # white is zero
            grey = 255 - grey
        alpha = Image.fromarray(np.where(x == clear, 0, 255).astype(np.uint8)) if isinstance(clear, int) else None
        return Image.fromarray(grey), alpha
    if opened.has_transparency_data or opened.mode in ("La", "RGBa"):
        grey = opened.mode in ("1", "L", "LA", "La")
        opened = opened.convert("LA" if grey else "RGBA")
        return opened.convert("L" if grey else "RGB"), opened.getchannel("A")
    if opened.mode == "1":
        return opened.convert("L"), None
    return opened if opened.mode in ("L", "RGB", "CMYK", "LAB") else opened.convert("RGB"), None


@lru_cache(32)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """What brings an image of `mode` from a profile to sRGB, and the mode it works on; None where that is nothing, or
    where the profile is broken or of another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
        works = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[space]
        if works != mode and (works, mode) != ("RGB", "L"):
            return None
        flags = ImageCms.Flags.NOOPTIMIZE if works == "L" else ImageCms.Flags.NONE  # its short cut is coarse for grey
        transform = ImageCms.buildTransform(source, SRGB, works, "RGB", flags=flags)
        if works == "CMYK":
            return works, transform
        ramp = np.arange(0, 256, 15).astype(np.uint8)  # 18 levels
        colours = np.stack(np.meshgrid(ramp, ramp, ramp), -1).reshape(18, -1, 3) if works == "RGB" else ramp[None]
        before = Image.fromarray(np.ascontiguousarray(colours))
        after = ImageCms.applyTransform(before, transform)
        gap = np.asarray(after, np.int16) - np.asarray(before.convert("RGB"), np.int16)
        return None if np.abs(gap).max() <= SAME else (works, transform)
    except Exception:
        return None


@lru_cache(1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    """As `convert` of pillow, whose short cut is off by 12 levels for strong colours."""
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB", flags=ImageCms.Flags.NOOPTIMIZE)


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    found = ("LAB", _from_lab()) if colour.mode == "LAB" else _transform(profile, colour.mode) if profile else None
    if found is None:
        return colour.convert("RGB")
    works, transform = found
    return ImageCms.applyTransform(colour.convert(works), transform) or colour.convert("RGB")
