"""The drawings of the documentation: `python -m docs.ext.drawings` writes docs/drawings/*.svg.

Boxes have a fill and dark words of their own, and arrows are grey, so that they are readable on light and dark pages.
"""

from __future__ import annotations

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


DRAWINGS = {"idea": idea, "batch": batch, "prompt": prompt, "layers": layers}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
