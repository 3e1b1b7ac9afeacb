"""One experiment as a value: what is trained, on what, how, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.config import ConfigError, refused
from t2i_jax.data.pipeline import Data
from t2i_jax.parallel import MeshConfig
from t2i_jax.training.artifacts import Artifact, load_artifact
from t2i_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how fast, and how often the run looks up."""

    steps: int = 1000
    seed: int = 0
    optimizer: Optimizer = Optimizer()
    players: Mapping[str, Optimizer] = dataclasses.field(default_factory=dict)
    """optimisers of single players (`discriminator`, say) where they differ from `optimizer`"""
    ema: float = 0.0
    """decay of the parameters' average, which is then sampled and evaluated; 0 keeps none"""
    accumulate: int = 1
    """parts a batch is cut into, one update after all of them"""
    log_every: int = 20
    save_every: int = 500
    save_retries: int = 3
    """times in a row that a checkpoint which could not be written is tried again before the run stops ..."""
    save_backoff: float = 10.0
    """... so many seconds after the first failure, and twice as long each time"""
    keep: int = 3
    """checkpoints that stay on disk"""
    stuck_after: float = 1800.0
    """seconds without a finished step after which a process ends itself, for it hangs or another does; 0: never"""
    evaluate_every: int = 500
    evaluate_batches: int = 4
    preview_every: int = 500
    """steps between grids of pictures under `samples/`; 0 draws none"""
    previews: int = 16
    profile: int = 0
    """step at which a trace of five steps is written to `profile/`; 0 writes none"""
    wandb: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config file builds: `t2i train FILE` trains `model` on `data`."""

    model: Any
    """a family or a codec: a dataclass with `init` and `loss` (or `players`)"""
    data: Data
    train: Train = Train()
    mesh: MeshConfig = MeshConfig()
    codec: str = ""
    """run or released folder of the frozen codec that turns images into codes; empty where the model sees pixels"""
    text: Any = None
    """tokenizer or frozen text encoder; None where the model needs no captions"""


# Fields that may differ when a run goes on: they change neither the batches nor the mathematics.
FREE = (
    "mesh.",
    "model.sampling.",
    "model.solver",
    "train.log_every",
    "train.save",
    "train.stuck_after",
    "train.keep",
    "train.evaluate",
    "train.preview",
)
FREE += ("train.profile", "train.wandb", "data.workers", "data.prefetch", "data.threads")


def frozen_parts(experiment: Experiment) -> tuple[dict[str, Any], Artifact | None]:
    """What is used and not trained, by name: `codec`, `text`, and `loss` for networks that only the loss looks through
    (the model's `frozen()`); and the codec as it was loaded."""
    parts, codec = {}, None
    if experiment.codec:
        codec = load_artifact(experiment.codec)
        if not hasattr(codec.config, "encode"):
            raise ConfigError(f"codec: {experiment.codec} holds a {type(codec.config).__name__}, which is no codec")
        parts["codec"] = codec.model
    if hasattr(experiment.text, "load"):
        with refused("text"):
            parts["text"] = experiment.text.load()
    if hasattr(experiment.model, "frozen") and (network := experiment.model.frozen()) is not None:
        parts["loss"] = network
    return parts, codec


def make_prepare(codec: Any, text: Any):
    """The part of a step before any gradient: (frozen, batch) -> batch with images as floats, codes and text features.

    What the data brings already (codes, features of an encoded data set) is not computed again. A text with
    `image_features` teaches by pictures: their features stand in for those of captions wherever there is a picture.
    """

    def prepare(frozen: Mapping[str, Any], batch: dict[str, Array]) -> dict[str, Array]:
        batch = dict(batch)
        if "image" in batch:
            batch["image"] = batch["image"].astype(jnp.float32) / 127.5 - 1
        if "image" in batch and "features" not in batch and hasattr(text, "image_features"):
            batch["features"] = text.image_features(frozen["text"], batch["image"])
        if codec is not None and "image" in batch and "codes" not in batch:
            batch["codes"] = codec.encode(frozen["codec"], batch.pop("image"))
        if hasattr(text, "features") and "features" not in batch and "text" in batch:
            batch["features"] = text.features(frozen["text"], batch["text"], batch["text_mask"])
        return jax.lax.stop_gradient(batch)

    return prepare
