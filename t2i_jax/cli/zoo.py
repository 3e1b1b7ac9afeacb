"""`t2i zoo`: the models inside the package."""

from __future__ import annotations

import dataclasses

import tyro
from PIL import Image
from rich.markup import escape

from t2i_jax import zoo
from t2i_jax.core.config import ConfigError, parse
from t2i_jax.core.console import stdout
from t2i_jax.core.errors import did_you_mean
from t2i_jax.core.terminal import draw

NONE = """There are no models in this copy of t2i_jax.
Train one by `make quickstart`, or read one of a hub: t2i sample hf://ORG/NAME "a red heart"."""


@dataclasses.dataclass(frozen=True)
class ZooArguments:
    """List the models inside the package, which are named wherever a model is: t2i sample NAME "a red heart".

    Example: t2i zoo emoji-64
    """

    name: tyro.conf.Positional[str] = ""
    """one model, with all that was measured; all of them unless given"""
    show: bool = True
    """draw the picture of each, in a terminal that can"""


def run(arguments: list[str]) -> None:
    args = parse(ZooArguments, arguments, "t2i zoo")
    found, out = zoo.models(), stdout()
    if args.name and args.name not in found:
        there = did_you_mean(args.name, found) or (f"; there are {', '.join(found)}" if found else "; it has none yet")
        raise ConfigError(f"{args.name}: the zoo has no such model{there}")
    if not found:
        out.print(NONE, markup=False, highlight=False)
    for model in [found[args.name]] if args.name else found.values():
        rows, columns = model.size
        about = f"{model.family}, {rows}x{columns} pixels, {model.bytes / 1e6:.1f} MB, {model.licence}"
        out.print(f"[bold]{escape(model.name)}[/]  {escape(model.title)}", highlight=False)
        out.print(f"  {about}", markup=False, highlight=False)
        if model.needs:
            out.print(f"  needs: {model.needs}", markup=False, highlight=False)
        if args.name:
            for name, value in model.figures.items():
                out.print(f"  {name}: {value:g}", markup=False, highlight=False)
        if model.picture.exists() and not (args.show and draw(Image.open(model.picture))):
            out.print(f"  picture: {model.picture}", markup=False, highlight=False, soft_wrap=True)
        out.print(f'  t2i sample {model.name} "a red heart"\n', markup=False, highlight=False)
