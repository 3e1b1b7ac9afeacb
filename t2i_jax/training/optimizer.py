"""Optax optimizers by name, with the usual schedules, gradient clipping and weight-decay rules."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Literal, cast

import jax
import optax
from flax import nnx
from optax import contrib

from t2i_jax.core.config import ConfigError
from t2i_jax.core.errors import did_you_mean
from t2i_jax.core.fields import Checked, Count, NotNegative, Rate, Share
from t2i_jax.core.params import Named, axes_of, within


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    """An optimizer with its learning-rate schedule, weight decay and clipping."""

    name: str = "adamw"
    """an optimizer of optax or optax.contrib: adamw, adam, lion, adafactor, sgd, muon, ..."""
    learning_rate: NotNegative = 3e-4
    """the peak of the schedule"""
    adam_learning_rate: NotNegative = 0.0
    """learning rate of the parameters that Muon leaves to Adam, on the same schedule; 0: `learning_rate`, although Muon
    needs about ten times more than Adam"""
    schedule: Literal["constant", "cosine", "linear", "rsqrt"] = "cosine"
    """after the warm-up; cosine and linear end with the run, rsqrt falls with the root of the step"""
    warmup: Count = 100
    """steps of linear warm-up to the peak"""
    final: Share = 0.1
    """final learning rate as a share of the peak (cosine and linear)"""
    b1: Rate = 0.9
    b2: Rate = 0.95
    weight_decay: NotNegative = 0.05
    """applies to matrices, convolutions and embeddings; not to biases, norms, null conditions, positions and
    codebooks"""
    no_decay: str = ""
    """regular expression: parameters with matching names are not decayed either"""
    clip: NotNegative = 1.0
    """bound of the global gradient norm; 0: no clipping"""
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    """further arguments of the optax function"""

    @property
    def ends(self) -> bool:
        """Whether the learning rate of a step depends on the length of the run."""
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
        warmup_schedule = optax.linear_schedule(peak / max(self.warmup, 1), peak, max(self.warmup, 1))
        return (
            optax.join_schedules([warmup_schedule, after[self.schedule]], [self.warmup])
            if self.warmup
            else after[self.schedule]
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation. Errors: `ConfigError` for an unknown name or argument, with the nearest known
        one."""
        make = self._find()
        known = inspect.signature(make).parameters
        ours: dict[str, object] = {"b1": self.b1, "b2": self.b2, "weight_decay": self.weight_decay}
        for decay in ("mask", "weight_decay_mask"):
            if decay in known:
                ours[decay] = self.decayed
        if self.name == "muon":
            ours["adam_learning_rate"] = self._schedule(self.adam_learning_rate or self.learning_rate, steps)
            ours |= {"adam_b1": self.b1, "adam_b2": self.b2, "muon_weight_dimension_numbers": muon_dimensions}
        for option in self.options:
            if option not in known:
                near = did_you_mean(option, known) or f"; it takes {', '.join(known)}"
                raise ConfigError(f"optimizer.options: {self.name} takes no '{option}'{near}")
        arguments = {k: v for k, v in ours.items() if k in known} | self.options
        tx = make(self.learning_rates(steps), **arguments)
        return optax.chain(optax.clip_by_global_norm(self.clip), tx) if self.clip else tx

    def _find(self) -> Callable[..., optax.GradientTransformation]:
        for package in (optax, contrib):
            make = getattr(package, self.name, None)  # the user may name any optimizer of optax
            if callable(make) and "learning_rate" in inspect.signature(make).parameters:
                return make  # pyright: ignore[reportReturnType]
        names = [n for package in (optax, contrib) for n in dir(package) if n.islower() and not n.startswith("_")]
        near = difflib.get_close_matches(self.name, names, 3, 0.4)
        raise ConfigError(f"optimizer.name '{self.name}' is no optimiser of optax; did you mean {' or '.join(near)}?")

    def decayed(self, params: Named) -> object:
        """Which parameters decay: weights of products and lookups, unless their name is excluded.

        Biases, norms and free vectors (null conditions, positions, padding, modulation tables) do not, nor do
        codebooks: decay would move them to zero, whatever they represent.
        """

        def rule(name: str, v: nnx.Variable) -> bool:
            read = name.endswith(".w") or "vocab" in axes_of(v)
            excepted = "codebook" in name or (self.no_decay and re.search(self.no_decay, name))
            return rank(v) >= 2 and read and not excepted

        return {k: rule(k, v) for k, v in params.items()}


def with_rates(optimizer: optax.GradientTransformation, rates: Mapping[str, float]) -> optax.GradientTransformation:
    """An optimizer whose updates of parameters under the paths of `rates`, the longest that fits, are multiplied."""

    def factor(name: str) -> float:
        return rates.get(max((path for path in rates if within(path, name)), key=len, default=""), 1.0)

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return {name: optax.tree.scale(factor(name), update) for name, update in cast(Named, updates).items()}

    return optax.chain(optimizer, optax.stateless(scaled)) if rates else optimizer


def rank(v: nnx.Variable) -> int:
    """Number of a parameter's dimensions without those of stacked layers."""
    return len(axes_of(v)) or len(v.shape)


def muon_dimensions(params: Named) -> object:
    """The matrices that Muon orthogonalises: those multiplied with activations (Jordan et al. 2024).

    Adam updates everything else: lookup tables, vocabulary logits, null conditions, positions, codebooks, biases, norms
    and convolutions. The input projection of a frozen encoder's features belongs to Muon: its input is dense, like that
    of every layer.
    """

    def rule(name: str, v: nnx.Variable) -> object:
        axes = axes_of(v)
        if not name.endswith(".w") or len(axes) != 2 or "vocab" in axes:
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=len(v.shape) - 2, output_axis=len(v.shape) - 1)

    return {k: rule(k, v) for k, v in params.items()}
