"""The sampler of a pipeline: a compiled program, and all of its arguments that are the same for every batch."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from t2i_jax.core.conditions import Batch, ImageTextEncoder, Tokenizer
from t2i_jax.core.config import ConfigError, refused, to_json
from t2i_jax.core.fields import values
from t2i_jax.core.frozen import with_features, with_low_codes
from t2i_jax.core.image_files import to_uint8
from t2i_jax.core.keys import apart, image_keys
from t2i_jax.core.narrow import interpolates
from t2i_jax.core.sharding import RULES, batch_sharding, put_on_mesh, to_host
from t2i_jax.core.types import Classifier, Codec, Family, SamplingOptions, Toward
from t2i_jax.guides import Guide
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import validate_options
from t2i_jax.sampling.progress import Progress, listening
from t2i_jax.sampling.solvers import has_own_solvers
from t2i_jax.storage import programs
from t2i_jax.storage.artifacts import Artifact, with_files
from t2i_jax.text.cut import limited, unread

log = logging.getLogger(__name__)
GREY = 230
"""Pixels of codes that are not drawn yet."""

OnProgress = Callable[[float, int], None]
"""Called as (images finished, all images)."""
OnPreview = Callable[[float, np.ndarray], None]
"""Called while a batch is sampled, in another thread: (share done, codes or images of the batch so far)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of a sampler. Weights, options, images and masks are arguments, so that all pipelines with an
    equal program share what is compiled."""

    family: Family
    codec: Codec | None
    text: Tokenizer | None
    """None if it gives no features"""
    classifier: Classifier | None = None

    def codes(
        self,
        guided: bool | None,
        parts: Mapping[str, object],
        condition: dict[str, Array],
        keys: Array,
        options: SamplingOptions,
        progress: Progress | None = None,
        toward: Toward | None = None,
        negative: dict[str, Array] | None = None,
    ) -> Array:
        """Samples (b, *grid, ...) of the family.

        guided: static, as in `Family.sample`. parts: `model`; `text`, the weights of a text encoder; of an edit `known`
        and `keep` (1, ...); of images that new ones are to be like `features` or `image_features` (1, ...); of guides
        `classifier` and `guide_model`, and for the classifier `reference` and `reference_weights` (1, ...).
        """
        ready = lambda condition: with_features(self.text, parts, dict(condition))
        if "features" in parts:
            own = {k: v for k, v in condition.items() if k not in ("text", "text_mask")}
            condition = own | {"features": jnp.repeat(cast(Array, parts["features"]), len(keys), 0)}
        condition = with_low_codes(self.family.condition_spec(), self.codec, parts, ready(condition))
        rows = lambda *names: {k: jnp.repeat(cast(Array, parts[k]), len(keys), 0) for k in names if k in parts}
        more: dict[str, object] = {**rows("known", "keep", "image_features")}
        condition = condition | rows("reference", "reference_weights")
        if "guide_model" in parts:
            more["guide_model"] = parts["guide_model"]
        if toward is not None:
            more["toward"] = dataclasses.replace(toward, condition=ready(toward.condition))
        if negative is not None:
            more["negative"] = ready(negative)
        if self.classifier:
            more["classifier"] = jax.tree_util.Partial(self.classifier.log_p, parts["classifier"])
        codes = self.family.sample(parts["model"], condition, keys, options, guided=guided, progress=progress, **more)
        wanted, name = self.family.sample_spec(), type(self.family).__name__
        chex.assert_shape(codes, (len(keys), *wanted.shape), custom_message=f"{name}.sample, by its sample_spec")
        return codes


@functools.partial(jax.jit, static_argnames=("program", "guided"))
def _sample(
    program: Program,
    guided: bool | None,
    parts: Mapping[str, object],
    condition: dict[str, Array],
    keys: Array,
    options: SamplingOptions,
    progress: Progress | None,
    toward: Toward | None = None,
    negative: dict[str, Array] | None = None,
) -> Array:
    codes = program.codes(guided, parts, condition, keys, options, progress, toward, negative)
    return _decode(program.codec, parts["codec"], codes)


@functools.lru_cache(64)
def _kept(
    program: Program, guided: bool | None, tree: Hashable, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> Callable[..., Array] | None:
    """The compiled program with arguments of these shapes, called with their leaves, whose trace is kept on this
    machine; None where it is not, and the program is to be traced.

    tree: of the arguments parts, condition, data of the keys, options, negative.
    """

    def draw(parts, condition, data, options, negative):
        return _sample(program, guided, parts, condition, jax.random.wrap_key_data(data), options, None, None, negative)

    try:
        return programs.compiled(draw, _about(program, guided), jax.tree.unflatten(tree, shapes))
    except programs.CannotKeep as error:
        log.info(f"{type(program.family).__name__}: traced each time: {error}")
        return None


def _about(program: Program, guided: bool | None) -> dict[str, object]:
    """What a program depends on besides arrays, as JSON. Errors: `CannotKeep` where code of a user is a part of it."""
    text = with_files(program.text, lambda file, part, path: programs.identity(path))
    try:
        about = to_json(dataclasses.replace(program, text=text))
    except ConfigError as error:  # a part with values that are not plain
        raise programs.CannotKeep(str(error)) from error
    kinds = re.findall(r'"type": "([^"]*)"', json.dumps(about))
    if own := [kind for kind in kinds if not kind.startswith("t2i_jax.")]:
        raise programs.CannotKeep(f"it has a {own[0]}")
    if has_own_solvers():
        raise programs.CannotKeep("there are other solvers than those of the package")
    return {"program": about, "guided": guided, "rules": str(RULES)}


def _decode(codec: Codec | None, model: object, codes: Array) -> Array:
    images = codec.decode(model, codes) if codec else codes
    maker = f"{type(codec).__name__}.decode" if codec else "a sample that no codec decodes"
    chex.assert_shape(images, (len(codes), None, None, 3), custom_message=maker)
    return to_uint8(images)


_decode_alone = jax.jit(_decode, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def encode(codec: Codec, model: nnx.Module, images: Array) -> Array:
    """Codes of images (b, i, j, 3) in [-1, 1]."""
    return codec.encode(model, images)


@partial(jax.jit, static_argnums=0)
def embed(text: ImageTextEncoder, model: nnx.Module, images: Array) -> Array:
    """Embeddings of images (b, i, j, 3) in [-1, 1]: (b, ..., k)."""
    return text.image_features(model, images)


@dataclasses.dataclass(frozen=True)
class Between:
    """Where an image lies between its own prompt and seed and others."""

    prompt: str
    seed: int
    share: float
    """in [0, 1]: 0 is its own, 1 the others"""

    def title(self, prompt: str) -> str:
        """A caption of the image whose own prompt is `prompt`."""
        if prompt == self.prompt or self.share == 0:
            return prompt
        return self.prompt if self.share == 1 else f"{self.share:.0%}"


def interpolation(ends: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int, Between]]:
    """The images on the way along `ends`, each a prompt and a seed: `count` from each end to the next, both included.

    Errors: ValueError for fewer than two ends or images.
    """
    if len(ends) < 2 or count < 2:
        raise ValueError(f"an interpolation of {count} images between {len(ends)} ends: at least 2 of each")
    legs = enumerate(pairwise(ends))  # the end of a leg is the start of the next one
    return [(*a, Between(*b, n / (count - 1))) for leg, (a, b) in legs for n in range(min(leg, 1), count)]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A pipeline with options, an edit and guides, checked and on the mesh; made by `Pipeline.sampler`."""

    program: Program
    parts: Mapping[str, object]
    """the arrays of `Program.codes`, and the weights of the codec as `codec`"""
    text: Tokenizer | None
    mesh: Mesh
    options: SamplingOptions
    guides: tuple[Guide, ...] = ()
    upsampler: Sampler | None = None
    """of the next stage"""
    negative: str = ""
    """prompt that images are guided away from; empty: none"""
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """metadata of images: all that they depend on besides prompt, seed and options"""
    stage: int = 0
    """its place in a cascade, from 0: the same seed gives other noise at each"""

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        toward: Sequence[Between] | None = None,
    ) -> np.ndarray:
        """Images uint8 (n, i, j, 3), one per prompt; image m depends on prompt m, seed m and `toward` m alone.

        seeds: 0, 1, ... by default. on_progress: is called within a batch too if there is `on_preview`. on_preview:
        needs a host callback in the program. toward: draw each image between its prompt and seed and these; for a
        family with the capability `interpolation`.
        """
        made: list[np.ndarray] = []
        done = lambda: sum(map(len, made))

        def preview(share: float, codes: np.ndarray) -> None:
            if on_progress:
                on_progress(done() + share * len(codes), len(prompts))
            if on_preview:
                on_preview(share, codes)

        for images in self.batches(prompts, seeds, batch_size, on_preview and preview, toward):
            made.append(images)
            if on_progress:
                on_progress(done(), len(prompts))
        return np.concatenate(made)

    def batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        batch_size: int = 16,
        on_preview: OnPreview | None = None,
        toward: Sequence[Between] | None = None,
    ) -> Iterator[np.ndarray]:
        """The images of `sample`, one batch after the other; prompts that are cut are logged first."""
        if toward is not None:
            interpolates(self.program.family)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed per prompt")
        check_codec(self.program.family, self.program.codec)
        self.log_unread([*prompts, self.negative] if self.negative else prompts)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = -(-max(shards, min(batch_size, len(prompts))) // shards) * shards
        for at in range(0, len(prompts), size):
            some = list(prompts[at : at + size])
            count, short = len(some), size - len(some)

            def preview(share: float, codes: np.ndarray, count: int = count) -> None:
                if on_preview:
                    on_preview(share, codes[:count])

            whole = some + some[-1:] * short, seeds[at : at + size] + [0] * short
            others = toward and [*toward[at : at + size], *toward[at : at + size][-1:] * short]
            images = self.generate(*whole, on_preview and preview, toward=others)
            stage = self.upsampler
            while stage:
                images = stage.generate(*whole, low_res=to_host(images))
                stage = stage.upsampler
            yield to_host(images)[:count]

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_preview: OnPreview | None = None,
        low_res: np.ndarray | None = None,
        toward: Sequence[Between] | None = None,
    ) -> Array:
        """One batch, uint8 (b, i, j, 3) on the devices; low_res: uint8 (b, i', j', 3), to upscale. toward: as in
        `sample`."""
        asked = self._asked(prompts, seeds, low_res)
        with jax.set_mesh(self.mesh):
            inputs = condition, data, arrays, away = self._inputs(asked, len(prompts))
            others = None if toward is None else self._others(toward)
            with listening(on_preview and (lambda done, total, x: on_preview(done / total, x))) as progress:
                parts = dict(self.parts)
                if progress is None and others is None and (kept := self._kept(parts, *inputs)):
                    return kept(*jax.tree.leaves((parts, *inputs)))
                keys = jax.random.wrap_key_data(data)
                return _sample(self.program, self.guided, parts, condition, keys, arrays, progress, others, away)

    def warm(self, prompts: Sequence[str]) -> None:
        """Make ready, without drawing, the program of a batch of as many prompts, where programs are kept: it reads the
        shapes of the weights alone."""
        asked = self._asked(prompts, [0] * len(prompts), None)
        with jax.set_mesh(self.mesh):
            self._kept(dict(self.parts), *self._inputs(asked, len(prompts)))

    def _asked(
        self, prompts: Sequence[str], seeds: Sequence[int], low_res: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The condition of a batch and the data of its keys, on the host."""
        if low_res is None and self.program.family.capabilities.super_resolution:
            raise ConfigError("this model enlarges images: sample the model that makes them, with --upsample")
        condition, keys = self.condition(prompts), image_keys(seeds)
        if low_res is not None:
            condition["low_res"] = low_res.astype(np.float32) / 127.5 - 1
            for _ in range(max(self.stage, 1)):
                keys = jax.vmap(apart)(keys)
        return condition, jax.device_get(jax.random.key_data(keys))

    def _inputs(
        self, asked: tuple[dict[str, np.ndarray], np.ndarray], count: int
    ) -> tuple[dict[str, Array], Array, SamplingOptions, dict[str, Array] | None]:
        """The arguments of a batch besides the weights, on the mesh: the condition, the data of the keys, the options,
        the negative prompt."""
        # All inputs come from the host: arrays put on a mesh of several processes must be the same on each of them.
        condition, data = put_on_mesh(asked, batch_sharding(self.mesh))
        arrays = jax.device_get(validate_options(self.program.family, self.options))
        return cast(dict[str, Array], condition), cast(Array, data), arrays, self._away(count)

    def _kept(self, *arguments: object) -> Callable[..., Array] | None:
        """The compiled program of arguments whose trace is kept on this machine, called with their leaves; None where
        none is kept (`storage/programs.py`), and of several devices."""
        if self.mesh.size > 1 or programs.folder() is None:
            return None
        leaves, tree = jax.tree.flatten(arguments)
        return _kept(self.program, self.guided, tree, tuple(map(programs.shape, leaves)))

    def _away(self, count: int) -> dict[str, Array] | None:
        """The negative prompt, a row for each image, on the mesh."""
        if not self.negative:
            return None
        condition = condition_of(self.program.family, self.text, [self.negative] * count)
        return cast(dict[str, Array], put_on_mesh(condition, batch_sharding(self.mesh)))

    def _others(self, toward: Sequence[Between]) -> Toward:
        """The other ends of a batch, on the mesh."""
        data = jax.device_get(jax.random.key_data(image_keys([end.seed for end in toward])))
        share = np.asarray([end.share for end in toward], np.float32)
        there = self.condition([end.prompt for end in toward]), data, share
        condition, data, share = put_on_mesh(there, batch_sharding(self.mesh))
        return Toward(cast(Batch, condition), jax.random.wrap_key_data(data), cast(Array, share))

    @property
    def guided(self) -> bool | None:
        """Whether to compute the unconditional branch, as in `Family.sample`."""
        return guided_by(self.program.family, self.options)

    def decode(self, codes: np.ndarray, codec: Artifact[Codec] | None = None) -> np.ndarray:
        """Images uint8 (b, i, j, 3) of codes, or of images as floats; codec: another than the pipeline's own, of the
        same codes. Pixels of discrete codes that are -1, not drawn yet, are grey."""
        config, model = (codec.config, codec.model) if codec else (self.program.codec, self.parts["codec"])
        drawn = codes >= 0 if np.issubdtype(codes.dtype, np.integer) else np.ones(codes.shape, bool)
        with jax.set_mesh(self.mesh):
            images = to_host(_decode_alone(config, model, codes if drawn.all() else np.maximum(codes, 0)))
        if drawn.all():
            return images
        factor, cells = images.shape[1] // codes.shape[1], drawn.reshape(*drawn.shape[:3], -1).all(-1)
        return np.where(repeat(cells, "b i j -> b (i p) (j q) 1", p=factor, q=factor), images, np.uint8(GREY))

    def condition(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The condition of the model and of its guides, on the host. Errors: as of `condition_of`."""
        condition = condition_of(self.program.family, self.text, prompts)
        for guide in self.guides:
            condition |= guide.condition(prompts)
        return condition

    def log_unread(self, prompts: Sequence[str]) -> None:
        """Log which prompts have a part that no model reads."""
        texts, stage = [self.text, *(guide.text for guide in self.guides)], self.upsampler
        while stage:
            texts.append(stage.text)
            stage = stage.upsampler
        for text in dict.fromkeys(filter(None, map(limited, texts))):
            if cut := unread(text, prompts):
                log.warning(f"prompts are cut: {cut}; what is not read changes no image")


def check_codec(family: Family, codec: Codec | None) -> None:
    """Errors: `ConfigError` if the samples are not pixels and there is no codec to decode them."""
    if codec is None and family.sample_spec().kind != "pixels":
        raise ConfigError("the model draws codes and has no codec that makes images of them: convert it with --codec")


def check_threshold(codec: Codec | None, options: SamplingOptions) -> None:
    """Errors: `ConfigError` for options that threshold codes, whose range is that of no image."""
    if codec is not None and np.any(np.asarray(values(options).get("threshold", 0)) > 0):
        raise ConfigError("threshold: of models of pixels, whose range is known; this one draws codes of a codec")


def condition_of(family: Family, text: Tokenizer | None, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The condition of a model, on the host: text ids and mask, or class labels.

    Errors: `ConfigError` for prompts that are not valid class numbers of a class-conditional model.
    """
    if (label := family.condition_spec().get("label")) is not None:
        with refused("this model takes class numbers as prompts"):
            if words := [p for p in prompts if not re.fullmatch(r"\s*[+-]?\d+\s*", p)]:
                raise ValueError(f"{words[0]!r} is no number")
            labels = [int(p) for p in prompts]
            least, most = label.low or 0, label.high or 0
            if odd := [n for n in labels if not least <= n <= most]:
                raise ValueError(f"{odd[0]} is not one of {least} to {most}")
        return {"label": np.asarray(labels, np.int32)}
    if text is None:
        return {}
    ids, mask = text(list(prompts))
    return {"text": ids, "text_mask": mask}
