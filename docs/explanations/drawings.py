"""The drawings of the explanations, as SVG next to their pages: python docs/explanations/drawings.py."""

from __future__ import annotations

import math
from pathlib import Path

INK, LINE = "#1f2933", "#7b8794"
BLUE, GREEN, YELLOW, PINK, GREY = "#dbeafe", "#dcfce7", "#fef3c7", "#fce7f3", "#f1f5f9"


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}" {style}>{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str, title: str, under: str = "") -> str:
    rect = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="{LINE}"/>'
    middle = x + w / 2
    named = text(middle, y + h / 2 + (-3 if under else 5), title, 14, style='font-weight="600"')
    return rect + named + (text(middle, y + h / 2 + 15, under, 11) if under else "")


def arrow(x0: float, y0: float, x1: float, y1: float, label: str = "", dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{LINE}" stroke-width="1.6"{dash} '
    line += 'marker-end="url(#tip)"/>'
    italic = 'font-style="italic"'
    return line + (text((x0 + x1) / 2, (y0 + y1) / 2 - 6, label, 13, style=italic) if label else "")


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    )
    ground = f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    head += f'role="img" font-family="system-ui, sans-serif"><title>{title}</title>'
    return head + tip + ground + "\n".join(parts) + "</svg>\n"


def orders() -> str:
    """Which codes of a grid of 8 x 8 are drawn in which step, by order: darker is earlier."""
    side, cell = 8, 13
    shares = [round(64 * math.cos(math.pi / 2 * n / 8)) for n in range(9)]
    scrambled = sorted(range(64), key=lambda n: math.sin(12.9898 * (n + 1)) * 43758.5453 % 1)
    step_of_rank = [next(s for s in range(8) if 64 - shares[s + 1] > rank) for rank in range(64)]
    centre = sorted(range(64), key=lambda n: (n // 8 - 3.5) ** 2 + (n % 8 - 3.5) ** 2 + 5 * math.sin(7.3 * n))
    kinds = {
        "Raster": ("64 steps, row by row", {n: n / 63 for n in range(64)}),
        "Permutation": ("64 steps, at random", {n: rank / 63 for rank, n in enumerate(scrambled)}),
        "Sets": ("8 steps, growing sets", {n: step_of_rank[rank] / 7 for rank, n in enumerate(scrambled)}),
        "Confidence": ("8 steps, the surest first", {n: step_of_rank[rank] / 7 for rank, n in enumerate(centre)}),
    }
    parts = []
    for i, (name, (about, when)) in enumerate(kinds.items()):
        left = 30 + i * 175
        for n, share in when.items():
            shade = round(60 + 180 * share)
            x, y = left + n % side * (cell + 2), 40 + n // side * (cell + 2)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" rx="2" fill="rgb({shade},{shade},240)"/>'
            )
        parts.append(text(left + 59, 26, name, 14, style='font-weight="600"'))
        parts.append(text(left + 59, 180, about, 12))
    return drawing(730, 200, "orders: darker codes are drawn earlier", parts)


def game() -> str:
    """The pairs that a discriminator of pictures and sentences sees."""
    rows = [
        ("real picture", "its sentence", "real", GREEN),
        ("drawn picture", "its sentence", "fake", PINK),
        ("real picture", "another sentence", "fake", PINK),
    ]
    parts = [box(20, 88, 110, 50, YELLOW, "G", "noise, sentence"), arrow(130, 113, 178, 113)]
    for n, (picture, sentence, said, fill) in enumerate(rows):
        y = 22 + n * 72
        parts += [box(180, y, 130, 46, GREY, picture), box(320, y, 150, 46, BLUE, sentence)]
        parts += [arrow(470, y + 23, 528, 117 + (n - 1) * 12)]
        parts += [box(680, y, 80, 46, fill, said), arrow(620, 117 + (n - 1) * 12, 678, y + 23)]
    return drawing(780, 235, "real, drawn and mismatched pairs", [*parts, box(530, 87, 90, 60, YELLOW, "D")])


def checkpoint() -> str:
    """A run that is stopped and goes on on another mesh."""
    parts = []
    for n in range(12):
        parts.append(box(20 + n * 60, 60, 50, 36, GREEN if n < 7 else BLUE, str(n)))
    parts += [
        text(45, 42, "step n reads batch n, with key n", 13, "start"),
        f'<line x1="435" y1="50" x2="435" y2="140" stroke="{LINE}" stroke-width="2" stroke-dasharray="5 4"/>',
        text(435, 158, "killed; the same command again", 13),
        text(225, 130, "64 chips", 13),
        text(590, 130, "128 chips: the same batches, the same keys", 13),
        box(330, 172, 210, 36, YELLOW, "a checkpoint"),
    ]
    return drawing(750, 222, "a run that goes on elsewhere", parts)


def fsdp() -> str:
    """What each axis of a mesh divides, on four chips."""
    parts = []
    for i, (name, about) in enumerate(
        {
            "data": "whole weights, part of the batch",
            "fsdp": "part of weights and batch",
            "tensor": "part of each layer",
        }.items()
    ):
        left = 20 + i * 245
        parts.append(text(left + 110, 26, name, 15, style='font-weight="600"'))
        parts.append(text(left + 110, 190, about, 12))
        for chip in range(4):
            x = left + chip * 56
            parts.append(f'<rect x="{x}" y="40" width="50" height="130" rx="6" fill="{GREY}" stroke="{LINE}"/>')
            for part in range(4):
                fill = BLUE if name == "data" or part == chip else "#ffffff"
                w = f'x="{x + 7}" y="{48 + part * 15}" width="36" height="13"'
                if name == "tensor":
                    w = f'x="{x + 7 + part * 9}" y="48" width="8" height="58"'
                parts.append(f'<rect {w} rx="2" fill="{fill}" stroke="{LINE}" stroke-width="0.6"/>')
            for row in range(4):
                mine = row == chip or name == "tensor"
                fill = YELLOW if mine else "#ffffff"
                parts.append(
                    f'<rect x="{x + 7}" y="{116 + row * 12}" width="36" height="10" rx="2" fill="{fill}" '
                    f'stroke="{LINE}" stroke-width="0.6"/>'
                )
    parts.append(text(375, 214, "blue: weights &#160; yellow: images of the batch &#160; four chips each", 12))
    return drawing(750, 226, "what the axes of a mesh divide", parts)


def tables() -> str:
    """A line of a table leads from a published tensor to ours and back."""
    parts = [
        box(20, 40, 220, 110, BLUE, "model.safetensors", "layers.0.ffn.w1.weight (f, d)"),
        box(300, 30, 160, 50, YELLOW, "describe", "shapes to config"),
        box(300, 110, 160, 50, YELLOW, "table", "names, f d -&gt; d f"),
        box(520, 40, 210, 110, GREEN, "released model", "blocks.mlp.gate.w (layer, d, f)"),
        arrow(240, 60, 298, 55),
        arrow(460, 55, 518, 60),
        arrow(240, 120, 298, 128),
        arrow(460, 128, 518, 120),
        arrow(518, 140, 462, 148, dashed=True),
        arrow(298, 148, 242, 140, dashed=True),
        text(375, 182, "dashed: back to a published file, by the same table", 12),
    ]
    return drawing(750, 196, "describe and table", parts)


DRAWINGS = {"orders": orders, "game": game, "resume": checkpoint, "axes": fsdp, "tables": tables}

if __name__ == "__main__":
    for name, make in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(make(), encoding="utf-8")
