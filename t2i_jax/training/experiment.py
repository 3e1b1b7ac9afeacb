"""Configuration of one experiment: model, data, training settings and mesh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.codecs.kl import draw_codes
from t2i_jax.core import config
from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.fields import FREE, Checked, Count, NotNegative, Range, Rate, Size
from t2i_jax.core.frozen import Frozen, with_features, with_low_codes
from t2i_jax.core.narrow import (
    any_size,
    as_family,
    as_tokenizer,
    as_trainable,
    check_codes,
    embeds_images,
    gives_features,
    learns_from_images,
    neighbour_retriever,
    retrieves_neighbours,
    text_encoder,
    uses_frozen_networks,
)
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.core.types import AnySize, Codec, Trainable
from t2i_jax.data.pipeline import Data
from t2i_jax.nn.lora import LoRA
from t2i_jax.storage.artifacts import Artifact, load_codec, on_host
from t2i_jax.storage.checkpoints import Best
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.step import Prepare


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """Length, optimisation, checkpoints and evaluation of a run."""

    steps: Annotated[Size, FREE] = 1000
    """updates in all; a run that is done goes on if there are more of them"""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """of the initial weights, and of all noise and dropout"""
    start: str = ""
    """run or released model (as of `t2i convert`) whose weights the run begins with, wherever they fit; the optimizer,
    the average and the count of steps are new. Empty: none"""
    frozen: tuple[str, ...] = ()
    """dotted names, or prefixes of names (such as `condition`), of parameters that do not change, nor the model's state
    under them: moving averages of a codebook, statistics of batch norm"""
    lora: LoRA = LoRA()
    """with a rank: adapters of the weights of `start`, which do not change and are in no checkpoint"""
    rates: Mapping[str, NotNegative] = dataclasses.field(default_factory=dict)
    """factors of the learning rate by dotted names or their prefixes, the longest that fits; others have 1"""
    optimizer: Optimizer = Optimizer()
    optimizers: Mapping[str, Optimizer] = dataclasses.field(default_factory=dict)
    """optimizers of single objectives (such as `discriminator`), by name, if they differ from `optimizer`"""
    ema: Rate = 0.0
    """decay of the parameter average, which is then used for sampling and evaluation; 0: no average"""
    ema_params: tuple[str, ...] = ()
    """dotted names, or prefixes of names (such as `autoencoder`), of the averaged parameters; () is all"""
    accumulate: Size = 1
    """number of parts that a batch is split into, with one update after all of them"""
    tolerate: Annotated[Count, FREE] = 5
    """steps in a row with non-finite loss or gradient that are skipped, counted and logged; one more ends the run"""
    spike: NotNegative = 0.0
    """skip steps whose gradient norm is above this multiple of its running mean; 0: none"""
    log_every: Annotated[Size, FREE] = 20
    """steps between lines of metrics"""
    save_every: Annotated[Size, FREE] = 500
    """steps between checkpoints"""
    save_retries: Annotated[Count, FREE] = 3
    """retries in a row of a checkpoint that could not be written, before the run stops"""
    save_backoff: Annotated[NotNegative, FREE] = 10.0
    """seconds before the first retry; doubled for each further one"""
    keep: Annotated[Size, FREE] = 3
    """number of newest checkpoints to keep"""
    keep_every: Annotated[Count, FREE] = 0
    """steps between checkpoints that are kept permanently; 0: none"""
    keep_best: Annotated[str, FREE] = ""
    """metric of the held-out split whose best checkpoint is kept, "min val/loss" or "max val/accuracy"; it is checked
    every `evaluate_every` steps"""
    stuck_after: Annotated[NotNegative, FREE] = 1800.0
    """seconds without a finished step after which a process exits, since it or another one hangs; 0: never"""
    evaluate_every: Annotated[Count, FREE] = 500
    """steps between held-out losses; 0: none"""
    evaluate_batches: Annotated[Count, FREE] = 4
    """batches of a held-out loss"""
    preview_every: Annotated[Count, FREE] = 500
    """steps between grids of images under `samples/`; 0: none"""
    previews: Annotated[Count, FREE] = 16
    """images of a grid"""
    profile: Annotated[Count, FREE] = 0
    """step at which a trace of five steps is written to `profile/`; 0: none"""
    wandb: Annotated[bool, FREE] = False
    """log to Weights & Biases as well"""

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.spike <= 1:
            raise ConfigError(f"train.spike {self.spike:g}: 0, or above 1, for half of all norms are above their mean")
        if self.lora.rank and not self.start:
            raise ConfigError("train.lora adapts a model that is there: set train.start")
        if self.keep_best and Best.parse(self.keep_best) and not self.evaluate_every:
            raise ConfigError("train.keep_best needs held-out losses: set train.evaluate_every")

    def optimizer_of(self, name: str) -> Optimizer:
        """The optimizer of this name."""
        return self.optimizers.get(name, self.optimizer)


@dataclasses.dataclass(frozen=True)
class Experiment(Checked):
    """The content of a config file: `t2i train FILE` trains `model` on `data`."""

    model: Trainable
    """a family or a codec: a dataclass with `init` and `objectives`"""
    data: Data
    train: Train = Train()
    mesh: Annotated[MeshConfig, FREE] = MeshConfig()
    codec: str = ""
    """run or released folder of the frozen codec that turns images into codes; empty if the model reads pixels"""
    text: Tokenizer | None = None
    """tokenizer or frozen text encoder; None if the model needs no captions"""

    def __post_init__(self):
        if isinstance(self.codec, os.PathLike):
            object.__setattr__(self, "codec", os.fspath(self.codec))
        with refused("Experiment.model"):
            as_trainable(self.model)
        super().__post_init__()
        if self.text is not None:
            with refused("Experiment.text"):
                as_tokenizer(self.text)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a config file or a run folder, with command-line overrides applied.

    Errors: `ConfigError` as for `config.load`, and for a file that builds something else.
    """
    found = config.load(path, overrides)
    if not isinstance(found, Experiment):
        raise ConfigError(f"{path}: builds a {type(found).__name__}; an Experiment is needed")
    return found


def frozen_parts(experiment: Experiment) -> tuple[dict[str, object], Artifact[Codec] | None]:
    """The frozen models of an experiment, on the host, by name; and the codec as loaded.

    Names: `codec`, `text`, and `loss` for networks used only by the loss (the model's `frozen()`).
    """
    parts: dict[str, object] = {}
    codec = None
    if experiment.codec:
        codec = load_codec(experiment.codec, host=True)
        if experiment.model.capabilities.family:
            check_codes(as_family(experiment.model), codec.config, experiment.codec)
        parts["codec"] = codec.model
    if gives_features(experiment.text):
        with refused("text"), on_host():
            parts["text"] = text_encoder(experiment.text).load()
            if retrieves_neighbours(experiment.text):
                neighbour_retriever(experiment.text).check_records(parts["text"], experiment.data.examples("train"))
    if experiment.model.capabilities.frozen_networks:
        with on_host():
            parts["loss"] = uses_frozen_networks(experiment.model).frozen()
    return parts, codec


def record_spec(experiment: Experiment, codec: Codec | None, model: Trainable | None = None) -> BatchSpec:
    """Required fields of the data's examples, before `prepare`: those of the model's `batch_spec`.

    Fields that frozen models compute are optional. codec: the configuration of the frozen codec, or None. model: that
    of the experiment, for images of another size.
    """
    spec = dict((model or experiment.model).batch_spec())
    optional = lambda field, one_of="": dataclasses.replace(field, optional=True, one_of=one_of)
    codes, images = spec.pop("codes", None), spec.pop("image", None)
    images = codec.batch_spec()["image"] if codes is not None and codec is not None else images
    if codes is not None and len(codes.shape) == 3:
        latents = FieldSpec((*codes.shape[:2], codes.shape[2] and 2 * codes.shape[2]), "float32")
        several = {"codes": codes, "latents": latents} | ({} if images is None else {"image": images})
    else:
        several = {k: v for k, v in {"codes": codes, "image": images}.items() if v is not None}
    one_of = "codes, or what they are made of" if len(several) > 1 else ""
    spec |= {k: optional(v, one_of) if one_of else v for k, v in several.items()}
    if "image" in spec:  # bytes until they are on the devices
        spec["image"] = dataclasses.replace(spec["image"], dtype="uint8")
    if "low_codes" in spec and images is not None:
        spec["low_codes"] = optional(spec["low_codes"])
    if codec is not None and "low_res" in spec and spec["low_res"].shape[-1] == 3:
        spec["low_res"] = optional(spec["low_res"])
    if "image_features" in spec and embeds_images(experiment.text):
        spec["image_features"] = optional(spec["image_features"])
    if "features" in spec and experiment.text is not None:
        spec["features"] = optional(spec["features"])
        if learns_from_images(experiment.text):  # images are the training signal, and captions are not read
            spec = {"image": FieldSpec((None, None, 3), "uint8", optional=True)} | spec
        else:
            ids, mask = FieldSpec((None,), "int32", low=0, optional=True), FieldSpec((None,), "bool", optional=True)
            spec = {"text": ids, "text_mask": mask} | spec
        if retrieves_neighbours(experiment.text):  # the number of a record tells it from its neighbours
            spec = {k: optional(f) if k.startswith("neighbour_") else f for k, f in spec.items()}
            spec["record"] = FieldSpec((), "int32", optional=True)
    return spec


def sized(experiment: Experiment, codec: Codec | None) -> dict[tuple[int, int], AnySize]:
    """The model for each of `Data.shapes`, by the grid of its samples; none where images are squares, and of a codec.

    Errors: `ConfigError` for a model whose parameters are of one grid, and for shapes that it, or the codec, cannot
    have.
    """
    shapes = experiment.data.shapes
    if not shapes or not experiment.model.capabilities.family:
        return {}
    with refused("data.shapes"):
        family = any_size(experiment.model)
        if codec is None and family.sample_spec().kind != "pixels":
            raise ConfigError("the shapes of codes follow from the codec: set `codec`, also for data that are encoded")
        factor = 1 if codec is None else codec.spec.factor
        if odd := [shape for shape in shapes if any(side % factor for side in shape)]:
            raise ConfigError(f"{odd[0][0]}x{odd[0][1]}: the sides are multiples of {factor}, the pixels of a code")
        return {(r // factor, c // factor): family.sized((r // factor, c // factor)) for r, c in shapes}


def make_prepare(codec: Codec | None, text: Tokenizer | None, spec: BatchSpec = MappingProxyType({})) -> Prepare:
    """The part of a step before any gradient: (frozen, batch, key) -> batch with float images, codes and text features.

    spec: of the batches that the model reads.

    Anything already in the data (codes, latents, features of an encoded data set) is not recomputed. Codes of a KL
    autoencoder are sampled from its posterior with the key. With a text encoder that has `image_features`, the features
    of images replace those of captions in all batches with images.
    """

    def prepare(frozen: Frozen, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        batch = with_low_codes(spec, codec, frozen, with_features(text, frozen, as_floats(batch)))
        batch = with_low_res(spec, codec, batch)
        if "latents" in batch:
            batch["codes"] = draw_codes(batch.pop("latents"), key)
        if codec is not None and "image" in batch:
            image = batch.pop("image")
            batch["codes"] = batch["codes"] if "codes" in batch else codec.encode(frozen["codec"], image, key)
        return jax.lax.stop_gradient(batch)

    return prepare


def make_store(
    codec: Codec | None, text: Tokenizer | None, spec: BatchSpec = MappingProxyType({})
) -> Callable[[Frozen, dict[str, Array]], dict[str, Array]]:
    """The arrays that `t2i encode` stores for a batch: (frozen, batch) -> codes or latents, features and their mask."""

    def store(frozen: Frozen, batch: dict[str, Array]) -> dict[str, Array]:
        batch = with_low_codes(spec, codec, frozen, with_features(text, frozen, as_floats(batch)))
        kept = codec.to_store(frozen["codec"], batch["image"]) if codec is not None and "image" in batch else {}
        kept_names = ("low_codes", "features", "text_mask", "image_features")
        return kept | {k: batch[k] for k in kept_names if k in batch}

    return store


def as_floats(batch: dict[str, Array]) -> dict[str, Array]:
    """A batch whose images are floats in [-1, 1]."""
    if "image" not in batch:
        return dict(batch)
    return batch | {"image": batch["image"].astype(jnp.float32) / 127.5 - 1}


def with_low_res(spec: BatchSpec, codec: Codec | None, batch: dict[str, Array]) -> dict[str, Array]:
    """A batch with the small image, `low_res` float (b, i, j, 3) in [-1, 1], if a model of latents reads it and the
    batch has none: its `image`, scaled to a pixel for each code."""
    if codec is None or "low_res" not in spec or "low_res" in batch or "image" not in batch:
        return batch
    image = batch["image"]
    if spec["low_res"].optional or spec["low_res"].shape[-1] != image.shape[-1]:
        return batch
    b, i, j, c = image.shape
    size = (b, i // codec.spec.factor, j // codec.spec.factor, c)
    return batch | {"low_res": jax.image.resize(image, size, "linear", antialias=True)}
