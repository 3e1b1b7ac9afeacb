"""What chips can do, from their makers' data sheets, and how they are joined."""

from __future__ import annotations

import dataclasses
import math

from t2i_jax.config import ConfigError
from t2i_jax.flops import PEAKS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX counts devices; bytes, bytes/s, FLOP/s."""

    name: str
    kind: str
    """how JAX calls it; the bf16 peak stands under this name in `flops.PEAKS`"""
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
    """GPU: chips of a node"""

    @property
    def flops(self) -> float:
        return PEAKS[self.kind]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", 16 * 2**30, 0.819e12, 45e9, axes=2, ring=16),
        Chip("v5p", "TPU v5p", 95 * 2**30, 2.765e12, 90e9, axes=3, ring=4),
        Chip("v6e", "TPU v6 lite", 32 * 2**30, 1.64e12, 90e9, axes=2, ring=16),
        Chip("h100", "NVIDIA H100", 80e9, 3.35e12, 450e9, network=50e9),
        Chip("h200", "NVIDIA H200", 141e9, 4.8e12, 450e9, network=50e9),
        Chip("b200", "NVIDIA B200", 180e9, 7.7e12, 900e9, network=50e9),
    )
}

# What a well written program reaches of a peak; the plan's one set of guesses.
REACHED = {"flops": 0.80, "memory": 0.85, "network": 0.80}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind: `v5p:4x4x4` is a torus, `h100:64` are nodes of eight."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> Topology:
        """The topology of `CHIP:AxBxC`. Errors: `ConfigError` that says what is wrong and what would be right."""
        name, _, sizes = text.partition(":")
        if name not in CHIPS:
            raise ConfigError(f"--topology {text}: there is no chip '{name}', only {', '.join(CHIPS)}")
        chip = CHIPS[name]
        try:
            shape = tuple(int(n) for n in sizes.split("x"))
        except ValueError:
            shape = ()
        wanted = f"{name}:" + "x".join(["4"] * chip.axes) if chip.axes else f"{name}:8"
        if len(shape) != (chip.axes or 1) or min(shape, default=0) < 1:
            raise ConfigError(f"--topology {text}: it is written like {wanted}")
        return cls(chip, shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def compiled(self) -> bool:
        """Whether there is a compiler for it on machines without one."""
        return self.chip.axes > 0

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

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
