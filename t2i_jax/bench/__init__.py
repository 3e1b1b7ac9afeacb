"""`t2i bench sample|train|codec|data|plan`: speeds and the limits of this machine, measured in the same run;
`t2i bench check`: speeds of an accelerator against goals; `t2i bench solvers`: errors of solvers on a known law.

Speeds and limits are measured alternately, so that other load slows down both, and a share of a limit means the same on
a busy machine. Everything but `data` runs on random weights.
"""

from __future__ import annotations

import importlib

KINDS = {
    "sample": "drawing by the sampler of a config or run, or decoding a shape token by token",
    "train": "the train step of a config",
    "codec": "encoding and decoding images by the codec of a config",
    "data": "making batches from image files and from codes, against what chips consume",
    "check": "kernels, a train step and decoding on this accelerator, each against its goal",
    "plan": "what a plan counts for a step, against the measured step",
    "solvers": "errors of the solvers of Gaussian diffusion, where the best network is known",
}


def main(arguments: list[str]) -> None:
    """One of KINDS with its own arguments: prints a table, and writes JSON where `--out` says."""
    if not arguments or arguments[0] not in KINDS:
        asked = arguments[:1] in (["-h"], ["--help"])
        print("usage: t2i bench {" + ",".join(KINDS) + "} ...\n\n" + "\n".join(f"  {k:9}{v}" for k, v in KINDS.items()))
        print("\nExample: t2i bench sample --shape llamagen-b --batch 1 --int8")
        raise SystemExit(0 if asked else 2)
    importlib.import_module(f"t2i_jax.bench.{arguments[0]}").main(arguments[1:])
