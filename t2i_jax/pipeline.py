"""Tokenizer, model and codec in one object: prompts in, images out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t2i_jax.core.casts import cast_dtypes
from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.errors import did_you_mean
from t2i_jax.core.fields import FREE, SAMPLED, changed_fields, free_fields
from t2i_jax.core.image_files import to_uint8
from t2i_jax.core.keys import apart, image_keys
from t2i_jax.core.narrow import (
    as_classifier,
    as_family,
    autoguided,
    check_codes,
    classifier_guided,
    gives_features,
    image_to_image,
    inpainting,
    int8_sampling,
    super_resolution,
    text_encoder,
)
from t2i_jax.core.sharding import MeshConfig, batch_sharding, put_on_mesh, shardings, to_host
from t2i_jax.core.types import Family, GaussianFamily
from t2i_jax.nn.decode import int8_weights
from t2i_jax.release import card
from t2i_jax.sampling.guidance import guidance_flags
from t2i_jax.sampling.inpainting import check_keep
from t2i_jax.sampling.options import validate_options
from t2i_jax.sampling.progress import Progress, listening
from t2i_jax.storage.artifacts import (
    Artifact,
    copy_artifact,
    load_artifact,
    load_codec,
    on_host,
    save_artifact,
)
from t2i_jax.text.cut import check_vocabulary, limited, unread
from t2i_jax.training.experiment import with_features

log = logging.getLogger(__name__)

Watch = Callable[[float, Any], None]
"""Callback while a batch is sampled: (share done, codes or images so far)."""


class Pipeline:
    """A family with its weights, codec and tokenizer, placed on a mesh.

    `Pipeline.load(folder)` loads a run or a released model; `sample` returns images; `save` writes a released model.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        codec: Artifact | None,
        text: Tokenizer | None,
        mesh: MeshConfig = MeshConfig(),
        source: Artifact | None = None,
    ):
        self.family, self.codec, self.text, self.source = family, codec, text, source
        with refused():
            check_vocabulary(text, family.batch_spec())
            self.mesh = mesh.build()
            with on_host():
                loaded = text_encoder(text).load() if gives_features(text) else None
        parts = {"model": model, "codec": codec.model if codec else None, "text": loaded}
        self.parts = put_on_mesh(parts, shardings(parts, self.mesh))
        self.about: dict[str, str] = {}
        """Everything that images depend on besides prompt, seed and options."""
        self.folder: str | Path | None = None
        """Folder of the loaded model."""
        self.classifier: Artifact | None = None
        self.upsampler: Pipeline | None = None
        """Pipeline that upscales the images; see `with_upsampler`."""
        self.noticed: set[str] = set()
        """Prompts already checked for parts that are not read."""
        self._compiled = self._compile()

    def _compile(self) -> Callable[..., Array]:
        """The jitted sampler; option values are traced, so it compiles once, and once more without guidance."""
        return jax.jit(self._run, static_argnames="guided")

    @classmethod
    def load(cls, folder: str | Path, mesh: MeshConfig = MeshConfig(), int8: bool = False) -> Pipeline:
        """The pipeline of a run folder or a released model; each shard of an array is read for the device that holds
        it.

        int8: matrices as integers and scales (`nn.decode.int8_weights`), for models that sample token by token. Errors:
        `ConfigError` if the folder holds no family, or one without support for `int8`.
        """
        with refused():
            devices = mesh.build()
        artifact = load_artifact(folder, mesh=devices, dtypes=(lambda _: {}) if int8 else cast_dtypes)
        with refused(str(folder)):
            family = int8_sampling(artifact.config) if int8 else as_family(artifact.config)
        codec = load_codec(artifact.codec, mesh=devices) if artifact.codec else None
        if codec:
            check_codes(family, codec.config, artifact.codec)
        if int8:  # drop the float weights
            artifact = dataclasses.replace(artifact, model=int8_weights(artifact.model))
        pipeline = cls(family, artifact.model, codec, artifact.text, mesh, artifact)
        pipeline.folder = folder
        pipeline.about = {"model": f"{folder}, step {artifact.step}"} | ({"weights": "int8"} if int8 else {})
        return pipeline

    @property
    def options(self) -> Any:
        """The family's sampling options at their defaults; replace fields and pass them to `sample`."""
        return self.family.options()

    def condition(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The model's condition, on the host: text ids and mask, or class labels.

        Errors: `ConfigError` for prompts that are not valid class numbers of a class-conditional model.
        """
        if (label := self.family.condition_spec().get("label")) is not None:
            with refused("this model takes class numbers as prompts"):
                labels = [int(p) for p in prompts]
                least, most = label.low or 0, label.high or 0
                if odd := [n for n in labels if not least <= n <= most]:
                    raise ValueError(f"{odd[0]} is not one of {least} to {most}")
            return {"label": np.asarray(labels, np.int32)}
        if self.text is None:
            return {}
        ids, mask = self.text(list(prompts))
        condition = {"text": ids, "text_mask": mask}
        if self.classifier and self.classifier.text is not None:
            condition["clip_text"], condition["clip_mask"] = self.classifier.text(list(prompts))
        return condition

    def __call__(
        self,
        prompts: str | int | Sequence[str | int],
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: Callable[[float, int], None] | None = None,
        **options: object,
    ) -> np.ndarray:
        """Images uint8 (n, i, j, 3), one for each prompt, or for each seed if there is one prompt.

        prompts: texts, or class numbers for a class-conditional model. options: fields of `options`, such as
        `guidance=3.0`. Errors: `ConfigError` for an option that the family does not have.
        """
        asked = [prompts] if isinstance(prompts, str | int) else list(prompts)
        if isinstance(prompts, str | int) and seeds is not None:
            asked *= len(seeds)
        names = [field.name for field in dataclasses.fields(self.options)]
        if unknown := [name for name in options if name not in names]:
            hint = did_you_mean(unknown[0], names) or f"; there are {', '.join(names)}"
            raise ConfigError(f"a {type(self.family).__name__} has no sampling option '{unknown[0]}'{hint}")
        chosen = dataclasses.replace(self.options, **options)
        return self.sample([str(p) for p in asked], seeds, chosen, batch_size, progress)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        options: Any = None,
        batch_size: int = 16,
        progress: Callable[[float, int], None] | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Images uint8 (n, i, j, 3), one per prompt; image m depends on prompt m and seed m alone.

        progress: called as (images finished, all images); also within a batch if `watch` is given. watch: called within
        a batch during sampling; this needs a host callback, and the program is recompiled at each start.
        """
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed per prompt")
        self.check_codec()
        self.notice(prompts)
        options = self.options if options is None else options
        size = max(self.mesh.shape["data"] * self.mesh.shape["fsdp"], min(batch_size, len(prompts)))
        size += -size % (self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        pictures = []
        for at in range(0, len(prompts), size):
            some = list(prompts[at : at + size])
            short = size - len(some)

            def on_progress(share: float, codes: Any, at: int = at, count: int = len(some)) -> None:
                if progress:
                    progress(at + share * count, len(prompts))
                if watch:
                    watch(share, codes[:count])

            callback = on_progress if watch else None
            whole = some + some[-1:] * short, seeds[at : at + size] + [0] * short
            images = self.generate(*whole, options, callback)
            if self.upsampler is not None:
                images = self.upsampler.generate(*whole, self.upsampler.options, small=to_host(images))
            pictures.append(to_host(images)[: len(some)])
            if progress:
                progress(at + len(some), len(prompts))
        return np.concatenate(pictures)

    def check_codec(self) -> None:
        """Errors: `ConfigError` if the samples are not pixels and there is no codec to decode them."""
        if self.codec is None and self.family.sample_spec().kind != "pixels":
            raise ConfigError(
                "the model draws codes and has no codec that makes images of them: convert it with --codec"
            )

    def notice(self, prompts: Sequence[str]) -> None:
        """Log which of the new prompts have a part that the model does not read."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.noticed]
        self.noticed.update(new)
        texts = (self.text, self.classifier and self.classifier.text, self.upsampler and self.upsampler.text)
        for text in dict.fromkeys(filter(None, map(limited, texts))):
            if said := unread(text, new):
                log.warning(f"prompts are cut: {said}; what is not read changes no image")

    def with_upsampler(self, second: Pipeline, name: str = "") -> Pipeline:
        """The same pipeline followed by a super-resolution pipeline: the two stages of a cascade (Ho et al. 2022).

        The second stage reads the same prompts, samples with its own options, and uses the same seeds with other noise.
        name: of the second stage, for image metadata. Errors: `ConfigError` if it does not read a low-resolution image.
        """
        with refused(name):
            super_resolution(second.family)
        same = copy.copy(self)
        same.upsampler = second
        same.about = self.about | {"enlarged by": f"{second.about.get('model', name)}, {second.options}"}
        same._compiled = same._compile()
        return same

    def inpaint(self, picture: np.ndarray, mask: np.ndarray | None = None) -> Pipeline:
        """The same pipeline, which resamples only the masked part of an image (inpainting or outpainting).

        picture: uint8 (i, j, 3); mask: bool (i, j), True where to sample; a token is sampled if any of its pixels is.
        Without a mask the whole image is resampled from a noised version of it, with noise according to the option
        `strength` of a diffusion. Errors: `ConfigError` for a mask that makes a raster-order family keep tokens after a
        hole, for an image of another size than the model's, and without a mask for a family that cannot start from an
        image.
        """
        family = inpainting(self.family) if mask is not None else image_to_image(inpainting(self.family))
        self.check_codec()
        spec, factor = family.sample_spec(), self.codec.config.spec.factor if self.codec else 1
        size = tuple(n * factor for n in spec.grid)
        drawn = np.ones(size, bool) if mask is None else mask
        for what, given, wanted in (("image", picture.shape, (*size, 3)), ("mask", drawn.shape, size)):
            if given != wanted:
                raise ConfigError(f"the {what} has the shape {given}; this model draws images of {wanted}")
        rows, columns = spec.tokens
        keep = ~drawn.reshape(1, rows, size[0] // rows, columns, size[1] // columns).any((2, 4))
        with refused():
            check_keep(family.capabilities, spec, 1, keep)
        codes = jnp.asarray(picture[None].astype(np.float32) / 127.5 - 1)
        if self.codec:
            with jax.set_mesh(self.mesh):
                codes = jax.jit(self.codec.config.encode)(self.parts["codec"], codes)
        same = self._with({"inpaint": {"known": codes, "keep": jnp.asarray(keep)}})
        same.about |= {"held": hashlib.sha256(picture.tobytes() + drawn.tobytes()).hexdigest()[:16]}
        return same

    def with_classifier_guidance(self, by: Artifact, name: str = "") -> Pipeline:
        """The same pipeline, guided to the prompt by a classifier or an image-text model of noised images.

        The option `classifier_scale` sets the strength (Dhariwal & Nichol 2021; Nichol et al. 2022). Errors:
        `ConfigError` unless `by` was trained on such images with the same noise at the same times, and reads this
        model's kind of prompt.
        """
        name = name or type(by.config).__name__
        family = classifier_guided(self.family)
        with refused(name):
            classifier = as_classifier(by.config)
        if not family.process.same_noise(classifier.process):
            raise ConfigError(
                f"{name}: it learned the noise of {classifier.process}, and this model draws by that of "
                f"{family.process}"
            )
        reads, asked = classifier.batch_spec(), family.condition_spec()
        if "label" in reads and "label" not in asked:
            raise ConfigError(f"{name}: it knows classes, and this model is asked in words")
        if "label" not in reads and "label" in asked:
            raise ConfigError(f"{name}: it knows captions, and this model is asked by class numbers")
        channels, drawn = reads["image"].shape[-1], family.sample_spec().shape[-1]
        if channels != drawn:
            raise ConfigError(f"{name}: it looks at {channels} channels, and this model draws {drawn}")
        same = self._with({"classifier": by.model})
        same.classifier, same.about = by, same.about | {"pulled by": name}
        return same

    def with_autoguidance(self, weak: Artifact, name: str = "") -> Pipeline:
        """The same pipeline, guided away from the samples of a worse model: autoguidance (Karras et al. 2024).

        The worse model may be smaller, have another network, or be trained less. Errors: `ConfigError` if noise,
        prediction, shape or condition differ.
        """
        name = name or "the worse model"
        with refused(name):
            guide, family = autoguided(weak.config), autoguided(self.family)
        if not family.process.same_noise(guide.process):
            raise ConfigError(
                f"{name}: process is {guide.process}, and {family.process} that of the model which it is to guide"
            )
        theirs, ours = guidance_signature(guide), guidance_signature(family)
        for what in ours:
            if theirs[what] != ours[what]:
                raise ConfigError(
                    f"{name}: {what} is {theirs[what]}, and {ours[what]} that of the model which it is to guide"
                )
        same = self._with({"guide_model": weak.model})
        same.about |= {"guided by": name}
        return same

    def replace(self, **fields: Any) -> Pipeline:
        """The same pipeline with other fields of its family.

        Allowed are fields that do not affect training (`FREE`), such as `solver`, and fields that a trained model may
        be sampled with all the same (`SAMPLED`). Errors: `ConfigError` for a field that the family does not have or
        that training depends on, and for a value that it rejects.
        """
        old, kind = self.family, type(self.family).__name__
        known = [f.name for f in dataclasses.fields(old)]  # pyright: ignore[reportArgumentType]
        for field in fields:
            if field not in known:
                raise ConfigError(f"a {kind} has no '{field}'")
        with refused():
            family = dataclasses.replace(old, **fields)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if odd := changed_fields(old, family, free_fields(old, (FREE, SAMPLED))):
            raise ConfigError(f"a {kind} is trained with its '{odd[0]}': it cannot be sampled with another")
        if family == self.family:
            return self
        same = self._with({})
        same.family = family
        same.source = dataclasses.replace(self.source, config=family) if self.source else None
        same.about |= {name: str(value) for name, value in fields.items()}
        return same

    def _with(self, parts: dict[str, Any]) -> Pipeline:
        """The same pipeline with more parts."""
        same = copy.copy(self)
        same.parts = self.parts | put_on_mesh(parts, shardings(parts, self.mesh))
        same.about = dict(self.about)
        same._compiled = same._compile()
        return same

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        watch: Watch | None = None,
        small: np.ndarray | None = None,
    ) -> Array:
        """One batch, uint8 (b, i, j, 3) on the devices; `small` uint8 (b, i', j', 3) are low-resolution images to
        upscale."""
        if small is None and self.family.capabilities.super_resolution:
            raise ConfigError("this model makes pictures larger: sample the one that draws them, with --upsample")
        condition, keys = self.condition(prompts), image_keys(seeds)
        if small is not None:
            condition["low_res"] = small.astype(np.float32) / 127.5 - 1
            keys = jax.vmap(apart)(keys)
        with jax.set_mesh(self.mesh):
            # All inputs come from the host: arrays put on a mesh of several processes must be the same on each of them.
            data = jax.device_get(jax.random.key_data(keys))
            condition, data = put_on_mesh((condition, data), batch_sharding(self.mesh))
            keys, arrays = jax.random.wrap_key_data(data), jax.device_get(validate_options(self.family, options))
            static = guidance_flags(self.family, options)
            with listening(watch and (lambda done, total, codes: watch(done / total, codes))) as progress:
                return self._compiled(self.parts, condition, keys, arrays, progress, **static)

    def pictures(self, codes: Any) -> np.ndarray:
        """uint8 (b, i, j, 3) from codes, or from images as floats."""
        with jax.set_mesh(self.mesh):
            return to_host(jax.jit(self._finish)(self.parts, np.asarray(codes)))

    def _run(
        self,
        parts: dict[str, Any],
        condition: dict[str, Array],
        keys: Array,
        options: Any,
        progress: Progress | None = None,
        guided: bool | None = None,
    ) -> Array:
        condition = with_features(self.text, parts, condition)
        more: dict[str, Any] = {k: jnp.repeat(v, len(keys), 0) for k, v in parts.get("inpaint", {}).items()}
        more |= {} if guided is None else {"guided": guided}
        more |= {} if progress is None else {"progress": progress}
        more |= self.helpers(parts)
        return self._finish(parts, self.family.sample(parts["model"], condition, keys, options, **more))

    def helpers(self, parts: dict[str, Any]) -> dict[str, Any]:
        """The other models that `sample` takes for guidance."""
        found = {"guide_model": parts["guide_model"]} if "guide_model" in parts else {}
        if self.classifier:
            found["classifier"] = jax.tree_util.Partial(
                as_classifier(self.classifier.config).log_p, parts["classifier"]
            )
        return found

    def _finish(self, parts: dict[str, Any], codes: Array) -> Array:
        return to_uint8(self.codec.config.decode(parts["codec"], codes) if self.codec else codes)

    def save(self, folder: str | Path, name: str = "") -> None:
        """Write a released model: weights, config, tokenizer, codec and a model card.

        A loaded pipeline's weights are read from its folder again.
        """
        about = lambda artifact: card(artifact, name or Path(folder).name)
        if self.folder is not None:  # the weights here may be of another dtype
            copy_artifact(self.folder, folder, about, self.family)
        else:
            artifact = Artifact(self.family, self.parts["model"], self.text)
            save_artifact(artifact, folder, about(artifact))


def guidance_signature(family: GaussianFamily) -> dict[str, Any]:
    """Properties that two Gaussian diffusions must share for one to guide the other."""
    return {
        "predicts": family.predicts,
        "shape": family.sample_spec().shape,
        "condition": dict(family.condition_spec()),
    }
