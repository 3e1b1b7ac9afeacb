"""The players of whatever is trained."""

from __future__ import annotations

from typing import Any

from t2i_jax.nn.players import Player

__all__ = ["Player", "players_of"]


def players_of(trainable: Any) -> dict[str, Player]:
    """The players of a trainable: its own `players()`, or one that follows `trainable.loss`."""
    if hasattr(trainable, "players"):
        return trainable.players()
    return {"model": Player(lambda model, batch, key, step: trainable.loss(model, batch, key))}
