"""The drawings of the documentation: `python -m docs.ext.drawings` writes docs/drawings/*.svg.

Boxes have a fill and dark words of their own, and arrows are grey, so that they are readable on light and dark pages.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "drawings"
FILLS = {
    "given": "#f3d9a4",
    "part": "#a9cdef",
    "made": "#b9dfb4",
    "frozen": "#d3c5e8",
    "note": "#dcdcdc",
}
"""Colours by the kind of thing: given by the user, a part of the model, made by it, frozen, other."""
LINE = "#8a8a8a"
FONT = "Helvetica, Arial, sans-serif"


class Drawing:
    """Boxes and arrows in a picture of some size."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, kind: str, *lines: str) -> None:
        """A box of a kind; its first line is bold."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{FILLS[kind]}"/>')
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for n, line in enumerate(lines):
            bold = ' font-weight="bold"' if n == 0 else ""
            self.words(x + width // 2, top + 18 * n, line, 14 if n == 0 else 12, extra=bold)

    def cell(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A small rectangle without words: a token, a weight, an image of a batch."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} rx="2" fill="{fill}" stroke="{LINE}" stroke-width="0.6"/>')

    def words(self, x: float, y: float, text: str, size: int = 12, colour: str = "#1c1c1c", extra: str = "") -> None:
        place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="middle"{extra}'
        self.parts.append(f"<text {place}>{escape(text)}</text>")

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        """A line through points, with a head at the last."""
        way = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{way}" fill="none" stroke="{LINE}" stroke-width="2"{dash} marker-end="url(#a)"/>'
        )

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONT}">'
        marker = (
            '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L10 5L0 10z" fill="{LINE}"/></marker></defs>'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", marker, *self.parts, "</svg>"]) + "\n"


def idea() -> Drawing:
    """The five parts of every model."""
    d = Drawing(860, 250, "Text, codec, network, head and order: the parts of every model")
    d.box(10, 30, 130, 54, "given", "a red heart", "caption")
    d.box(190, 30, 130, 54, "frozen", "text", "words to features")
    d.box(370, 30, 140, 54, "part", "network", "reads c and known x")
    d.box(560, 30, 130, 54, "part", "head", "p(x_i | z_i)")
    d.box(10, 160, 130, 54, "given", "image", "in training")
    d.box(190, 160, 130, 54, "frozen", "codec", "image to codes")
    d.box(370, 160, 140, 54, "made", "codes x", "known, and not yet")
    d.box(560, 160, 130, 54, "part", "order", "which i is next")
    d.box(735, 95, 115, 54, "made", "new image", "by the codec")
    d.arrow((140, 57), (188, 57))
    d.arrow((320, 57), (368, 57))
    d.words(344, 47, "c", 13, LINE)
    d.arrow((510, 57), (558, 57))
    d.words(534, 47, "z", 13, LINE)
    d.arrow((140, 187), (188, 187))
    d.arrow((320, 187), (368, 187))
    d.arrow((440, 160), (440, 86))
    d.arrow((625, 84), (625, 158))
    d.arrow((560, 187), (512, 187))
    d.arrow((440, 214), (440, 236), (792, 236), (792, 151))
    d.words(792 - 90, 228, "when all are known: decode", 12, LINE)
    return d


def batch() -> Drawing:
    """From records to an update."""
    d = Drawing(860, 250, "The path of a batch in training")
    d.box(10, 20, 150, 54, "given", "source", "records by number")
    d.box(200, 20, 190, 54, "part", "data pipeline", "example g = f(config, g)")
    d.box(430, 20, 190, 54, "part", "each process", "rows of its own devices")
    d.box(660, 20, 190, 54, "part", "global batch", "sharded over the mesh")
    d.box(660, 150, 190, 70, "frozen", "prepare", "bytes, codec, text:", "floats, codes, features")
    d.box(430, 150, 190, 70, "part", "gradients", "of every objective,", "at the same weights")
    d.box(200, 150, 190, 70, "part", "update", "optimiser, average;", "skipped if not finite")
    d.box(10, 150, 150, 70, "made", "state", "step n + 1:", "a checkpoint")
    for x in (160, 390, 620):
        d.arrow((x, 47), (x + 38, 47))
    d.arrow((755, 74), (755, 148))
    for x in (660, 430, 200):
        d.arrow((x, 185), (x - 38, 185))
    d.words(640, 120, "one compiled program from here on", 12, LINE)
    return d


def prompt() -> Drawing:
    """From a prompt to an image."""
    d = Drawing(860, 250, "The path of a prompt in sampling")
    d.box(10, 20, 150, 54, "given", "prompts, seeds", "and options")
    d.box(200, 20, 190, 54, "frozen", "text", "ids and features")
    d.box(430, 20, 190, 54, "part", "keys", "one of each seed")
    d.box(660, 20, 190, 54, "part", "program", "compiled once a config")
    d.box(660, 150, 190, 70, "part", "family samples", "with and without c:", "one batch of both")
    d.box(430, 150, 190, 70, "frozen", "codec decodes", "codes to pixels,", "in the same program")
    d.box(200, 150, 190, 70, "part", "upsampler", "a second pipeline,", "if there is one")
    d.box(10, 150, 150, 70, "made", "images", "uint8, with", "their metadata")
    for x in (160, 390, 620):
        d.arrow((x, 47), (x + 38, 47))
    d.arrow((755, 74), (755, 148))
    for x in (660, 430, 200):
        d.arrow((x, 185), (x - 38, 185))
    d.words(605, 120, "options are traced: another value compiles nothing", 12, LINE)
    return d


LAYERS = (
    (("cli",), "the t2i command"),
    (("fit",), "from a data set to a plan of training"),
    (("comparison", "api"), "models compared; load and train"),
    (("bench",), "speeds and errors against limits"),
    (("evaluation", "previews", "encode", "plan"), "uses of a model"),
    (("pipeline",), "prompts in, images out"),
    (("sampler",), "the compiled program"),
    (("release", "convert", "edits", "guides"), "files in and out; arguments"),
    (("training", "presets"), "step, loop, experiments"),
    (("models",), "one file a family"),
    (("text", "codecs", "data"), "words, images, records"),
    (("heads", "storage"), "distributions; checkpoints"),
    (("interop", "sampling"), "published names; orders, solvers"),
    (("networks", "features"), "DiT, UNet, GANs, conditions"),
    (("nn",), "layers, attention, kernels"),
    (("noise", "zoo"), "mathematics of noising; shipped models"),
    (("core",), "contracts, configs, mesh, errors"),
)
"""From the top; `tests/test_docs.py` compares them with the layers that a test holds."""


def layers() -> Drawing:
    """The layers of imports."""
    d = Drawing(860, 32 * len(LAYERS) + 20, "Layers of imports: each imports from those below it alone")
    for n, (packages, about) in enumerate(LAYERS):
        kind = ("given", "part", "frozen", "note")[min(n // 5, 3)]
        d.box(60, 10 + 32 * n, 400, 27, kind, ", ".join(packages))
        d.words(660, 28 + 32 * n, about, 13, LINE)
    d.arrow((30, 14), (30, 32 * len(LAYERS) + 4))
    return d


def orders() -> Drawing:
    """Which codes of a grid of 8 x 8 are drawn in which step, by order."""
    d = Drawing(730, 200, "Orders of 64 codes: darker ones are drawn earlier")
    left = [round(64 * math.cos(math.pi / 2 * n / 8)) for n in range(9)]
    scrambled = sorted(range(64), key=lambda n: math.sin(12.9898 * (n + 1)) * 43758.5453 % 1)
    step_of_rank = [next(s for s in range(8) if 64 - left[s + 1] > rank) for rank in range(64)]
    centre = sorted(range(64), key=lambda n: (n // 8 - 3.5) ** 2 + (n % 8 - 3.5) ** 2 + 5 * math.sin(7.3 * n))
    kinds = {
        "Raster": ("64 steps, row by row", {n: n / 63 for n in range(64)}),
        "Permutation": ("64 steps, at random", {n: rank / 63 for rank, n in enumerate(scrambled)}),
        "Sets": ("8 steps, growing sets", {n: step_of_rank[rank] / 7 for rank, n in enumerate(scrambled)}),
        "Confidence": ("8 steps, the surest first", {n: step_of_rank[rank] / 7 for rank, n in enumerate(centre)}),
    }
    for i, (name, (about, when)) in enumerate(kinds.items()):
        x = 30 + i * 175
        for n, share in when.items():
            shade = round(60 + 180 * share)
            d.cell(x + n % 8 * 15, 40 + n // 8 * 15, 13, 13, f"rgb({shade},{shade},240)")
        d.words(x + 59, 26, name, 14, LINE, ' font-weight="bold"')
        d.words(x + 59, 180, about, 12, LINE)
    return d


def game() -> Drawing:
    """The pairs that a discriminator of images and sentences sees."""
    d = Drawing(780, 235, "Real, generated and mismatched pairs")
    rows = [
        ("real image", "its sentence", "real", "made"),
        ("generated", "its sentence", "fake", "note"),
        ("real image", "another sentence", "fake", "note"),
    ]
    d.box(20, 88, 110, 50, "part", "G", "noise, sentence")
    d.arrow((130, 113), (178, 113))
    for n, (image, sentence, said, kind) in enumerate(rows):
        y = 22 + n * 72
        d.box(180, y, 130, 46, "given", image)
        d.box(320, y, 150, 46, "given", sentence)
        d.arrow((470, y + 23), (528, 117 + (n - 1) * 12))
        d.box(680, y, 80, 46, kind, said)
        d.arrow((620, 117 + (n - 1) * 12), (678, y + 23))
    d.box(530, 87, 90, 60, "part", "D")
    return d


def resume() -> Drawing:
    """A run that is stopped and goes on on another mesh."""
    d = Drawing(750, 222, "A run that goes on on other machines")
    for n in range(12):
        d.box(20 + n * 60, 60, 50, 36, "made" if n < 7 else "part", str(n))
    d.words(130, 42, "step n reads batch n, with key n", 13, LINE)
    d.arrow((435, 140), (435, 52), dashed=True)
    d.words(435, 158, "killed; the same command again", 13, LINE)
    d.words(225, 130, "64 chips", 13, LINE)
    d.words(600, 130, "128 chips: the same batches, the same keys", 13, LINE)
    d.box(330, 172, 210, 36, "frozen", "a checkpoint")
    return d


def axes() -> Drawing:
    """What each axis of a mesh divides, on four chips."""
    d = Drawing(750, 226, "What the axes of a mesh divide")
    kinds = {
        "data": "whole weights, part of the batch",
        "fsdp": "part of weights and batch",
        "tensor": "part of each layer",
    }
    weight, image, none = FILLS["part"], FILLS["given"], "none"
    for i, (name, about) in enumerate(kinds.items()):
        left = 20 + i * 245
        d.words(left + 110, 26, name, 15, LINE, ' font-weight="bold"')
        d.words(left + 110, 190, about, 12, LINE)
        for chip in range(4):
            x = left + chip * 56
            d.cell(x, 40, 50, 130, none)
            for n in range(4):
                mine = weight if name == "data" or n == chip else none
                if name == "tensor":
                    d.cell(x + 7 + n * 9, 48, 8, 58, mine)
                else:
                    d.cell(x + 7, 48 + n * 15, 36, 13, mine)
                d.cell(x + 7, 116 + n * 12, 36, 10, image if n == chip or name == "tensor" else none)
    d.words(375, 214, "blue: weights; yellow: images of the batch; four chips each", 12, LINE)
    return d


def tables() -> Drawing:
    """A line of a table leads from a published tensor to ours and back."""
    d = Drawing(750, 196, "A published file and a released model: describe and table")
    d.box(10, 40, 240, 110, "given", "model.safetensors", "layers.0.ffn.w1.weight (f, d)")
    d.box(310, 30, 150, 50, "part", "describe", "shapes to config")
    d.box(310, 110, 150, 50, "part", "table", "names, f d to d f")
    d.box(520, 40, 220, 110, "made", "released model", "blocks.mlp.gate.w (layer, d, f)")
    d.arrow((250, 60), (308, 55))
    d.arrow((460, 55), (518, 60))
    d.arrow((250, 120), (308, 128))
    d.arrow((460, 128), (518, 120))
    d.arrow((518, 142), (462, 150), dashed=True)
    d.arrow((308, 150), (252, 142), dashed=True)
    d.words(375, 186, "dashed: back to a published file, by the same table", 12, LINE)
    return d


DRAWINGS = {
    "idea": idea,
    "batch": batch,
    "prompt": prompt,
    "layers": layers,
    "orders": orders,
    "game": game,
    "resume": resume,
    "axes": axes,
    "tables": tables,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
