"""Who is trained against whom: a player is a loss and the part of the model that it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array


@dataclasses.dataclass(frozen=True)
class Player:
    """One side of a training game; an ordinary model is a game with one player.

    loss: (model, batch, key, step) -> (scalar, metrics) or (scalar, (metrics, model)), the second where `Carried`
        leaves change. All players see the same model, batch and key in a step, and move at once.
    owns: names of the model's top-level attributes whose parameters follow this loss; empty means all of them.
    """

    loss: Callable[[Any, dict[str, Array], Array, Array], Any]
    owns: tuple[str, ...] = ()


def players_of(trainable: Any) -> dict[str, Player]:
    """The players of a trainable: its own `players()`, or one that follows `trainable.loss`."""
    if hasattr(trainable, "players"):
        return trainable.players()
    return {"model": Player(lambda model, batch, key, step: trainable.loss(model, batch, key))}
