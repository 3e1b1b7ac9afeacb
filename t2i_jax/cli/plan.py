"""`t2i plan`: memory, time and collectives of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import tyro

from t2i_jax import plan as plans
from t2i_jax.cli.sizes import parse_size
from t2i_jax.core.config import parse_some
from t2i_jax.core.console import console, stdout
from t2i_jax.core.fields import Checked, Positive, Size, Sizes
from t2i_jax.core.outputs import check_free, local
from t2i_jax.training.experiment import load_experiment


@dataclasses.dataclass(frozen=True)
class PlanArguments(Checked):
    """The needs of a run, before it is started: memory, FLOPs, traffic, collectives, time and MFU of every chip.

    For TPUs (v5e, v5p, v6e, tpu7x) the real train step is compiled by the real compiler, on any Linux machine; for GPUs
    (h100, h200, b200, gb200) it is counted. Fields of the config can be set as for `train`.
    Example: t2i plan configs/glyphs_ar.py --topology v5e:4x4 --mesh data=4,fsdp=4 --images 1e8
    """

    config: tyro.conf.Positional[Path]
    topology: str
    """CHIP:SHAPE, as v5e:16x16, v5p:4x4x4, h100:64"""
    slices: Size = 1
    """so many of them, joined by the network of the data centre, which `data` alone crosses; also v5e:16x16*2"""
    mesh: str = ""
    """AXIS=SIZE,... of data, fsdp and tensor, -1 for the rest; the config's own unless given"""
    sample: bool = False
    """plan the sampler too, for a batch of `data.batch_size` images (TPUs)"""
    sweep: bool = False
    """try meshes, remat policies and batch sizes, and rank what fits"""
    batch_sizes: Sizes = ()
    """of the sweep; the config's own, twice and four times it unless given"""
    compiles: Size = 3
    """how many of the sweep's best are compiled"""
    shallow: bool = False
    """compile models of 2 and 4 layers instead and scale by depth: for the samplers of deep models, whose compile grows
    with the layers; that of a train step does not, as it scans them. A UNet has no one depth, and no such copies"""
    estimate: bool = False
    """count for TPUs too and compile nothing: seconds in place of minutes"""
    images: Positive = 1e9
    """images to be seen in training"""
    size: str = ""
    """WIDTHxHEIGHT of images, for models of any size; of data with shapes the largest unless given"""
    inputs: tuple[str, ...] = ()
    """NAME:DTYPE:SHAPE of what a batch holds of each example, where neither data nor model say it"""
    encoded: bool = False
    """do not look at the data; take codes and features as computed before"""
    out: Path | None = None
    """write the plans as JSON, or as a Markdown table if it ends in .md"""


def run(arguments: list[str]) -> None:
    # The compiler needs no chips; those of this machine stay free for others.
    jax.config.update("jax_platforms", "cpu")

    args, rest = parse_some(PlanArguments, arguments, "t2i plan")
    if args.out:
        check_free(local(args.out))
    topology = plans.Topology.read(args.topology).repeated(args.slices)
    experiment = plans.of_size(load_experiment(args.config, rest), parse_size(args.size) if args.size else None)
    found = plans.run(
        dataclasses.replace(experiment, mesh=plans.read_mesh(args.mesh, experiment.mesh)),
        topology,
        sample=args.sample,
        sweeping=args.sweep,
        batch_sizes=args.batch_sizes,
        compiles=args.compiles,
        shallow=args.shallow,
        counted=args.estimate,
        images=args.images,
        inputs=args.inputs,
        encoded=args.encoded,
        on_progress=lambda message: console.print(message, style="dim", soft_wrap=True),
    )
    shown = stdout(140)
    if args.sweep:
        shown.print(plans.ranking(found[:20], f"{args.config} on {topology}, best first"))
    for one in found[:1] if args.sweep else found:
        shown.print(plans.table(one))
    if args.out:
        plans.write(found, args.out)
        console.print(f"{args.out}: {len(found)} plans", soft_wrap=True)
