"""Optimisers of optax by name, with the schedule, clipping and weight-decay rules every recipe of the field uses."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from optax import contrib

from t2i_jax.config import ConfigError
from t2i_jax.core.fields import Checked, Count, NotNegative, Rate, Share
from t2i_jax.nn.trees import Named, is_variable


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    """How parameters follow their gradients."""

    name: str = "adamw"
    """an optimiser of optax or optax.contrib: adamw, adam, lion, adafactor, sgd, muon, ..."""
    learning_rate: NotNegative = 3e-4
    adam_learning_rate: NotNegative = 0.0
    """of what Muon leaves to Adam, on the same schedule; 0 is `learning_rate`, but Muon wants about ten times more"""
    schedule: Literal["constant", "cosine", "linear", "rsqrt"] = "cosine"
    warmup: Count = 100
    """steps of linear rise to the peak"""
    final: Share = 0.1
    """last learning rate as a share of the peak (cosine and linear)"""
    b1: Rate = 0.9
    b2: Rate = 0.95
    weight_decay: NotNegative = 0.05
    """on matrices, convolutions and embeddings; not on biases, norms, null conditions, positions and codebooks"""
    no_decay: str = ""
    """regular expression: parameters with such names are not decayed either"""
    clip: NotNegative = 1.0
    """bound of the global gradient norm; 0 leaves gradients as they are"""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """further arguments of the optax function"""

    @property
    def ends(self) -> bool:
        """Whether the learning rate of a step depends on how many steps the run has."""
        return self.schedule in ("cosine", "linear")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Learning rate by step, for a run of `steps` steps."""
        return self._schedule(self.learning_rate, steps)

    def _schedule(self, peak: float, steps: int) -> optax.Schedule:
        rest = max(steps - self.warmup, 1)
        after = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, rest, self.final),
            "linear": optax.linear_schedule(peak, peak * self.final, rest),
            "rsqrt": lambda n: peak * jax.lax.rsqrt(1.0 + n / max(self.warmup, 1)),
        }
        rise = optax.linear_schedule(peak / max(self.warmup, 1), peak, max(self.warmup, 1))
        return (
            optax.join_schedules([rise, after[self.schedule]], [self.warmup]) if self.warmup else after[self.schedule]
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation. Errors: `ConfigError` for an unknown name or argument, with the nearest one."""
        make = self._find()
        known = inspect.signature(make).parameters
        ours: dict[str, Any] = {"b1": self.b1, "b2": self.b2, "weight_decay": self.weight_decay}
        for decay in ("mask", "weight_decay_mask"):
            if decay in known:
                ours[decay] = self.decayed
        if self.name == "muon":
            ours["adam_learning_rate"] = self._schedule(self.adam_learning_rate or self.learning_rate, steps)
            ours |= {"adam_b1": self.b1, "adam_b2": self.b2, "muon_weight_dimension_numbers": muon_dimensions}
        for option in self.options:
            if option not in known:
                near = difflib.get_close_matches(option, list(known), 1, 0.3)
                raise ConfigError(
                    f"optimizer.options: {self.name} takes no '{option}'; did you mean {near or list(known)}?"
                )
        arguments = {k: v for k, v in ours.items() if k in known} | self.options
        tx = make(self.learning_rates(steps), **arguments)
        return optax.chain(optax.clip_by_global_norm(self.clip), tx) if self.clip else tx

    def _find(self) -> Callable[..., optax.GradientTransformation]:
        for room in (optax, contrib):
            make = getattr(room, self.name, None)  # the user names any optimiser of optax
            if callable(make) and "learning_rate" in inspect.signature(make).parameters:
                return make  # pyright: ignore[reportReturnType]
        names = [n for room in (optax, contrib) for n in dir(room) if n.islower() and not n.startswith("_")]
        near = difflib.get_close_matches(self.name, names, 3, 0.4)
        raise ConfigError(f"optimizer.name '{self.name}' is no optimiser of optax; did you mean {' or '.join(near)}?")

    def decayed(self, params: Named) -> Any:
        """Which parameters decay: those that a product or a lookup reads, unless their name is excepted.

        Biases, norms, and free vectors (null conditions, positions, padding, tables of modulations) do not, nor do
        codebooks: they would be pulled to zero, whatever they stand for.
        """

        def rule(name: str, v: Any) -> bool:
            read = name.endswith(".w") or "vocab" in axes_of(v)
            excepted = "codebook" in name or (self.no_decay and re.search(self.no_decay, name))
            return rank(v) >= 2 and read and not excepted

        return {k: rule(k, v) for k, v in params.items()}


def axes_of(v: Any) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions, those of stacked layers not counted; empty where it has none."""
    return v.get_metadata().get("axes", ()) if is_variable(v) else ()


def rank(v: Any) -> int:
    """The number of dimensions of a parameter, those of stacked layers not counted."""
    return len(axes_of(v)) or len(v.shape)


def muon_dimensions(params: Named) -> Any:
    """The matrices that Muon orthogonalises: those of products with vectors (Jordan et al. 2024).

    Adam moves everything else: tables of which rows are looked up, logits of a vocabulary, null conditions, positions,
    codebooks, biases, norms and convolutions. The first product of features of a frozen encoder is one of Muon's: its
    input is dense, as every layer's is.
    """

    def rule(name: str, v: Any) -> Any:
        axes = axes_of(v)
        if not name.endswith(".w") or len(axes) != 2 or "vocab" in axes:
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=len(v.shape) - 2, output_axis=len(v.shape) - 1)

    return {k: rule(k, v) for k, v in params.items()}
