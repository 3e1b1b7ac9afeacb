"""Tables, plots and a sheet of images of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_jax.bench.measure import Result
from t2i_jax.comparison.measure import ReferenceSet
from t2i_jax.comparison.plan import Comparison, Sweep
from t2i_jax.core import image_files
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.outputs import MAKER, write_json, write_markdown

COLUMNS: dict[str, tuple[str, str]] = {
    "efficientnet_lite0/top1": ("top-1, network", "{:.2f}"),
    "pixels/top1": ("top-1, pixels", "{:.2f}"),
    "efficientnet_lite0/frechet": ("Fréchet, network", "{:.1f}"),
    "pixels/frechet": ("Fréchet, pixels", "{:.2f}"),
    "efficientnet_lite0/precision": ("precision", "{:.2f}"),
    "efficientnet_lite0/recall": ("recall", "{:.2f}"),
    "efficientnet_lite0/coverage": ("coverage", "{:.2f}"),
    "seconds_per_image": ("s / image", "{:.3f}"),
    "gflops_per_image": ("GFLOP / image", "{:.2f}"),
    "share_of_limit": ("of FLOP limit", "{:.0%}"),
}
RUN_COLUMNS: dict[str, tuple[str, str]] = {
    "parameters": ("parameters", "{:.3g}"),
    "steps": ("steps", "{:.0f}"),
    "training_minutes": ("training, min", "{:.1f}"),
    "val/bits_per_token": ("held-out bits / token", "{:.2f}"),
}


def files_of(comparison: Comparison, out: Path) -> list[Path]:
    """The files of `write`. Errors: `ConfigError` for a path without a name."""
    if not out.name:  # ".", "/"
        raise ConfigError(f"--out {out}: is a folder; name a file")
    plots = [plot_of(out, name) for name in comparison.sweeps]
    return [*(out.with_suffix(suffix) for suffix in (".json", ".md", ".png")), *plots]


def plot_of(out: Path, sweep: str) -> Path:
    """The file of a sweep's plot."""
    return out.with_name(f"{out.stem}_{sweep}.png")


def write(
    comparison: Comparison,
    found: Result,
    reference: ReferenceSet,
    sheets: Mapping[str, np.ndarray],
    out: Path,
    command: str,
) -> None:
    """OUT.md, OUT.json, OUT.png (images) and OUT_SWEEP.png (plots)."""
    write_json(out.with_suffix(".json"), found)
    image_files.save_png(sheet(reference, sheets), out.with_suffix(".png"))
    lines = [f"# {comparison.title}", "", comparison.about.strip(), ""]
    lines += [f"Made by `{command}` on {found['device']}.", ""] if command else []
    lines += [
        f"Each model was trained with {comparison.flops:.3g} FLOPs: three times its forward passes, frozen parts not "
        "counted. "
        f"{len(reference.prompts)} images each, of known concepts in words that were not trained on; retrieval finds "
        f"the concept among {len(reference.prompts)}, by chance {found['chance']:.2g}. Fréchet distances of so few "
        "images compare within this page only. "
        f"{_repeats(comparison.repeats)}Speed is that of a batch of "
        f"{comparison.batch_size}, text and decoding included, against the best matrix product before and after.",
        "",
        *table({**found["runs"], "real images": found["real"]}, {**RUN_COLUMNS, **COLUMNS}),
        *(["", "To guide others:", "", *table(found["guides"], RUN_COLUMNS)] if found.get("guides") else []),
        "",
        f"![images]({out.with_suffix('.png').name})",
    ]
    for name, sweep in comparison.sweeps.items():
        points = found["sweeps"][name]
        plot(sweep, points, found["real"], image := plot_of(out, name))
        lines += ["", f"## {sweep.title}", "", *([sweep.about.strip(), ""] if sweep.about else [])]
        rows = {
            f"{label}, {sweep.field} {value:g}": numbers
            for label, values in points.items()
            for value, numbers in zip(sweep.values, values, strict=True)
        }
        lines += [*table(rows, COLUMNS), "", f"![{sweep.title}]({image.name})"]
    write_markdown(out.with_suffix(".md"), "\n".join(lines))


def _repeats(count: int) -> str:
    if count == 1:
        return ""
    return f"Numbers are means over {count} trainings with different seeds, ± half of an interval of 95 %. "


def table(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Rows of Markdown, without columns that no row has. An interval follows its mean, but for what does not vary."""
    used = {k: c for k, c in columns.items() if any(k in numbers for numbers in rows.values())}

    def cell(numbers: Mapping[str, float], k: str, form: str) -> str:
        if k not in numbers:
            return "-"
        interval = numbers.get(f"{k}/interval", 0.0)
        return (form.format(numbers[k]) if numbers[k] else "0") + (f" ± {form.format(interval)}" if interval else "")

    lines = ["| | " + " | ".join(title for title, _ in used.values()) + " |", "|---|" + "---:|" * len(used)]
    for name, numbers in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(numbers, k, form) for k, (_, form) in used.items()) + " |")
    return lines


def sheet(reference: ReferenceSet, sheets: Mapping[str, np.ndarray], rows: int = 12) -> Image.Image:
    """A row a prompt: the real image, then that of each run."""
    chosen = np.linspace(0, len(reference.prompts) - 1, rows).round().astype(int)
    columns = {"real": reference.real, **sheets}
    images = np.stack([images[chosen] for images in columns.values()], 1)
    names = [f"{name}: {reference.prompts[i]}" if name == "real" else name for i in chosen for name in columns]
    return image_files.grid(images.reshape(-1, *images.shape[2:]), names, columns=len(columns), scale=3)


def plot(sweep: Sweep, points: Mapping[str, list[dict[str, float]]], real: Mapping[str, float], path: Path) -> None:
    """Quality over the swept option, and quality over seconds per image."""
    from matplotlib.figure import Figure

    figure = Figure((14, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("pixels/top1", "retrieval top-1, pixels", sweep.field),
        ("efficientnet_lite0/frechet", "Fréchet distance, EfficientNet", sweep.field),
        ("efficientnet_lite0/top1", "retrieval top-1, EfficientNet", "seconds per image"),
    )
    for axis, (name, title, across) in zip(axes, panels, strict=True):
        for label, numbers in points.items():
            x = sweep.values if across == sweep.field else [n["seconds_per_image"] for n in numbers]
            axis.plot(x, [n[name] for n in numbers], marker="o", label=label)
        if real.get(name):
            axis.axhline(real[name], color="grey", linestyle=":", label="real images")
        wide = min(sweep.values) > 0 and max(sweep.values) / min(sweep.values) >= 8
        if wide or across != sweep.field:
            axis.set_xscale("log")
        axis.set(xlabel=across, ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(sweep.title)
    figure.savefig(path, dpi=80, metadata={"Software": MAKER})
