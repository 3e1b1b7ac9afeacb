"""Pictures in a terminal: by the protocol of kitty or of iTerm2, as sixels, or as half blocks in colour.

What a terminal can draw is known by its environment; it is never asked, which could block or leave its answer in the
input. T2I_TERMINAL says otherwise: `kitty`, `iterm`, `sixel`, `blocks` (24-bit colours), `blocks256` or `none`, then
also where the output is no terminal.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Literal, TextIO, get_args

import numpy as np
from einops import rearrange
from PIL import Image

from t2i_jax.core.errors import ConfigError

Protocol = Literal["kitty", "iterm", "sixel", "blocks", "blocks256"]
SETTING = "T2I_TERMINAL"
CHUNK = 4096
"""Most characters of an escape sequence of kitty."""
UPPER = "\N{UPPER HALF BLOCK}"
LEVELS = np.asarray([0, 95, 135, 175, 215, 255])
"""Of each colour in the cube of 256-colour terminals."""


def protocol(env: Mapping[str, str], terminal: bool) -> Protocol | None:
    """How to draw in a terminal of this environment; None: not at all. terminal: whether the output is one.

    Errors: `ConfigError` for a value of T2I_TERMINAL that is none of those.
    """
    if said := env.get(SETTING, "").lower():
        for known in get_args(Protocol):
            if said == known:
                return known
        if said == "none":
            return None
        raise ConfigError(f"{SETTING}={said}: one of {', '.join(get_args(Protocol))}, none is wanted")
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    if not terminal or term in ("", "dumb", "linux", "vt100"):
        return None
    nested = "TMUX" in env or "STY" in env or term.startswith(("screen", "tmux"))  # these pass no pictures on
    if not nested:
        if "KITTY_WINDOW_ID" in env or "kitty" in term or program == "ghostty" or "ghostty" in term:
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or env.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if term.startswith(("foot", "mlterm", "contour")) or "sixel" in term:
            return "sixel"
    true = env.get("COLORTERM", "") in ("truecolor", "24bit") or "direct" in term or "WT_SESSION" in env
    return "blocks" if true else "blocks256"


def draw(picture: Image.Image, plain: Image.Image | None = None, out: TextIO | None = None) -> bool:
    """Draw a picture on `out`, the standard output unless given; returns whether it could.

    plain: what to draw in its place where a character has two pixels.
    """
    stream = sys.stdout if out is None else out
    how = protocol(os.environ, stream.isatty())
    if how is None:
        return False
    columns, wide = _window(stream)
    if how in ("blocks", "blocks256"):
        lines = blocks(fitted(plain or picture, columns), how == "blocks256")
    elif how == "sixel":
        lines = sixel(fitted(picture, wide) if wide else picture)
    else:
        limit = columns if wide and picture.width > wide else 0
        lines = (kitty if how == "kitty" else iterm)(picture, limit)
    try:
        for line in lines:
            stream.write(line)
        stream.write("\n")
        stream.flush()
    except UnicodeEncodeError:  # the terminal's encoding has no half blocks
        return False
    return True


def _window(out: TextIO) -> tuple[int, int]:
    """Columns of a terminal, and its width in pixels, 0 where it does not say."""
    columns = shutil.get_terminal_size().columns
    with contextlib.suppress(ImportError, OSError, ValueError):
        import fcntl  # not on every system
        import termios

        _, wide, pixels, _ = struct.unpack("HHHH", fcntl.ioctl(out.fileno(), termios.TIOCGWINSZ, bytes(8)))
        return wide or columns, pixels
    return columns, 0


def fitted(picture: Image.Image, width: int) -> Image.Image:
    """A picture that is at most `width` pixels wide."""
    if picture.width <= width:
        return picture
    height = max(1, round(picture.height * width / picture.width))
    return picture.convert("RGB").resize((width, height), Image.Resampling.BOX)


def kitty(picture: Image.Image, columns: int = 0) -> Iterator[str]:
    """Escape sequences of kitty's graphics protocol, in parts of 4096 characters; columns: how wide; 0: as it is."""
    data = base64.b64encode(_png(picture)).decode()
    parts = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    about = "a=T,f=100,q=2" + (f",c={columns}" if columns else "")
    for n, part in enumerate(parts):
        more = f"m={int(n + 1 < len(parts))}"
        yield f"\x1b_G{f'{about},{more}' if n == 0 else more};{part}\x1b\\"


def iterm(picture: Image.Image, columns: int = 0) -> Iterator[str]:
    """The escape sequence of iTerm2's inline images; columns: how wide; 0: as it is."""
    data = _png(picture)
    about = f"inline=1;size={len(data)}" + (f";width={columns}" if columns else "")
    yield f"\x1b]1337;File={about}:{base64.b64encode(data).decode()}\a"


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def sixel(picture: Image.Image) -> Iterator[str]:
    """A picture as sixels, in at most 256 colours of its own, whose parts are hundredths."""
    reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    index, palette = np.asarray(reduced), np.asarray(reduced.getpalette("RGB")).reshape(-1, 3)
    rows, columns = index.shape
    yield f'\x1bP0;1;0q"1;1;{columns};{rows}'
    for colour in np.unique(index):
        yield f"#{colour};2;" + ";".join(str(round(x * 100 / 255)) for x in palette[colour])
    for top in range(0, rows, 6):
        band = index[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        for n, colour in enumerate(np.unique(band)):
            codes = ((band == colour) * bits).sum(0)
            runs = ((chr(63 + code), len(list(same))) for code, same in groupby(codes.tolist()))
            yield ("$" if n else "") + f"#{colour}" + "".join(_run(*one) for one in runs)
        yield "-"
    yield "\x1b\\"


def _run(character: str, count: int) -> str:
    """A character so often, in the shorter way."""
    return f"!{count}{character}" if count > 3 else character * count


def blocks(picture: Image.Image, few: bool = False) -> Iterator[str]:
    """A picture as lines of half blocks: a character is two pixels, one above the other. few: in the 240 colours that
    all terminals of 256 have in common."""
    pixels = np.asarray(picture.convert("RGB"))
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    pairs = rearrange(pixels, "(i two) j c -> i j two c", two=2)
    for row in pairs:
        before, line = None, []
        for upper, lower in row.tolist():
            colours = _colour(38, upper, few), _colour(48, lower, few)
            line.append(UPPER if colours == before else f"\x1b[{colours[0]};{colours[1]}m{UPPER}")
            before = colours
        yield "".join(line) + "\x1b[0m\n"


def _colour(ground: int, rgb: list[int], few: bool) -> str:
    """The parameters of a colour, 38 of the foreground and 48 of the background."""
    if not few:
        return f"{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}"
    return f"{ground};5;{nearest(rgb)}"


def nearest(rgb: list[int]) -> int:
    """The colour of a 256-colour terminal that is nearest: of its cube, or of its greys."""
    cube = [int(np.abs(LEVELS - x).argmin()) for x in rgb]
    grey = min(23, max(0, round((sum(rgb) / 3 - 8) / 10)))
    error = lambda found: sum((a - b) ** 2 for a, b in zip(found, rgb, strict=True))
    if error([8 + 10 * grey] * 3) < error([int(LEVELS[n]) for n in cube]):
        return 232 + grey
    return 16 + 36 * cube[0] + 6 * cube[1] + cube[2]
