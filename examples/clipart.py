"""A folder of captioned clip art, of two Debian packages: stamps of Tux Paint, and the Open Clip Art Library.

    apt-get download tuxpaint-stamps-default openclipart-png
    for package in *.deb; do dpkg -x $package unpacked; done
    python -m examples.clipart unpacked data/clipart

writes data/clipart/train and data/clipart/test, a PNG of at most 96 pixels and a .txt of captions for each picture. A
stamp has a sentence of its own; a picture of the library has the words of its file's name, the artist's included, and
again with those of its folders. Pictures whose names differ in their last number alone are in the same split.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from PIL import Image

SIDE, HELD_OUT = 96, 0.05
LEFT_OUT = ("special", "shapes")
"""Folders of the library with patterns, gradients and some hundred stars: no things that captions name."""


def words(name: str) -> str:
    """The words of a file or a folder: 'light_bulb_01' -> 'light bulb'."""
    return " ".join(re.sub(r"[\W_\d]+", " ", name).split()).lower()


def pictures(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each picture with its captions, in the order of their names."""
    for path in sorted(root.rglob("stamps/**/*.png")):
        said = path.with_suffix(".txt")
        lines = said.read_text("utf-8", "replace").splitlines() if said.is_file() else []
        if lines and lines[0].strip():
            yield path, [lines[0].strip().rstrip(".")]
    library = sorted(root.rglob("openclipart/png"))
    for path in sorted(p for folder in library for p in folder.rglob("*.png")):
        folders = path.relative_to(next(x for x in library if x in path.parents)).parts[:-1]
        name = words(path.stem)
        if name and folders and folders[0] not in LEFT_OUT:
            yield path, [name, f"{name}, {' '.join(words(f) for f in folders)}"]


def split_of(path: Path) -> str:
    """By the name without its last number."""
    stem = re.sub(r"[\W_]*\d+$", "", path.stem)
    share = int.from_bytes(sha256(stem.encode()).digest()[:4], "big") / 2**32
    return "test" if share < HELD_OUT else "train"


def build(root: Path, out: Path) -> dict[str, int]:
    """Write the folder; how many pictures each split has. Pictures that Pillow cannot read are left out."""
    counts = {"train": 0, "test": 0}
    for number, (path, captions) in enumerate(pictures(root)):
        try:
            with Image.open(path) as file:
                image = file.convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            continue
        image.thumbnail((SIDE, SIDE))
        side = max(image.size)
        paper = Image.new("RGB", (side, side), "white")
        paper.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
        split = split_of(path)
        target = out / split / f"{number:05}-{path.stem[:60]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        paper.save(target)
        target.with_suffix(".txt").write_text("\n".join(captions) + "\n", "utf-8")
        counts[split] += 1
    return counts


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
