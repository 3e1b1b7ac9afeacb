"""Who is trained against whom: a player is a loss and the part of the model that it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array


@dataclasses.dataclass(frozen=True)
class Player:
    """One side of a training game; an ordinary model is a game with one player.

    loss: (model, batch, key, step, train) -> (scalar, metrics) or (scalar, (metrics, model)), the second where
        `Carried` leaves change. All players see the same model, batch and key in a step, and move at once. train:
        False for held-out data, where nothing is dropped or corrupted to regularise; static.
    owns: names of the model's top-level attributes whose parameters follow this loss; empty means all of them.
    start: step at which the player begins to learn. Before it neither its parameters nor its optimiser change, and its
        learning-rate schedule counts from there.
    """

    loss: Callable[[Any, dict[str, Array], Array, Array, bool], Any]
    owns: tuple[str, ...] = ()
    start: int = 0


def players_of(trainable: Any) -> dict[str, Player]:
    """The players of a trainable: its own `players()`, or one that follows `trainable.loss`."""
    if hasattr(trainable, "players"):
        return trainable.players()
    return {"model": Player(lambda model, batch, key, step, train: trainable.loss(model, batch, key, train))}
