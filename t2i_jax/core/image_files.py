"""Image files: arrays to 8 bits, grids with captions, PNG files with metadata."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile, PngInfo

from t2i_jax.core.console import console
from t2i_jax.core.outputs import MAKER, check_free, is_ours, whole_file, write_json_lines

METADATA = "metadata.jsonl"
"""The prompts and seeds of a folder of images, a row each: what makes it an imagefolder of the Hugging Face Hub."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, FAINT, FRAME = (255, 255, 255), (32, 33, 36), (120, 124, 130), (225, 228, 232)


def to_uint8(images: Array | np.ndarray) -> Array:
    """Float images (..., 3) in [-1, 1] as uint8: (x + 1) * 127.5, clipped, rounded half to even.

    Rounding (not truncation) is the inverse of `x / 127.5 - 1` to the bit.
    """
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def digest(*arrays: np.ndarray) -> str:
    """Sixteen hexadecimal digits that identify arrays."""
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int = 0,
    scale: int = 0,
    title: str = "",
) -> Image.Image:
    """Images in rows, each with its caption below.

    Args:
        images: uint8 (n, i, j, 3).
        captions: n lines of any length; wrapped, and cut with an ellipsis after three lines.
        columns: images in a row; 0 chooses a grid a little wider than high.
        scale: every pixel becomes scale x scale; 0 chooses one that makes images about 128 wide.
        title: a line above all.

    Errors: `ValueError` where captions and images differ in number.
    """
    captions = [""] * len(images) if captions is None else list(captions)
    return _sheet([images], captions, columns, scale, title, ())


def side_by_side(
    real: np.ndarray,
    generated: np.ndarray,
    captions: Sequence[str],
    columns: int = 0,
    scale: int = 0,
    title: str = "",
    names: tuple[str, str] = ("real", "generated"),
) -> Image.Image:
    """Pairs: the real image left, the generated one right, their caption below both; otherwise as `grid`."""
    if real.shape != generated.shape:
        raise ValueError(f"real images {real.shape} and generated ones {generated.shape} do not pair")
    return _sheet([real, generated], list(captions), columns, scale, title, names)


def save_png(
    image: Image.Image | np.ndarray,
    path: str | os.PathLike,
    captions: Sequence[str] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write an image whole or not at all, with its captions and metadata in text chunks of the PNG.

    `image` is a PIL image or uint8 (i, j, 3). One caption is stored as `Description`, more as a JSON list; values of
    `metadata` that are not strings as JSON. `read_png_text` gives them back.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    chunks = PngInfo()
    chunks.add_itxt("Software", MAKER)
    if captions is not None:
        text = captions[0] if len(captions) == 1 else json.dumps(list(captions), ensure_ascii=False)
        chunks.add_itxt("Description", text)
    for key, value in (metadata or {}).items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    with whole_file(path) as temporary:
        image.save(temporary, "PNG", pnginfo=chunks, optimize=True)


def read_png_text(path: str | os.PathLike) -> dict[str, str]:
    """The text chunks of a PNG file."""
    with Image.open(path) as image:
        image.load()
        return {k: str(v) for k, v in image.text.items()} if isinstance(image, PngImageFile) else {}


def claim(files: Sequence[Path], about: Sequence[Mapping[str, str]], sheets: Sequence[str]) -> list[bool]:
    """Which of the numbered images of a call exist already, with the same metadata.

    Other images, sheets and METADATA of an earlier call move to a folder `earlier-N` in theirs: nothing is lost, and
    none is mistaken for an image of this call.

    files: all in one folder. about: metadata of each image. sheets: names of files that show several images.
    Errors: `ConfigError` where a file of one of these names was not written by this library.
    """
    folder, sheets = files[0].parent, (*sheets, METADATA)
    check_free(*files, *(folder / name for name in sheets))
    said = {path: _about(path) for path in folder.glob("[0-9]*.png") if path.stem.isdigit() and is_ours(path)}
    made = [said.get(path) == dict(mine) for path, mine in zip(files, about, strict=True)]
    kept = {path for path, yes in zip(files, made, strict=True) if yes}
    older = [path for path in said if path not in kept]
    if older:
        target = next(p for n in itertools.count(1) if not (p := folder / f"earlier-{n}").exists())
        target.mkdir()
        for path in (*older, *(p for name in sheets if (p := folder / name).exists())):
            path.rename(target / path.name)
        console.print(
            f"{folder}: {len(older)} images of an earlier call are in {target.name} now", soft_wrap=True, markup=False
        )
    return made


def describe(files: Sequence[Path], about: Sequence[Mapping[str, str]]) -> None:
    """Write METADATA next to images: the name of each with those of `prompt`, `seed` and `score` that it has, so that
    the folder is a data set of images and their captions."""
    kept = ("prompt", "seed", "score")
    rows = [{"file_name": path.name, **{k: a[k] for k in kept if k in a}} for path, a in zip(files, about, strict=True)]
    write_json_lines(files[0].parent / METADATA, rows)


def _about(path: Path) -> dict[str, str]:
    return {k: v for k, v in read_png_text(path).items() if k not in ("Software", "Description")}


def _sheet(
    sets: list[np.ndarray], captions: list[str], columns: int, scale: int, title: str, names: Sequence[str]
) -> Image.Image:
    """Cells in rows; a cell is one image of each set side by side over their caption."""
    n, i, j, _ = sets[0].shape
    if any(x.dtype != np.uint8 for x in sets):
        raise ValueError(f"images are uint8 (n, i, j, 3), not {sets[0].dtype}; see to_uint8")
    if len(captions) != n:
        raise ValueError(f"{n} images with {len(captions)} captions")
    scale = scale or max(1, round(128 / j))
    width, height = j * scale, i * scale
    size = max(11, min(16, width // 9))
    text = "".join([title, *names, *captions])
    font, small, large = (load_font(s, text) for s in (size, size - 1, size + 6))
    gap, joint, line = max(12, width // 8), 3, round(size * 1.3)
    cell = len(sets) * width + (len(sets) - 1) * joint
    if not columns:  # near the wanted shape, the count that leaves the fewest holes
        ideal = max(2, round(math.sqrt(1.6 * n * height / cell)))
        columns = min(range(ideal - 1, ideal + 2), key=lambda k: (-n % k, abs(k - ideal)))
    columns = min(columns, n)
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    texts = [wrap(c, font, cell) for c in captions]
    below = [max(len(texts[k]) for k in row) * line + (6 if any(texts[k] for k in row) else 0) for row in rows]
    top = gap + (line * 2 if title else 0) + (line if names else 0)
    sheet_width = columns * cell + (columns + 1) * gap
    image = Image.new("RGB", (sheet_width, top + sum(below) + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((gap, gap - 4), wrap(title, large, sheet_width - 2 * gap, 1)[0], INK, large)
    for column in range(columns if names else 0):
        for s, name in enumerate(names):
            x = gap + column * (cell + gap) + s * (width + joint) + width / 2
            draw.text((x, top - 5), name, FAINT, small, anchor="ms")
    y = top
    for row, space in zip(rows, below, strict=True):
        for column, k in enumerate(row):
            x = gap + column * (cell + gap)
            for s, images in enumerate(sets):
                # Pixels stay squares: smoothing would flatter the images.
                tile = Image.fromarray(images[k]).resize((width, height), Image.Resampling.NEAREST)
                left = x + s * (width + joint)
                draw.rectangle((left - 1, y - 1, left + width, y + height), outline=FRAME)
                image.paste(tile, (left, y))
            for number, text in enumerate(texts[k]):
                draw.text((x + cell / 2, y + height + 6 + number * line), text, INK, font, anchor="ma")
        y += height + space + gap
    return image


def wrap(text: str, font: Font, width: int, most: int = 3) -> list[str]:
    """Lines of `text` no wider than `width`; long words are broken, and what is beyond `most` lines becomes '…'."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) <= most:
        fit = max(1, _fitting(rest, font, width))
        if fit < len(rest):
            space = rest.rfind(" ", 0, fit + 1)
            fit = space if space > 0 else fit
        lines.append(rest[:fit])
        rest = rest[fit:].lstrip()
    if len(lines) > most:
        last = lines[most - 1]
        last = last[: _fitting(last, font, width, "…")]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _fitting(text: str, font: Font, width: int, end: str = "") -> int:
    """Characters of `text` that, with `end`, are no wider than `width`; few beginnings are measured, and short ones."""
    most = 1
    while most < len(text) and font.getlength(text[:most] + end) <= width:
        most *= 2
    measured = range(1, min(most, len(text)) + 1)
    return bisect_right(measured, width, key=lambda n: font.getlength(text[:n] + end))


def load_font(size: int, text: str = "") -> Font:
    """Pillow's own font, which has little beyond ASCII; for other `text` DejaVu Sans, which matplotlib ships."""
    spec = None if text.isascii() else importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
