"""A plan as a value, as JSON and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step (or one batch of the sampler) needs: bytes, FLOPs and seconds of one chip."""

    topology: str
    mesh: dict[str, int]
    batch: int
    remat: str
    what: str
    method: str
    """origin of the figures: the compiler, or arithmetic"""
    capacity: float
    parameters: float
    optimizer: float
    state: float
    """parameters, average, optimiser and other state kept between steps"""
    temporaries: float
    peak: float
    flops: float
    model_flops: float
    """without recomputation: three times the forward pass"""
    bytes: float
    """to and from HBM"""
    collectives: dict[str, dict[str, float]]
    """kind -> how many a step, and the bytes of one chip's whole arrays in them"""
    compute_seconds: float
    """at the peak"""
    memory_seconds: float
    network_seconds: float
    """within a slice"""
    step_seconds: float
    mfu: float
    chips: int
    peak_flops: float
    cache: float = 0.0
    """keys and values of a sampler at the last token; among its temporaries"""
    steps_per_second: float = 0.0
    images: float = 0.0
    hours: float = 0.0
    """to that many images"""
    chip_hours: float = 0.0
    between_seconds: float = 0.0
    """of the network between slices, at its peak"""
    compile_seconds: float = 0.0
    data: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity

    def finished(self, images: float = 0.0) -> Plan:
        """With what follows from the step time: MFU, and time and chip-hours to `images` images."""
        hours = images / self.batch * self.step_seconds / 3600
        return dataclasses.replace(
            self,
            mfu=self.model_flops / (self.step_seconds * self.peak_flops) if self.step_seconds else 0.0,
            steps_per_second=1 / self.step_seconds if self.step_seconds else 0.0,
            images=images or self.images,
            hours=hours,
            chip_hours=hours * self.chips,
        )

    def json(self) -> Mapping[str, object]:
        return dataclasses.asdict(self) | {"fits": self.fits}


def size(n: float) -> str:
    """Bytes with a unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def span(seconds: float) -> str:
    """Seconds with a unit."""
    for unit, scale in (("d", 86400), ("h", 3600), ("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def measured(plan: Plan) -> str:
    """The origin of the figures, in one line."""
    if plan.compile_seconds:
        return (
            "From the compiler: memory. Read in the text of its program, loops counted as they run: FLOPs, bytes, "
            "collectives. Estimated: all seconds, from data sheets and the share of a peak that good programs reach."
        )
    return "Nothing was compiled. Counted: FLOPs, parameters, optimiser. Estimated: all the rest."


def table(plan: Plan) -> Table:
    """One plan, a line a quantity."""
    out = Table("per chip", "", title=f"{plan.what} on {plan.topology}, {mesh_name(plan.mesh)}, batch {plan.batch}")
    share = lambda n: f"{size(n)}  ({n / plan.capacity:.0%} of {size(plan.capacity)})"
    training = {"optimiser state": size(plan.optimizer), "all state": share(plan.state)}
    between = {"network between slices at the peak": span(plan.between_seconds)} if plan.between_seconds else {}
    hours = f"{span(plan.hours * 3600)}, {plan.chip_hours:.4g} chip-hours"
    rows = {
        "parameters": size(plan.parameters),
        **({"keys and values": size(plan.cache)} if plan.what == "sampler" else training),
        "activations and other temporaries": size(max(plan.temporaries - plan.cache, 0.0)),
        "peak HBM": share(plan.peak) + ("" if plan.fits else "  DOES NOT FIT"),
        "FLOPs": f"{plan.flops:.4g}  (without recomputation {plan.model_flops:.4g})",
        "HBM traffic": size(plan.bytes),
        **{f"{k} x {int(c['count'])}": size(c["bytes"]) for k, c in plan.collectives.items()},
        "compute at the peak": span(plan.compute_seconds),
        "HBM at the peak": span(plan.memory_seconds),
        "network at the peak": span(plan.network_seconds),
        **between,
        "expected time": span(plan.step_seconds),
        "expected MFU": f"{plan.mfu:.0%}",
        **({f"to {plan.images:.3g} images": hours} if plan.images else {}),
        **({"compiled in": span(plan.compile_seconds)} if plan.compile_seconds else {}),
    }
    for name, cell in rows.items():
        out.add_row(name, cell)
    notes = (plan.method, measured(plan), *([f"batch: {plan.data}"] if plan.data else []), *plan.notes)
    out.caption = "\n".join(notes)
    return out


def ranking(plans: Sequence[Plan], title: str) -> Table:
    """Several plans, a line each, best first."""
    columns = columns_of(plans)
    out = Table(*columns, title=title)
    for plan in plans:
        out.add_row(*(cell(plan) for cell in columns.values()))
    return out


def columns_of(plans: Sequence[Plan]) -> dict[str, Callable[[Plan], str]]:
    """What a line of each plan shows, by the names of the columns."""
    columns: dict[str, Callable[[Plan], str]] = {
        "mesh": lambda p: mesh_name(p.mesh),
        "batch": lambda p: str(p.batch),
        "remat": lambda p: p.remat,
        "peak HBM": lambda p: f"{size(p.peak)} ({p.peak / p.capacity:.0%})",
        "time": lambda p: span(p.step_seconds),
        "MFU": lambda p: f"{p.mfu:.0%}",
        "images / s": lambda p: f"{p.batch * p.steps_per_second:.3g}",
        "network": lambda p: span(p.network_seconds),
        "between slices": lambda p: span(p.between_seconds) if p.between_seconds else "",
        "by": lambda p: "compiler" if p.compile_seconds else "arithmetic",
    }
    if not any(p.between_seconds for p in plans):
        del columns["between slices"]
    return columns


def markdown(plans: Sequence[Plan]) -> str:
    """The same lines for a document."""
    columns = {"topology": lambda p: p.topology} | columns_of(plans)
    del columns["network"]
    head = f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|\n"
    line = lambda p: f"| {' | '.join(cell(p) for cell in columns.values())} |"
    return head + "\n".join(map(line, plans)) + "\n"


def mesh_name(mesh: dict[str, int]) -> str:
    """The axes of a mesh that split anything."""
    return ", ".join(f"{k} {n}" for k, n in mesh.items() if n > 1) or "one chip"
