"""Chips, from their makers' data sheets, and topologies."""

from __future__ import annotations

import dataclasses
import math
import re

from t2i_jax.core.config import ConfigError
from t2i_jax.core.flops import PEAKS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX counts devices; bytes, bytes/s, FLOP/s."""

    name: str
    kind: str
    """JAX's name for it, the key of its bf16 peak in `flops.PEAKS`"""
    memory: float
    bandwidth: float
    """of the memory"""
    link: float
    """TPU: one way over one link to a neighbour; GPU: one way over NVLink, all links together"""
    axes: int = 0
    """dimensions of the torus; 0: every chip of a node reaches every other at the same speed"""
    ring: int = 1
    """least length of a dimension of the torus that is closed to a ring"""
    network: float = 0.0
    """GPU: one way from one chip to another node"""
    node: int = 8
    """chips of a machine"""
    between: float = 0.0
    """TPU: one way from one chip to other slices, its share of the network cards of its machine"""
    devices: int = 1
    """of one chip of a torus, among which what it has is shared"""

    @property
    def flops(self) -> float:
        return PEAKS[self.kind]


CHIPS = {
    chip.name: chip
    for chip in (
        # Between slices, of cloud.google.com/tpu/docs: /v5e has 2 cards of 100 Gbit/s for a machine of 8 chips (6.4
        # Tbit/s for 256), /v5p 50 Gbit/s a chip (200 for a machine of 4), /v6e 4 cards of 200 Gbit/s for 8 (25.6 Tbit/s
        # for 256).
        Chip("v5e", "TPU v5 lite", 16 * 2**30, 0.819e12, 45e9, axes=2, ring=16, between=25e9 / 8),
        Chip("v5p", "TPU v5", 95 * 2**30, 2.765e12, 90e9, axes=3, ring=4, node=4, between=25e9 / 4),
        Chip("v6e", "TPU v6 lite", 32 * 2**30, 1.64e12, 90e9, axes=2, ring=16, between=100e9 / 8),
        # /tpu7x, of both devices of a chip: 2307 TFLOP/s, 192 GiB, 7.38 TB/s, 1.2 TB/s both ways over six links, 100
        # Gbit/s between slices.
        Chip("tpu7x", "TPU7x", 96 * 2**30, 3.69e12, 50e9, axes=3, ring=4, node=4, between=12.5e9 / 2, devices=2),
        Chip("h100", "NVIDIA H100", 80e9, 3.35e12, 450e9, network=50e9),
        Chip("h200", "NVIDIA H200", 141e9, 4.8e12, 450e9, network=50e9),
        Chip("b200", "NVIDIA B200", 180e9, 7.7e12, 900e9, network=50e9),
        # GB200 NVL72: 13.4 TB, 576 TB/s and 130 TB/s of NVLink, both ways, of 72 chips that it joins.
        Chip("gb200", "NVIDIA GB200", 186e9, 8e12, 900e9, network=50e9, node=72),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip of JAX's name, or None for one that is not in the table."""
    return next((chip for chip in CHIPS.values() if kind.startswith(chip.kind)), None)


# The share of a peak that a well written program reaches; the only guesses of a plan.
REACHED = {"flops": 0.80, "memory": 0.85, "network": 0.80}
BACKWARD = 2 / 3
"""The share of a step's work that can overlap gradient sums over slices: the backward pass."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: `v5p:4x4x4` is a torus, `v5e:16x16*2` are two slices, `h100:64` are nodes of eight."""

    chip: Chip
    shape: tuple[int, ...]
    """of one slice"""
    slices: int = 1
    """joined by a network slower than the torus"""

    @classmethod
    def read(cls, text: str) -> Topology:
        """The topology of `CHIP:AxBxC` or, of several slices, `CHIP:AxBxC*N`.

        Errors: `ConfigError` that says what is wrong and what would be right.
        """
        name, _, sizes = text.partition(":")
        if name not in CHIPS:
            raise ConfigError(f"--topology {text}: there is no chip '{name}', only {', '.join(CHIPS)}")
        chip, found = CHIPS[name], re.fullmatch(r"(\d+(?:x\d+)*)(\*.*)?", sizes, re.ASCII)
        shape = tuple(int(n) for n in found[1].split("x")) if found else ()
        wanted = f"{name}:" + "x".join(["4"] * chip.axes) if chip.axes else f"{name}:8"
        if len(shape) != (chip.axes or 1) or min(shape, default=0) < 1:
            raise ConfigError(f"--topology {text}: it is written like {wanted}")
        slices = found[2] or "*1"
        if not re.fullmatch(r"\*[1-9]\d*", slices, re.ASCII):
            raise ConfigError(f"--topology {text}: several slices are written like {wanted}*2")
        return cls(chip, shape).repeated(int(slices[1:]))

    def repeated(self, slices: int) -> Topology:
        """`slices` slices like this one. Errors: `ConfigError` for GPUs, and where there are several already."""
        if slices > 1 and not self.compiled:
            raise ConfigError(f"{self}: GPUs are in no slices; ask for {self.chip.name}:{slices * self.size}")
        if slices > 1 and self.slices > 1:
            raise ConfigError(f"{self} are {self.slices} slices already; say it once, by --topology or by --slices")
        return dataclasses.replace(self, slices=max(slices, self.slices))

    @property
    def size(self) -> int:
        """Devices, of all slices together: chips, but for those that are several."""
        return math.prod(self.shape) * self.chip.devices * self.slices

    @property
    def compiled(self) -> bool:
        """Whether there is a compiler for it on machines without one."""
        return self.chip.axes > 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader of a plan."""
        n = self.chip.devices
        return (f"a chip is {n} devices to JAX, and figures are those of one device",) if n > 1 else ()

    @property
    def slice_name(self) -> str:
        """The compiler's name for one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name + (f"*{self.slices}" if self.slices > 1 else "")

    def between_slices(self, kind: str, size: float) -> float:
        """Seconds at the peak of a collective over all slices of `size` bytes a chip, its part of its slice's."""
        return WIRE[kind](size, self.slices) / self.chip.between

    def wire(self, coordinates: list[tuple[int, ...]], group: int) -> float:
        """Bytes/s out of one chip in a collective of `group` chips, at best; coordinates are those of one such group.

        On a torus each dimension that the group spans gives two links where it is closed to a ring, else one, for the
        chip at the end of a line has no more.
        """
        if not self.compiled:
            return self.chip.link if group <= self.chip.node else self.chip.network
        links = 0
        for i, length in enumerate(self.shape):
            extent = len({c[i] for c in coordinates})
            if extent > 1:
                links += 2 if extent == length and length >= self.chip.ring else 1
        return self.chip.link * max(links, 1)


# Of the bytes that a collective gives, or all-reduce and reduce-scatter take, what leaves one chip in a group of g.
WIRE = {
    "all-gather": lambda size, g: size * (g - 1) / g,
    "reduce-scatter": lambda size, g: size * (g - 1) / g,
    "all-reduce": lambda size, g: 2 * size * (g - 1) / g,
    "all-to-all": lambda size, g: size * (g - 1) / g,
    "collective-permute": lambda size, g: size,
}
