"""Pictures in a terminal: what is written is read back to the pixels, and an environment to what it can draw."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from t2i_jax.core import terminal
from t2i_jax.core.errors import ConfigError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 17, 3)).astype(np.uint8))
PIXELS = np.asarray(PICTURE)


def png(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def of_blocks(text):
    """The colours of half blocks, (i, j, 2) of each character's upper and lower pixel."""
    rows = []
    for line in text.splitlines():
        row, now = [], None
        for codes, block in re.findall(r"\x1b\[([\d;]*)m|(▀)", line):
            if block:
                row.append(now)
            elif codes != "0":
                numbers = list(map(int, codes.split(";")))
                now = (
                    tuple(tuple(numbers[at + 2 : at + 5]) for at in (0, 5))
                    if len(numbers) == 10
                    else (
                        numbers[2],
                        numbers[5],
                    )
                )
        rows.append(row)
    return rows


def of_sixels(text):
    """The picture of sixels, uint8 (i, j, 3), by the definition of DEC."""
    body = re.fullmatch(r'\x1bP0;1;0q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL)
    assert body
    columns, rows = int(body[1]), int(body[2])
    image, palette = np.zeros((-(-rows // 6) * 6, columns, 3)), {}
    x = top = colour = 0
    for part in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|(\$)|(-)|([?-~])", body[3]):
        if part[1]:
            palette[int(part[1])] = [int(part[n]) * 255 / 100 for n in (2, 3, 4)]
        elif part[5]:
            colour = int(part[5])
        elif part[8]:
            x = 0
        elif part[9]:
            x, top = 0, top + 6
        else:
            count, code = (int(part[6]), part[7]) if part[6] else (1, part[10])
            for row in (n for n in range(6) if ord(code) - 63 >> n & 1):
                image[top + row, x : x + count] = palette[colour]
            x += count
    return image[:rows]


def test_kitty_gets_the_file_in_parts():
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    said = "".join(terminal.kitty(large, 7))
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", said)
    assert "".join(f"\x1b_G{about};{data}\x1b\\" for about, data in parts) == said
    assert len(parts) > 2 and all(len(data) <= 4096 for _, data in parts)
    assert parts[0][0] == "a=T,f=100,q=2,c=7,m=1" and [about for about, _ in parts[1:]][-1] == "m=0"
    assert all(len(data) % 4 == 0 for _, data in parts)
    np.testing.assert_array_equal(png("".join(data for _, data in parts)), np.asarray(large))


def test_iterm_gets_the_file():
    (said,) = terminal.iterm(PICTURE, 5)
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=5:(.*)\a", said)
    assert found and int(found[1]) == len(base64.b64decode(found[2]))
    np.testing.assert_array_equal(png(found[2]), PIXELS)


def test_sixels_are_the_picture():
    drawn = of_sixels("".join(terminal.sixel(PICTURE)))  # 221 colours, each of a pixel: none is merged
    np.testing.assert_allclose(drawn, PIXELS, atol=1.3)  # hundredths of 255


def test_sixels_of_one_colour_are_runs():
    plain = Image.new("RGB", (300, 12), (255, 0, 0))
    said = "".join(terminal.sixel(plain))
    assert len(said) < 100
    np.testing.assert_array_equal(of_sixels(said), np.asarray(plain))


def test_blocks_are_two_pixels_each():
    rows = of_blocks("".join(terminal.blocks(PICTURE)))
    assert len(rows) == 7 and all(len(row) == 17 for row in rows)
    drawn = np.asarray(rows).transpose(0, 2, 1, 3).reshape(14, 17, 3)
    np.testing.assert_array_equal(drawn[:13], PIXELS)
    np.testing.assert_array_equal(drawn[13], PIXELS[12])  # the last row of an odd number, once more


def test_blocks_of_256_colours_are_the_nearest():
    cube = [(r, g, b) for r in terminal.LEVELS for g in terminal.LEVELS for b in terminal.LEVELS]
    colours = np.asarray(cube + [(8 + 10 * n,) * 3 for n in range(24)], float)  # of 16 to 255
    (row,) = of_blocks("".join(terminal.blocks(PICTURE.crop((0, 0, 17, 2)), few=True)))
    for at, pair in enumerate(row):
        for pixel, index in zip(PIXELS[:2, at], pair, strict=True):
            errors = ((colours - pixel) ** 2).sum(1)
            assert errors[index - 16] == errors.min()


@pytest.mark.parametrize(
    "env, how",
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks256"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "blocks256"),
        ({"TERM": "xterm-kitty", "TMUX": "x", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({}, None),
        ({"TERM": "xterm-kitty", "T2I_TERMINAL": "none"}, None),
        ({"TERM": "xterm-kitty", "T2I_TERMINAL": "sixel"}, "sixel"),
    ],
)
def test_an_environment_says_what_its_terminal_draws(env, how):
    assert terminal.protocol(env, True) == how


def test_what_is_no_terminal_gets_nothing_unless_asked(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-kitty")
    monkeypatch.delenv("T2I_TERMINAL", raising=False)
    assert not terminal.draw(PICTURE)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("T2I_TERMINAL", "blocks")
    assert terminal.draw(PICTURE)
    assert capsys.readouterr().out == "".join(terminal.blocks(PICTURE)) + "\n"
    with pytest.raises(ConfigError, match=r"T2I_TERMINAL=png: one of kitty, .* is wanted"):
        terminal.protocol({"T2I_TERMINAL": "png"}, True)


def test_a_picture_is_drawn_no_wider_than_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("T2I_TERMINAL", "blocks")
    monkeypatch.setenv("COLUMNS", "9")
    large = Image.new("RGB", (90, 40), (1, 2, 3))
    assert terminal.draw(large)
    rows = of_blocks(capsys.readouterr().out.rstrip("\n"))
    assert [len(row) for row in rows] == [9] * 2 and rows[0][0] == ((1, 2, 3), (1, 2, 3))
