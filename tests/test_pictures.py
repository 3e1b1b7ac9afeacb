"""Grids hold every picture to the pixel; files hold captions and are whole or absent."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.image_files import (
    METADATA,
    claim,
    describe,
    grid,
    load_font,
    read_png_text,
    save_png,
    side_by_side,
    to_uint8,
    wrap,
)
from t2i_jax.data.found import find_source

DATA = np.load(Path(__file__).parent / "assets" / "tiny_twemoji32.npz")
IMAGES, CAPTIONS = DATA["images"], DATA["captions"].tolist()


def holds(sheet: Image.Image, picture: np.ndarray, scale: int) -> bool:
    """Whether the enlarged picture is somewhere in the sheet."""
    sheet, big = np.asarray(sheet), picture.repeat(scale, 0).repeat(scale, 1)
    starts = np.argwhere((sheet == big[0, 0]).all(-1))
    height, width = big.shape[:2]
    return any(np.array_equal(sheet[y : y + height, x : x + width], big) for y, x in starts)


def test_to_uint8_inverts_the_scaling():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(values / np.float32(127.5) - 1), values)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_every_picture_is_in_the_grid(columns):
    first, second = np.random.default_rng(0).integers(0, 256, (2, 5, 12, 16, 3), dtype=np.uint8)
    sheet = grid(first, CAPTIONS[:5], columns, scale=2, title="five")
    assert all(holds(sheet, p, 2) for p in first)
    sheet = side_by_side(first, second, CAPTIONS[:5], columns, scale=2)
    assert all(holds(sheet, p, 2) for p in [*first, *second])


def test_any_caption_can_be_drawn():
    captions = ["", "a" * 10_000, "word " * 2000, "Côte d’Ivoire", "пирог, 寿司 🍣"]
    plain, full = grid(IMAGES[:5], scale=4), grid(IMAGES[:5], captions, scale=4)
    assert full.size[0] == plain.size[0] and plain.size[1] < full.size[1] < 2 * plain.size[1]


def test_wrap():
    font = load_font(14)
    lines = wrap("a long caption of some words and one Donaudampfschifffahrtsgesellschaft", font, 90, most=20)
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == "alongcaptionofsomewordsandoneDonaudampfschifffahrtsgesellschaft"
    short = wrap("one two three four five six", font, 40, most=2)
    assert len(short) == 2 and short[-1].endswith("…") and font.getlength(short[-1]) <= 40


def test_png_remembers(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(IMAGES[0], path, ["Côte d’Ivoire"], {"seed": 3, "model": "tiny"})
    np.testing.assert_array_equal(np.asarray(Image.open(path)), IMAGES[0])
    text = read_png_text(path)
    assert text["Description"] == "Côte d’Ivoire" and text["seed"] == "3" and text["model"] == "tiny"
    save_png(grid(IMAGES[:2], CAPTIONS[:2]), path, CAPTIONS[:2])
    assert json.loads(read_png_text(path)["Description"]) == CAPTIONS[:2]
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(IMAGES[0], path)
    before = path.read_bytes()

    def full_disk(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_png(IMAGES[1], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_wrong_sets_are_named():
    with pytest.raises(ValueError, match="2 images with 3 captions"):
        grid(IMAGES[:2], CAPTIONS[:3])
    with pytest.raises(ValueError, match="to_uint8"):
        grid(IMAGES[:2] / 255)
    with pytest.raises(ValueError, match="do not pair"):
        side_by_side(IMAGES[:2], IMAGES[:3], CAPTIONS[:2])


def test_drawn_images_are_a_data_set_with_their_prompts(tmp_path):
    """Prior preservation reads what the base drew: the sheet of them is no example."""
    files, about = [tmp_path / f"{n:05d}.png" for n in range(2)], [{"prompt": p, "seed": "7"} for p in CAPTIONS[:2]]
    for path, image, one in zip(files, IMAGES, about, strict=False):
        save_png(image, path, metadata=one)
    save_png(grid(IMAGES[:2]), tmp_path / "grid.png")
    describe(files, about)
    reader = find_source(str(tmp_path)).source.open()
    assert len(reader) == 2 and [reader[n]["captions"] for n in range(2)] == [[c] for c in CAPTIONS[:2]]
    assert claim(files[:1], about[:1], ("grid.png",)) == [True]
    assert (tmp_path / "earlier-1" / METADATA).exists() and not (tmp_path / METADATA).exists()
    (tmp_path / METADATA).write_text('{"file_name": "00000.png", "text": "mine"}\n')
    with pytest.raises(ConfigError, match=METADATA):
        claim(files, about, ("grid.png",))
    assert "mine" in (tmp_path / METADATA).read_text()
