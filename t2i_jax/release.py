"""Released models: a model, its codec and its tokenizer in a folder that can be moved, with a model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from t2i_jax.core import config
from t2i_jax.core.config import ConfigError
from t2i_jax.core.fields import values
from t2i_jax.core.narrow import measures_scale
from t2i_jax.core.outputs import check_new
from t2i_jax.storage.adapters import Adapter, lora_of, read_adapter, save_adapter
from t2i_jax.storage.artifacts import Artifact, copy_artifact, load_artifact, save_artifact
from t2i_jax.storage.hub import hub_metadata
from t2i_jax.training.experiment import Experiment


def card(artifact: Artifact, name: str) -> str:
    """The model card of a released family or codec."""
    kind = type(artifact.config).__name__
    head = hub_metadata(kind, "text-to-image" if artifact.config.capabilities.family else "")
    if not artifact.config.capabilities.family:
        return f"{head}# {name}\n\n{kind}, step {artifact.step}.\n"
    count = sum(x.size for x in jax.tree.leaves(artifact.model)) / 1e6
    fields = "\n".join(f"| {k} | {v} |" for k, v in values(artifact.config).items())
    return (
        f"{head}# {name}\n\n"
        f"A text-to-image model of t2i_jax: {kind}, {count:.1f} M parameters, step {artifact.step}.\n\n"
        f'```\nt2i sample {name} "a prompt"\n```\n\n| field | value |\n|---|---|\n{fields}\n'
    )


def release(
    run: str | Path, out: str | Path, scale: bool = False, half: bool = False, merge: bool = False, int8: bool = False
) -> None:
    """Write the model or the codec of a run as a released model; of a run with `train.lora` the adapters alone.

    scale: measure, on the run's images, the scale and shift that give the codes of a KL autoencoder or a TAESD mean 0
    and variance 1, and release it with them. half: write weights in bf16, in half of the space. int8: matrices in 8
    bits, in a quarter. merge: the model that a run with `train.lora` adapts, with its adapters added.

    Errors: `ConfigError`, `CheckpointError`.
    """
    check_new(out)
    about = lambda artifact: card(artifact, Path(out).name)
    lora = lora_of(run)
    if merge and lora is None:
        raise ConfigError(f"{run}: --merge is for a run with train.lora, which it has not")
    if int8 and (half or scale or (lora is not None and not merge)):
        other = "--half" if half else "--scale" if scale else "adapters alone; add --merge"
        raise ConfigError(f"{run}: --int8 is of a whole model's weights, and not with {other}")
    if scale and lora is not None and not merge:
        raise ConfigError(f"{run}: --scale is of a codec, and this releases adapters alone; add --merge")
    if lora is not None and not merge:
        adapter = read_adapter(run)
        save_adapter(adapter, out, adapter_card(adapter, Path(out).name), half)
    elif scale:
        artifact = with_measured_scale(load_artifact(run), run)
        save_artifact(artifact, out, about(artifact), half)
    else:
        copy_artifact(run, out, about, half=half, int8=int8)


def adapter_card(adapter: Adapter, name: str) -> str:
    """The model card of released adapters."""
    count, lora, kind = sum(x.size for x in adapter.arrays.values()) / 1e6, adapter.lora, type(adapter.config).__name__
    return (
        f"{hub_metadata(kind, 'text-to-image', 'lora')}# {name}\n\n"
        f"Adapters of a {kind} of t2i_jax: rank {lora.rank}, alpha {lora.alpha:g}, {count:.2f} M numbers, step "
        f'{adapter.step}.\n\n```\nt2i sample MODEL "a prompt" --lora {name}\n```\n'
    )


def with_measured_scale(artifact: Artifact, run: str | Path, count: int = 1024, batch: int = 64) -> Artifact:
    """The codec of a run with the scale and shift measured on `count` of its images."""
    experiment = config.load(run)
    if not isinstance(experiment, Experiment) or not artifact.config.capabilities.measures_scale:
        raise ConfigError(f"{run}: a scale is measured for the run of a KL autoencoder or a TAESD alone")
    examples = experiment.data.with_shapes().examples("train")
    found = [record["image"] for record in examples.spaced(count) if "image" in record]
    if not found:
        raise ConfigError(f"{run}: a scale is measured on images, and the data has none that can be read")
    whole = len(found) - len(found) % batch if len(found) > batch else len(found)
    images = (np.stack(found[at : at + batch]) for at in range(0, whole, batch))
    signed = (x.astype(np.float32) / 127.5 - 1 for x in images)
    scale, shift = measures_scale(artifact.config).measure(artifact.model, signed)
    return dataclasses.replace(artifact, config=dataclasses.replace(artifact.config, scale=scale, shift=shift))
