"""The generated pages of the reference, as Markdown by path: they follow the code, and are in no commit."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import t2i_jax as t2i
from docs.ext import commands, links, reach
from docs.ext.entries import PUBLIC, docstring, entry, fields, first, link, name_of
from t2i_jax import convert
from t2i_jax.comparison.plan import Comparison
from t2i_jax.convert.hints import kind_name, takes
from t2i_jax.data import sources
from t2i_jax.presets import PRESETS
from t2i_jax.training.experiment import Experiment

Pages = dict[str, str]

SECTIONS = {
    "face": ("Load, draw, train", ("api", "pipeline", "edits", "guides")),
    "experiments": ("Experiments and comparisons", ("training", "comparison")),
    "models": ("Models", ("models",)),
    "networks": ("Networks and conditions", ("networks", "nn")),
    "heads": ("Heads", ("heads",)),
    "noise": ("Noise processes", ("noise",)),
    "sampling": ("Sampling options and orders", ("sampling",)),
    "codecs": ("Codecs", ("codecs",)),
    "text": ("Texts", ("text",)),
    "data": ("Data", ("data",)),
    "more": ("Mesh, dtype, errors, presets", ("core", "presets")),
}
"""Pages of the API: title, and the packages whose entries are there. Other packages come last, on pages of their own.
"""
MADE = "% Written from the code when the site is built: edit the docstrings, not this page.\n\n"


def pages() -> Pages:
    """Every generated page by its path below docs/."""
    made = {f"reference/api/{path}.md": text for path, text in api().items()}
    made |= {"reference/configs.md": configs(), "reference/formats.md": formats(), "reference/sources.md": of_sources()}
    made |= {"reference/commands.md": commands.page(), "reference/presets.md": presets()}
    made |= {path.removeprefix("docs/"): rewritten_root(name, path) for name, path in ROOT.items()}
    made["examples.md"] = examples()
    return {path: MADE + text for path, text in made.items()}


ROOT = {name: page for name, page in links.PAGES.items() if name.endswith(".md") and name != "README.md"}
"""Files at the root of the clone that are pages of the site too."""


def rewritten_root(name: str, page: str) -> str:
    return links.rewritten((links.HOME / name).read_text(), Path(name), Path(page))


def examples() -> str:
    """The files of examples/, whole."""
    lines = [
        "# Examples",
        "",
        "Parts of your own, one complete file each. `tests/test_examples.py` trains, stores, reads",
    ]
    lines += ["and samples them; [contributing](contributing.md#adding-a-part) has the lines that use them.", ""]
    for file in sorted((links.HOME / "examples").glob("[a-z]*.py")):
        lines += [
            f"## {file.name}",
            "",
            f"```{{literalinclude}} ../examples/{file.name}",
            ":language: python",
            "```",
            "",
        ]
    return _lines(*lines)


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def api() -> Pages:
    """Entries of all public names and of the other classes that a config file may hold."""
    rest, found = list(reach.documented()), {}
    known = {name for _, packages in SECTIONS.values() for name in packages}
    others = {p: (p.capitalize(), (p,)) for p in sorted({reach.package(t) for t in rest} - known)}
    for path, (title, packages) in (SECTIONS | others).items():
        rank = lambda thing, packages=packages: (packages.index(reach.package(thing)), thing not in PUBLIC)
        here = sorted((t for t in rest if reach.package(t) in packages), key=rank)
        lines = [f"# {title}", ""]
        for thing in here:
            if thing not in source_classes():
                lines += entry(thing)
        if path == "data":
            lines += ["Sources of records are on [a page of their own](../sources.md).", ""]
        if path == "more":
            lines += _variables()
        found[path] = _lines(*lines)
    index = ["# API", "", "All names of `import t2i_jax as t2i`, and the classes that a config may hold.", ""]
    index += ["```{toctree}", ":maxdepth: 1", "", *found, "```", "", "| name | what it is |", "|---|---|"]
    for thing in sorted(PUBLIC, key=lambda t: name_of(t).lower()):
        index.append(f"| {{py:obj}}`t2i.{name_of(thing).rpartition('.')[2]} <{name_of(thing)}>` | {_first(thing)} |")
    for name in VARIABLES:
        index.append(f"| {{py:obj}}`t2i.{name} <t2i_jax.{name}>` | {VARIABLES[name]} |")
    return found | {"index": _lines(*index)}


VARIABLES = {
    "PRESETS": "Configs of published shapes, and of our own, by name: [the table](../presets.md).",
    "__version__": "The version of the library.",
}
"""Public names that are neither classes nor functions."""


def _variables() -> Iterator[str]:
    for name, about in VARIABLES.items():
        yield from (f"## {name}", "", f"```{{py:data}} t2i_jax.{name}", ":no-typesetting:", "```", "", about, "")


def _first(thing: object) -> str:
    return first(thing).replace("|", "\\|")


CONFIGS = """# Config fields

A config file builds an `Experiment`, or a `Comparison` for `t2i compare`. Each is a frozen dataclass, and its fields
hold others. `--a.b=c` sets a field: `--train.optimizer.learning_rate=1e-3`. Every class below has a table of its
fields: type, default, range, and a sentence. A value outside of its range is refused when the config is made. A field
whose type is a protocol, such as `Experiment.model`, takes any class with its members,
[also one of your own](../contributing.md#adding-a-part).
"""


def configs() -> str:
    """A table of all config classes, with where a config file may have them."""
    classes = reach.configs()
    used: dict[type, list[str]] = {c: [] for c in classes}
    for owner in classes:
        hints = typing.get_type_hints(owner, include_extras=True)
        for field in fields(owner):
            for held in reach.held(hints[field.name]):
                used[held].append(f"{owner.__name__}.{field.name}")
    lines = [CONFIGS, "| class | fields | held by | what it is |", "|---|---|---|---|"]
    top = [Experiment, Comparison]
    for cls in [*top, *sorted((c for c in classes if c not in top), key=lambda c: c.__name__.lower())]:
        held = ", ".join(f"`{u}`" for u in used[cls][:4]) + (", ..." if len(used[cls]) > 4 else "")
        lines.append(f"| {link(cls)} | {sum(1 for _ in fields(cls))} | {held} | {_first(cls)} |")
    return _lines(*lines)


def presets() -> str:
    """Names, classes and sizes of presets."""
    lines = [
        "# Presets",
        "",
        '`t2i.preset("llamagen-b", grid=(24, 24), dtype="bfloat16")` is a config of a published shape.',
    ]
    lines += ["Any field, also one of a part, may have another value.", "", "| preset | class |", "|---|---|"]
    lines += [f"| `{name}` | {link(type(value))} |" for name, value in PRESETS.items()]
    return _lines(*lines)


def formats() -> str:
    """What `t2i convert` reads, with hints and examples."""
    groups = {module: importlib.import_module(f"t2i_jax.convert.{module}") for module in convert.MODULES}
    lines = ["# Formats of `t2i convert`", ""]
    lines += [
        "`t2i convert FORMAT FILE --out FOLDER` makes a released model of a published file, and `--back` a published"
    ]
    lines += [
        "file of a model of that kind. Configs are recognised from the shapes of the arrays. *Hints* are flags that say"
    ]
    lines += ["what shapes cannot (`--grid 24 24`); fields of the config may be given in the same way.", ""]
    for module in groups.values():
        lines += [f"## {_first(module).rstrip('.')}", ""]
        for name, form in sorted(module.FORMATS.items()):
            lines += [f"(format-{name})=", f"### `{name}`", "", form.title[:1].upper() + form.title[1:] + ".", ""]
            lines += ["```console", f"t2i convert {name} {form.example} --out models/{name}", "```", ""]
            hints = takes(form)
            made = inspect.signature(form.describe, eval_str=True).return_annotation
            if isinstance(made, type):
                lines += [f"* makes: `{made.__name__}`"]
            if hints:
                said = ", ".join(f"`--{k.replace('_', '-')}` ({kind_name(v)})" for k, v in hints.items())
                lines += [f"* hints: {said}"]
            if form.files:
                stems = ", ".join(f"`{s}`" + " (may be missing)" * (s in form.optional) for s in form.files)
                lines += [f"* reads a folder with several files, whose stems match {stems}"]
            if form.folder:
                lines += ["* reads a folder with settings, and takes its codec and text encoder where it has them"]
            lines += [""]
    return _lines(*lines)


def source_classes() -> list[type]:
    """The classes of `Source`, the type of `Data.source`."""
    return [c for c in reach.configs() if c.__module__ == sources.__name__]


def of_sources() -> str:
    """Every source of records."""
    lines = ["# Data sources", "", *docstring(sources)]
    lines += [f"A source is the first field of {{py:obj}}`Data <{name_of(t2i.Data)}>`:", ""]
    lines += [
        "```python",
        "import t2i_jax as t2i",
        "",
        'data = t2i.Data(t2i.Folder("photos"), batch_size=64)',
        "```",
        "",
    ]
    for cls in source_classes():
        lines += entry(cls)
    return _lines(*lines)
