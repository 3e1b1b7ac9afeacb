"""Text, model and codec as one thing: prompts in, pictures out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.config import ConfigError
from t2i_jax.nn.decode import int8_weights
from t2i_jax.parallel import MeshConfig, batch_sharding, shardings
from t2i_jax.pictures import to_uint8
from t2i_jax.training.artifacts import Artifact, load_artifact, save_artifact


def image_keys(seeds: Sequence[int]) -> Array:
    """One key per picture, from its seed alone: the same seed gives the same picture in any batch."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


class Pipeline:
    """A family with its weights, its codec and its text side, placed on a mesh.

    `Pipeline.load(folder)` takes a run or a released model; `sample` gives pictures; `save` writes a released model.
    """

    def __init__(
        self,
        family: Any,
        model: Any,
        codec: Artifact | None,
        text: Any,
        mesh: MeshConfig = MeshConfig(),
        source: Artifact | None = None,
    ):
        self.family, self.codec, self.text, self.source = family, codec, text, source
        self.mesh = mesh.build()
        parts = {"model": model, "codec": codec.model if codec else None}
        parts["text"] = text.load() if hasattr(text, "load") else None
        self.parts = jax.device_put(parts, shardings(parts, self.mesh))
        self.about: dict[str, str] = {}
        """What pictures depend on besides prompt, seed and options."""
        self._compiled = jax.jit(self._run)  # option values are traced: compiled once

    @classmethod
    def load(cls, folder: str | Path, mesh: MeshConfig = MeshConfig(), int8: bool = False) -> Pipeline:
        """The pipeline of a run folder or a released model.

        int8: matrices as whole numbers and scales (`nn.decode.int8_weights`), for models that draw token by token.
        Errors: `ConfigError` where it holds no family, or one of another kind than `int8` is for.
        """
        artifact = load_artifact(folder)
        if not hasattr(artifact.config, "sample"):
            raise ConfigError(f"{folder} holds a {type(artifact.config).__name__}, which cannot sample from prompts")
        codec = load_artifact(artifact.codec) if artifact.codec else None
        if not int8:
            return cls(artifact.config, artifact.model, codec, artifact.text, mesh, artifact)
        if not hasattr(artifact.config, "prefill"):
            kind = type(artifact.config).__name__
            raise ConfigError(f"{folder} holds a {kind}: int8 weights are for models that draw token by token")
        pipeline = cls(artifact.config, int8_weights(artifact.model), codec, artifact.text, mesh, artifact)
        pipeline.about = {"weights": "int8"}
        return pipeline

    @property
    def options(self) -> Any:
        """The family's sampling options at their defaults; replace fields and hand them to `sample`."""
        return self.family.options()

    def condition(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the model is conditioned on, on the host: text ids and mask, or class labels."""
        if "label" in self.family.condition.inputs:
            try:
                return {"label": np.asarray([int(p) for p in prompts], np.int32)}
            except ValueError as error:
                raise ConfigError(f"this model takes class numbers as prompts: {error}") from error
        if self.text is None:
            return {}
        ids, mask = self.text(list(prompts))
        return {"text": ids, "text_mask": mask}

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        options: Any = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Pictures uint8 (n, i, j, 3), one per prompt; picture m is a function of prompt m and seed m alone.

        progress: called as (pictures finished, pictures in all).
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed per prompt")
        if self.codec is None and hasattr(self.family, "vocabulary"):
            raise ConfigError(
                "the model draws codes and has no codec that makes pictures of them: convert it with --codec"
            )
        options = self.options if options is None else options
        size = max(self.mesh.shape["data"] * self.mesh.shape["fsdp"], min(batch_size, len(prompts)))
        size += -size % (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        pictures = []
        for at in range(0, len(prompts), size):
            some = list(prompts[at : at + size])
            short = size - len(some)
            images = self.generate(some + some[-1:] * short, seeds[at : at + size] + [0] * short, options)
            pictures.append(np.asarray(images)[: len(some)])
            if progress:
                progress(at + len(some), len(prompts))
        return np.concatenate(pictures)

    def holding(self, picture: np.ndarray, mask: np.ndarray) -> Pipeline:
        """The same pipeline, which draws anew only what a mask marks of a picture: holes, or all beyond an edge.

        picture: uint8 (i, j, 3); mask: bool (i, j), True where to draw; a token is drawn where any of its pixels is.
        Errors: `ConfigError` for a family that goes by one order only, and for a picture of another size than it draws.
        """
        family = self.family
        if not getattr(family, "edits", False) or self.codec is None:
            raise ConfigError(
                f"a {type(family).__name__} cannot fill holes; masked and any-order models over a codec can"
            )
        size = tuple(n * family.patch * self.codec.config.factor for n in family.grid)
        if picture.shape != (*size, 3) or mask.shape != size:
            raise ConfigError(f"picture {picture.shape} and mask {mask.shape}: this model draws pictures of {size}")
        squares = mask.reshape(family.grid[0], size[0] // family.grid[0], family.grid[1], -1)
        with jax.set_mesh(self.mesh):
            codes = jax.jit(self.codec.config.encode)(self.parts["codec"], picture[None].astype(np.float32) / 127.5 - 1)
        same = copy.copy(self)
        same.parts = self.parts | {"held": {"known": codes, "keep": jnp.asarray(~squares.any((1, 3)))[None]}}
        same.about = self.about | {"held": hashlib.sha256(picture.tobytes() + mask.tobytes()).hexdigest()[:16]}
        same._compiled = jax.jit(same._run)
        return same

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], options: Any) -> Array:
        """One batch, uint8 (b, i, j, 3) on the devices."""
        with jax.set_mesh(self.mesh):
            condition = jax.device_put(self.condition(prompts), batch_sharding(self.mesh))
            return self._compiled(self.parts, condition, image_keys(seeds), options.arrays())

    def _run(self, parts: dict[str, Any], condition: dict[str, Array], keys: Array, options: Any) -> Array:
        if hasattr(self.text, "features"):
            condition |= {"features": self.text.features(parts["text"], condition["text"], condition["text_mask"])}
        held = {k: jnp.repeat(v, len(keys), 0) for k, v in parts.get("held", {}).items()}
        codes = self.family.sample(parts["model"], condition, keys, options, **held)
        images = self.codec.config.decode(parts["codec"], codes) if self.codec else codes
        return to_uint8(images)

    def save(self, folder: str | Path, name: str = "") -> None:
        """Write a released model: weights, config, tokenizer, codec and a model card."""
        artifact = self.source or Artifact(self.family, self.parts["model"], self.text)
        count = sum(x.size for x in jax.tree.leaves(artifact.model))
        fields = "\n".join(f"| {f.name} | {getattr(self.family, f.name)} |" for f in dataclasses.fields(self.family))
        save_artifact(
            artifact,
            folder,
            f"# {name or Path(folder).name}\n\nA text-to-image model of t2i_jax: {type(self.family).__name__}, "
            f"{count / 1e6:.1f} M parameters, step {artifact.step}.\n\n"
            f'```\nt2i sample {Path(folder).name} "a prompt"\n```\n\n| field | value |\n|---|---|\n{fields}\n',
        )


def release(run: str | Path, out: str | Path) -> None:
    """Write the model or the codec of a run as a released model. Errors: `ConfigError`, `CheckpointError`."""
    artifact = load_artifact(run)
    if hasattr(artifact.config, "sample"):
        Pipeline.load(run).save(out)
    else:
        save_artifact(artifact, out, f"# {Path(out).name}\n\n{type(artifact.config).__name__}, step {artifact.step}.\n")
