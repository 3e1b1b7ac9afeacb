"""Solvers on Gaussian images, whose best denoiser is known: agreement with an independent recursion in float64, error
against the true law, order of convergence, what the spacing of the stops changes, and inpainting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path as File
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.bench.measure import Arguments, read_arguments
from t2i_jax.bench.recursion import law, recursion
from t2i_jax.core.console import stdout
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import Range, values
from t2i_jax.core.noise import NoiseProcess, SamplingGrid, Spacing
from t2i_jax.core.outputs import MAKER, check_free, is_ours, write_markdown
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.sampling.solvers import SOLVERS, Denoised, Rounds, default_eta, solve

PROCESSES: dict[str, NoiseProcess] = {
    "Discrete, linear": Discrete("linear"),
    "Discrete, linear, zero terminal SNR": Discrete("linear", zero_terminal_snr=True),
    "Discrete, cosine": Discrete("cosine"),
    "Flow": Flow(),
    "Flow, shift 3": Flow(shift=3.0),
    "EDM": EDM(),
}
KINDS: dict[str, tuple[str, float]] = {
    "ddpm": ("ddpm", 1.0),
    "ddim": ("ddim", 0.0),
    "ddim, eta 1": ("ddim", 1.0),
    "euler": ("euler", 0.0),
    "ancestral": ("ancestral", 0.0),
    "heun": ("heun", 0.0),
    "dpm++": ("dpm++", 0.0),
    "dpm++, eta 1": ("dpm++", 1.0),
    "dpm++sde": ("dpm++sde", 0.0),
    "unipc": ("unipc", 0.0),
}
"""Solvers, each with its eta."""
STEPS = (1, 4, 8, 20, 25, 50, 100, 200)


def coefficients(
    solver: str,
    path: SamplingGrid,
    mean: Array | float,
    std: Array | float,
    size: int,
    eta: Array | float,
    start: Array,
    x: Array,
) -> Array:
    """What a solver makes of x (size,) at stop `start`, for images N(mean, std^2): coefficients (size,) of 1, of the
    noise at the start, and of that of each step. The solver sees them as a batch, on which it is linear."""
    one = jax.nn.one_hot(0, size)[:, None]

    def denoise(x: Array, i: Array) -> Denoised:
        a, s = path.alpha[i], path.sigma[i]
        x0 = mean * one + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean * one)
        return Denoised(x0, (x - a * x0) / s)

    noise = lambda i: jax.nn.one_hot(i + 2, size)[:, None]
    return solve(SOLVERS[solver], denoise, x[:, None], path, noise, eta, start)[:, 0]


@partial(jax.jit, static_argnames=("solver", "size"))
def drawn(solver: str, path: SamplingGrid, mean: Array, std: Array, size: int, eta: Array) -> Array:
    """`coefficients` of the clean end, from N(0, 1) at the first stop."""
    return coefficients(solver, path, mean, std, size, eta, jnp.int32(0), jax.nn.one_hot(1, size))


@partial(jax.jit, static_argnames=("solver", "size"))
def error_within(solver: str, path: SamplingGrid, mean: Array, std: Array, size: int, eta: Array) -> Array:
    """The error of mean and standard deviation, in units of the true one, over the middle three quarters of the stops,
    from the true law: the orders of solvers hold where steps in log(alpha / sigma) are finite."""
    start, stop = path.steps // 8, path.steps - path.steps // 8
    spread = lambda i: jnp.sqrt((path.alpha[i] * std) ** 2 + path.sigma[i] ** 2)
    x = path.alpha[start] * mean * jax.nn.one_hot(0, size) + spread(start) * jax.nn.one_hot(1, size)
    x = coefficients(solver, path._replace(steps=stop), mean, std, size, eta, start, x)
    return (jnp.abs(x[0] - path.alpha[stop] * mean) + jnp.abs(jnp.linalg.norm(x[1:]) - spread(stop))) / spread(stop)


@partial(jax.jit, static_argnames=("process", "spacing"))
def path_of(process: NoiseProcess, steps: Array, spacing: Spacing = "default") -> SamplingGrid:
    """The stops as a sampler has them, compiled for every number of steps at once."""
    return process.timesteps(steps, spacing=spacing)


def compared(
    kind: str, process: NoiseProcess, steps: int, mean: float, std: float, spacing: Spacing = "default", size: int = 0
) -> dict[str, float]:
    """`std` over the true one, error of the `mean` in units of it, and `off`: the larger difference of the two from
    `recursion` over the same stops, in the same units. size: of the program, at least steps + 2; one is compiled."""
    (solver, eta), path = KINDS[kind], path_of(process, jnp.int32(steps), spacing)
    found = law(np.asarray(drawn(solver, path, mean, std, size or steps + 2, eta), np.float64))
    alpha, sigma = (np.asarray(x, np.float64)[: steps + 1] for x in (path.alpha, path.sigma))
    expected = recursion(solver, eta, alpha, sigma, mean, std)
    off = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / std
    return {"std": found[1] / std, "mean": (found[0] - mean) / std, "off": off}


def order(kind: str, process: NoiseProcess, steps: int, mean: float, std: float, size: int = 0) -> float:
    """log2 of how much smaller the error within the path becomes by twice as many steps, at stops even in time."""
    (solver, eta), counts = KINDS[kind], (steps, 2 * steps)
    paths = [path_of(process, jnp.int32(n), "even") for n in counts]
    few, more = (float(error_within(solver, path, mean, std, size or 2 * steps + 2, eta)) for path in paths)
    return float(np.log2(few / more))


# -- inpainting

CORRELATION, KNOWN, COUNT = 0.9, 1.5, 20_000


@partial(jax.jit, static_argnames=("process", "solver"))
def inpainted(process: NoiseProcess, solver: str, steps: Array, resample: Array) -> tuple[Array, Array]:
    """Errors of the mean and standard deviation of one number given the other, as shares of the true ones.

    From `COUNT` draws of two numbers of variance 1, in units of the process, and `CORRELATION`; one is kept at `KNOWN`.
    """
    path, key, shape = process.timesteps(steps), jax.random.key(0), (COUNT, 2)
    covariance = jnp.asarray([[1.0, CORRELATION], [CORRELATION, 1.0]])

    def normal(*at: Array | int) -> Array:
        folded = key
        for i in at:
            folded = jax.random.fold_in(folded, i)
        return jax.random.normal(folded, shape)

    def denoise(x: Array, i: Array) -> Denoised:
        a, s = path.alpha[i], path.sigma[i]
        inverse = jnp.linalg.inv(a**2 * covariance + s**2 * jnp.eye(2))
        return Denoised(x @ (a * covariance @ inverse).T, x @ (s * inverse).T)

    def hold(x: Array, i: Array, eps: Array) -> Array:
        return x.at[:, 0].set(path.alpha[i] * KNOWN + path.sigma[i] * eps[:, 0])

    rounds = Rounds(
        resample - 1,
        lambda i, j: normal(0, i, j),
        lambda x, i, j: hold(x, i, normal(1, i, j)),
        (normal(2) + normal(3)) / np.sqrt(2),
    )
    between = lambda x, i: hold(x, i, normal(4, i))
    x = solve(
        SOLVERS[solver],
        denoise,
        between(normal(2), 0),
        path,
        lambda i: normal(5, i),
        default_eta(solver),
        0,
        between,
        rounds,
    )
    mean, std = x[:, 1].mean(), x[:, 1].std()
    return mean / (CORRELATION * KNOWN) - 1, std / np.sqrt(1 - CORRELATION**2) - 1


# -- the page


@dataclasses.dataclass(frozen=True)
class SolverBench(Arguments):
    """What every solver makes of images N(mean, std^2), along every process, with the best possible network.

    Example: t2i bench solvers --steps 10 20 50 --std 0.3
    """

    steps: Annotated[tuple[int, ...], Range(1, min(p.max_steps for p in PROCESSES.values()))] = STEPS
    std: Annotated[tuple[float, ...], Range(1e-6, 1e6)] = (0.5, 0.1)
    """standard deviations of the images; what solvers get wrong is the narrow ones"""
    mean: Annotated[float, Range(-1e6, 1e6)] = 0.6
    out: File | None = None
    """write the page as Markdown, and a plot of the same name"""


ABOUT = """
For images N(mean, std^2) the best network is known and every solver is linear, so mean and standard deviation of what
it draws are computed and not estimated. (EDM's are in units of its `data`.) Cells are the standard deviation over the
true one, and the error of the mean in units of it. *off* is the largest difference, in these units, of any cell of the
row from a recursion in float64 NumPy, written from the papers, over the same stops: the errors shown are those of the
solvers and not of their code. *order* is log2 of the factor by which going from {few} to {more} steps reduces the error
over the middle three quarters of a path of even stops; the first step may begin and the last always ends at an infinite
log-SNR, where no order holds. The default solver of each process is in bold.
"""
SPACINGS: tuple[Spacing, ...] = ("default", "even", "karras", "log_snr")
FEW, ORDERED = (8, 20, 50), 48
DRAWN = ("ddpm", "ddim", "heun", "dpm++", "dpm++sde", "unipc")
"""Kinds that the plot shows."""


def main(arguments: list[str]) -> None:
    """`t2i bench solvers ...`: prints the page, and writes it where `--out` says."""
    args, _ = read_arguments(SolverBench, arguments, "t2i bench solvers")
    if args.out and args.out.suffix == ".png":
        raise ConfigError(f"--out {args.out}: the plot gets that name; end it in .md")
    if args.out and not is_ours(args.out):  # else the plot is ours too
        check_free(args.out.with_suffix(".png"))
    given = values(args)
    options = "".join(
        f" --{f.name} {' '.join(f'{v:g}' for v in np.atleast_1d(given[f.name]))}"
        for f in dataclasses.fields(args)
        if f.name != "out" and given[f.name] != f.default
    )
    lines = [
        "# Solvers on Gaussian images",
        "",
        f"Made by `t2i bench solvers{options} --out {args.out or 'FILE.md'}`.",
        ABOUT.format(few=ORDERED, more=2 * ORDERED),
    ]
    if args.out:
        lines += [f"![error against steps]({args.out.with_suffix('.png').name})", ""]
    size, errors = max(*args.steps, 2 * ORDERED) + 2, {}
    for std in args.std:
        for name, process in PROCESSES.items():
            lines += [f"## {name}, mean {args.mean:g}, std {std:g}", ""]
            lines += heading([*(f"{n} step{'s' * (n > 1)}" for n in args.steps), "off", "order"])
            for kind in KINDS:
                cells = [compared(kind, process, n, args.mean, std, size=size) for n in args.steps]
                errors[std, name, kind] = [abs(c["std"] - 1) + abs(c["mean"]) for c in cells]
                shown = [f"{c['std']:.3f}, {c['mean']:+.3f}" for c in cells]
                measured = order(kind, process, ORDERED, args.mean, std, size)
                title = f"**{kind}**" if kind == process.solver else kind
                off = f"{max(c['off'] for c in cells):.0e} | {measured:.1f}"
                lines += [f"| {title} | " + " | ".join(shown) + f" | {off} |"]
            lines += ["", "Standard deviation over the true one, by the spacing of the stops:", ""]
            lines += heading([f"{s}, {n}" for s in SPACINGS for n in FEW])
            for kind in ("ddim", "heun", "dpm++", "dpm++sde", "unipc"):
                found = [compared(kind, process, n, args.mean, std, s, size)["std"] for s in SPACINGS for n in FEW]
                lines += [f"| {kind} | " + " | ".join(f"{x:.3f}" for x in found) + " |"]
            lines += [""]
    text = "\n".join(lines + inpainting())
    stdout(200).print(text, markup=False, highlight=False)
    if args.out:
        write_markdown(args.out, text)
        plot(errors, args.steps, args.std, args.out.with_suffix(".png"))


def heading(columns: Sequence[str]) -> list[str]:
    """The first lines of a table in Markdown."""
    return ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]


INPAINTING = """
## Inpainting

Two numbers of variance 1 and correlation {correlation:g}, of which one is known to be {known:g}: errors of the mean and
the standard deviation of the other against its conditional law, in percent, by `resample`, the evaluations at a stop.
`resample=1` replaces the known part at every stop and does nothing else: its error does not vanish with more steps. The
default is 2. What remains falls with `resample` and with steps: at a noisy stop the network sees the known part through
its noise and the rest agrees with no more than that, and the last steps have too few rounds to make up for it. To this
come the errors of the solver and, in practice, of the network.
"""


def inpainting() -> list[str]:
    """Lines of the page: a row a process and solver."""
    columns = [(n, k) for n in (24, 100) for k in (1, 2, 4, 10)]
    about = INPAINTING.format(correlation=CORRELATION, known=KNOWN)
    lines = [about, *heading([f"{n} steps, {k}" for n, k in columns])]
    for name, process in PROCESSES.items():
        for solver in dict.fromkeys((process.solver, "ddim", "dpm++")):
            cells = [inpainted(process, solver, jnp.int32(n), jnp.int32(k)) for n, k in columns]
            lines += [f"| {name}, {solver} | " + " | ".join(f"{100 * m:+.0f}, {100 * s:+.0f}" for m, s in cells) + " |"]
    return [*lines, ""]


def plot(errors: dict[tuple[float, str, str], list[float]], steps: tuple[int, ...], stds: tuple[float, ...], out: File):
    """Errors against steps, one panel a process and a standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure((3 * len(PROCESSES), 3 * len(stds)), layout="tight")
    panels = figure.subplots(len(stds), len(PROCESSES), sharex=True, sharey=True, squeeze=False)
    for row, std in zip(panels, stds, strict=True):
        for panel, name in zip(row, PROCESSES, strict=True):
            for kind in DRAWN:
                panel.loglog(steps, errors[std, name, kind], ".-", label=kind)
            panel.set_title(f"{name}, std {std:g}", fontsize=8)
            panel.set_ylim(1e-4, 3)
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    for row in panels:
        row[0].set_ylabel("error of std and mean")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(out, dpi=80, metadata={"Software": MAKER})
