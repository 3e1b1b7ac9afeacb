"""Tokenizer, model and codec in one value: prompts in, images out."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from t2i_jax.core.casts import cast_dtypes
from t2i_jax.core.conditions import TextEncoder, Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.errors import did_you_mean
from t2i_jax.core.fields import FREE, SAMPLED, changed_fields, free_fields
from t2i_jax.core.image_files import digest
from t2i_jax.core.narrow import (
    any_size,
    as_classifier,
    as_family,
    check_codes,
    gives_features,
    image_text_encoder,
    int8_sampling,
    negative_prompts,
    super_resolution,
    text_encoder,
)
from t2i_jax.core.sharding import MeshConfig, put_on_mesh, shardings, to_host
from t2i_jax.core.types import Codec, Family, SamplingOptions
from t2i_jax.edits import Blend, Edit, Like, embedding_field, tokens_to_keep
from t2i_jax.guides import ClassifierGuidance, Guide
from t2i_jax.nn.decode import int8_weights
from t2i_jax.sampler import (
    OnPreview,
    OnProgress,
    Program,
    Sampler,
    check_codec,
    check_threshold,
    embed,
    encode,
    interpolation,
)
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.storage.adapters import read_adapter
from t2i_jax.storage.artifacts import Artifact, copy_artifact, load_artifact, load_codec, on_host, save_artifact
from t2i_jax.text.cut import check_vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A family with its weights, codec and tokenizer, on the devices of a mesh: a value, which threads may share.

    `Pipeline.load(folder)` loads a run or a released model, `Pipeline.place` puts weights on a mesh; calling it or
    `sample` returns images; `save` writes a released model. Pipelines that differ in arrays alone share their compiled
    programs.
    """

    family: Family
    model: nnx.Module
    """weights"""
    codec: Artifact[Codec] | None
    """with its weights; None for a family of pixels"""
    text: Tokenizer | None
    encoder: nnx.Module | None
    """weights of the text encoder; None if `text` gives no features"""
    mesh: Mesh
    folder: str | Path | None = None
    """where the model was loaded from"""
    step: int = 0
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """metadata of images: what they depend on besides prompt, seed, options and arguments of `sample`"""

    @classmethod
    def place(
        cls,
        family: Family,
        model: nnx.Module,
        codec: Artifact[Codec] | None = None,
        text: Tokenizer | None = None,
        mesh: MeshConfig = MeshConfig(),
    ) -> Pipeline:
        """A pipeline of weights that are put on a mesh.

        Errors: `ConfigError` for a mesh that the devices do not allow, and a tokenizer with ids beyond the family's
        table.
        """
        with refused():
            check_vocabulary(text, family.batch_spec())
            devices = mesh.build()
            with on_host():
                encoder = text_encoder(text).load() if gives_features(text) else None
        parts = (model, codec and codec.model, encoder)
        model, weights, encoder = put_on_mesh(parts, shardings(parts, devices))
        codec = codec and dataclasses.replace(codec, model=weights)
        return cls(family, model, codec, text, encoder, devices)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        mesh: MeshConfig = MeshConfig(),
        int8: bool = False,
        lora: Mapping[str, float] = MappingProxyType({}),
        database: str | Path = "",
    ) -> Pipeline:
        """The pipeline of a run folder or a released model; each shard of an array is read for the device that holds
        it.

        int8: matrices as integers and scales (`nn.decode.int8_weights`), for models that sample token by token. lora:
        folders of adapters that are added to the weights, and the factor of each. database: of a model that retrieves
        (`text.retrieval.Neighbours`), in the place of its own. Errors: `ConfigError` if the folder holds no family, or
        one without support for `int8`, for adapters of another model, and for a database by another encoder.
        """
        with refused():
            devices = mesh.build()
        adapters = [(read_adapter(path), factor) for path, factor in lora.items()]
        dtypes = (lambda _: {}) if int8 else cast_dtypes
        artifact = load_artifact(folder, mesh=devices, dtypes=dtypes, lora=adapters)
        with refused(str(folder)):
            family = int8_sampling(artifact.config) if int8 else as_family(artifact.config)
        codec = load_codec(artifact.codec, mesh=devices) if artifact.codec else None
        if codec:
            check_codes(family, codec.config, artifact.codec)
        if int8:  # drop the float weights
            artifact = dataclasses.replace(artifact, model=int8_weights(artifact.model))
        about = {"model": f"{folder}, step {artifact.step}"} | ({"weights": "int8"} if int8 else {})
        about |= {"lora": ", ".join(f"{path} x {factor:g}" for path, factor in lora.items())} if lora else {}
        text = artifact.text
        if database:
            with refused(str(folder)):
                text = _with_database(text, str(database))
            about |= {"database": str(database)}
        pipeline = cls.place(family, artifact.model, codec, text, mesh)
        return dataclasses.replace(pipeline, folder=folder, step=artifact.step, about=about)

    @property
    def options(self) -> SamplingOptions:
        """The family's sampling options at their defaults; replace fields and pass them to `sample`."""
        return self.family.options()

    @property
    def reads_negative(self) -> bool:
        """Whether a negative prompt has an effect on the family with these options."""
        return self.family.capabilities.negative and guided_by(self.family, self.options) is not False

    @property
    def parts(self) -> dict[str, object]:
        """The weights: `model`; `codec` and `text`, the text encoder's, or None."""
        return {"model": self.model, "codec": self.codec and self.codec.model, "text": self.encoder}

    def __call__(
        self,
        prompts: str | int | Sequence[str | int],
        *,
        seeds: Sequence[int] | None = None,
        edit: Edit | None = None,
        guides: Sequence[Guide] = (),
        upsampler: Pipeline | Sequence[Pipeline] | None = None,
        negative: str | int = "",
        like: Like | None = None,
        batch_size: int = 16,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        **options: object,
    ) -> np.ndarray:
        """Images uint8 (n, i, j, 3), one for each prompt, or for each seed if there is one prompt.

        prompts: texts, or class numbers for a class-conditional model. options: fields of `options`, such as
        `guidance=3.0`. The other arguments are those of `sampler` and `Sampler.sample`. Errors: `ConfigError` for an
        option that the family does not have.
        """
        inputs = [prompts] if isinstance(prompts, str | int) else list(prompts)
        if isinstance(prompts, str | int) and seeds is not None:
            inputs *= len(seeds)
        chosen, away = self._chosen(options), str(negative)
        sampler = self.sampler(chosen, edit=edit, guides=guides, upsampler=upsampler, negative=away, like=like)
        return sampler.sample([str(p) for p in inputs], seeds, batch_size, on_progress, on_preview)

    def interpolate(
        self,
        prompts: str | int | Sequence[str | int],
        *,
        seeds: int | Sequence[int] = 0,
        count: int = 8,
        batch_size: int = 16,
        on_progress: OnProgress | None = None,
        **options: object,
    ) -> np.ndarray:
        """Images uint8 (n, i, j, 3) on the way along prompts, seeds or both: `count` from each to the next.

        prompts, seeds: one of each pair is an end; one prompt or one seed serves all ends. options: as in a call.
        Errors: `ConfigError` for a family without the capability `interpolation`, ValueError for fewer than two ends.
        """
        several = [str(p) for p in ([prompts] if isinstance(prompts, str | int) else prompts)]
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        ends = max(len(several), len(numbers))
        if not {len(several), len(numbers)} <= {1, ends}:
            raise ValueError(f"{len(several)} prompts and {len(numbers)} seeds: as many of each, or one")
        several = several * (ends if len(several) == 1 else 1)
        numbers = numbers * (ends if len(numbers) == 1 else 1)
        way = interpolation(list(zip(several, numbers, strict=True)), count)
        some, own, toward = zip(*way, strict=True)
        return self.sampler(self._chosen(options)).sample(some, own, batch_size, on_progress, toward=toward)

    def _chosen(self, options: Mapping[str, object]) -> SamplingOptions:
        """The default options, but for those given. Errors: `ConfigError` for one that the family does not have."""
        names = [field.name for field in dataclasses.fields(self.options)]
        if unknown := [name for name in options if name not in names]:
            hint = did_you_mean(unknown[0], names) or f"; there are {', '.join(names)}"
            raise ConfigError(f"a {type(self.family).__name__} has no sampling option '{unknown[0]}'{hint}")
        return dataclasses.replace(self.options, **options)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        options: SamplingOptions | None = None,
        batch_size: int = 16,
        on_progress: OnProgress | None = None,
    ) -> np.ndarray:
        """`Sampler.sample` without edit and guides: images uint8 (n, i, j, 3), one per prompt."""
        return self.sampler(options).sample(prompts, seeds, batch_size, on_progress)

    def sampler(
        self,
        options: SamplingOptions | None = None,
        *,
        edit: Edit | None = None,
        guides: Sequence[Guide] = (),
        upsampler: Pipeline | Sequence[Pipeline] | None = None,
        negative: str = "",
        like: Like | None = None,
    ) -> Sampler:
        """A sampler with these options, by default those of the family.

        edit: of a given image, for all prompts. guides: at most one of a kind. upsampler: the second stage of a cascade
        (Ho et al. 2022), a super-resolution pipeline, or several, one after the other; they read the same prompts,
        sample with their own options, and use the same seeds with other noise. negative: a prompt to guide away from,
        in the place of the unconditional branch; later stages read it too, if they can and are guided. like: images
        that new ones are to be like, for all prompts. Errors: `ConfigError` for what the family cannot do, guides that
        do not match it, and a stage whose images are smaller than those that it is given.
        """
        options = self.options if options is None else options
        check_threshold(self.codec and self.codec.config, options)
        about, parts = dict(self.about), self.parts
        if len({type(guide) for guide in guides}) < len(guides):
            raise ConfigError("two guides of one kind: a model is guided by one of each")
        for guide in guides:
            guide.check(self.family)
        stages = self._cascade([upsampler] if isinstance(upsampler, Pipeline) else list(upsampler or ()))
        if edit:
            options, parts = edit.override(options), parts | self._put(self._encode(edit))
            about |= {"held": digest(edit.image, edit.mask)}
        if like:
            parts |= self._put({embedding_field(self.family, self.text): like.embedding(self._embed)})
            about |= {"like": digest(*like.images) + (f", {like.share}" if isinstance(like, Blend) else "")}
        for guide in guides:
            options, parts = guide.override(options), parts | self._put(guide.weights)
            about |= guide.about
        if stages:
            said = (f"{stage.about.get('model', '')}, {stage.options}" for stage in stages)
            about |= {"upsampler": "; ".join(said)}
        if negative:
            negative_prompts(self.family)
            if guided_by(self.family, options) is False:
                raise ConfigError("a negative prompt with guidance 1: nothing guides")
            about |= {"negative": negative}
        later: Sampler | None = None
        for n, stage in reversed(list(enumerate(stages, 1))):
            own = stage.sampler(negative=negative if stage.reads_negative else "")
            later = dataclasses.replace(own, upsampler=later, stage=n)
        classifiers = (as_classifier(g.classifier.config) for g in guides if isinstance(g, ClassifierGuidance))
        encoder = _of_any_database(self.text) if gives_features(self.text) else None
        program = Program(self.family, self.codec and self.codec.config, encoder, next(classifiers, None))
        return Sampler(program, parts, self.text, self.mesh, options, tuple(guides), later, negative, about)

    def _cascade(self, stages: Sequence[Pipeline]) -> list[Pipeline]:
        """The stages after this one, of latents each with a position for each pixel that it is given, and of pixels
        each in the ratio of sides that it is given.

        Errors: `ConfigError` for a stage that enlarges nothing, one of another ratio whose parameters are of its size,
        and one that would make its small images smaller.
        """
        given, made = self.image_shape, []
        for stage in stages:
            name = Path(stage.folder or "").name
            with refused(name):
                family, (rows, columns) = super_resolution(stage.family), stage.family.sample_spec().grid
                if stage.codec and "low_res" in family.condition_spec():
                    factor = stage.codec.config.spec.factor
                    stage = stage.sized(given[1] * factor, given[0] * factor)
                elif "low_res" in family.condition_spec():
                    if rows * columns < math.prod(given):
                        before = f"{given[0]}x{given[1]} before it"
                        raise ConfigError(f"its images are {rows}x{columns}, smaller than {before}")
                    if rows * given[1] != columns * given[0]:
                        factor = max(1, round(math.sqrt(rows * columns / math.prod(given))))
                        stage = stage.sized(given[1] * factor, given[0] * factor)
            made.append(stage)
            given = stage.image_shape
        return made

    def other_codec(self, folder: str | Path) -> Artifact[Codec]:
        """A codec for the model's codes besides its own, on the same mesh: a small one, for intermediate images.

        folder: a run or a released codec. Errors: `ConfigError` for a model of pixels, a codec of other codes, and one
        that makes no images.
        """
        codec = load_codec(folder, mesh=self.mesh)
        if self.codec is None:
            raise ConfigError(f"{folder}: the model draws pixels, which need no codec")
        check_codes(self.family, codec.config, str(folder))
        if not codec.config.spec.decodes:
            raise ConfigError(f"{folder} holds the encoder of a codec alone, which makes no images")
        return codec

    def tokens_to_keep(self, edit: Edit) -> np.ndarray:
        """Which tokens an edit keeps, bool (1, rows, columns). Errors: `ConfigError` for an edit of other images than
        the model's, or that it cannot do."""
        family, codec = edit.editable(self.family), self.codec and self.codec.config
        check_codec(family, codec)
        return tokens_to_keep(edit, family, codec)

    def _encode(self, edit: Edit) -> dict[str, object]:
        """Arguments of `Family.sample`: the samples of the image (1, *grid, ...), and which tokens to keep."""
        keep, codec = self.tokens_to_keep(edit), self.codec
        known = edit.image[None].astype(np.float32) / 127.5 - 1
        if codec:
            with jax.set_mesh(self.mesh):
                known = encode(codec.config, codec.model, known)
        return {"known": known, "keep": keep}

    def _embed(self, image: np.ndarray) -> np.ndarray:
        """The embedding fp32 (1, ..., k) of an image. Errors: `ConfigError` for other than uint8 (i, j, 3)."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"an image {image.dtype} {image.shape}: uint8 (i, j, 3) is needed")
        text, images = image_text_encoder(self.text), image[None].astype(np.float32) / 127.5 - 1
        with jax.set_mesh(self.mesh):
            return to_host(embed(text, self.encoder, images))

    def _put(self, tree: dict[str, object]) -> dict[str, object]:
        return put_on_mesh(tree, shardings(tree, self.mesh))

    def replace(self, **fields: object) -> Pipeline:
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
        if family == old:
            return self
        about = {**self.about, **{name: str(value) for name, value in fields.items()}}
        return dataclasses.replace(self, family=family, about=about)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Rows and columns of images, in pixels."""
        factor = self.codec.config.spec.factor if self.codec else 1
        rows, columns = self.family.sample_spec().grid
        return rows * factor, columns * factor

    def sized(self, width: int, height: int) -> Pipeline:
        """The same pipeline for images of another width and height, in pixels.

        Errors: `ConfigError` for a family whose parameters are of one size, and for sides that its tokens or the codec
        do not divide.
        """
        factor = self.codec.config.spec.factor if self.codec else 1
        with refused(f"size {width}x{height}"):
            family = any_size(self.family)
            if width % factor or height % factor:
                raise ConfigError(f"sides are multiples of {factor}, the pixels of a code")
            family = family.sized((height // factor, width // factor))
            if family == self.family:
                return self
            model = family.adopt(self.model)
        model = put_on_mesh(model, shardings(model, self.mesh))
        return dataclasses.replace(self, family=family, model=model, about={**self.about, "size": f"{width}x{height}"})

    def with_database(self, database: str | Path) -> Pipeline:
        """The same pipeline, which retrieves from another database; both share their compiled programs where these have
        about as many rows. Errors: `ConfigError` for a model that retrieves nothing, and for a database by another
        encoder; FileNotFoundError."""
        with refused():
            text = _with_database(self.text, str(database))
            with on_host():
                encoder = text.load()
        encoder = put_on_mesh(encoder, shardings(encoder, self.mesh))
        about = {**self.about, "database": str(database)}
        return dataclasses.replace(self, text=text, encoder=encoder, about=about)

    def save(self, folder: str | Path, name: str = "") -> None:
        """Write a released model: weights, config, tokenizer, codec and a model card.

        A loaded pipeline's weights are read from its folder again, unless it is `sized`.
        """
        from t2i_jax.release import card  # it knows of training, which takes long to import

        about = lambda artifact: card(artifact, name or Path(folder).name)
        if self.folder is not None and "size" not in self.about:  # the weights here may be of another dtype
            copy_artifact(self.folder, folder, about, self.family)
            return
        with tempfile.TemporaryDirectory() as work:
            artifact = Artifact(self.family, self.model, self.text, image_size=min(self.image_shape))
            if self.codec:
                artifact = dataclasses.replace(artifact, codec=str(Path(work, "codec")))
                save_artifact(self.codec, artifact.codec, f"# {type(self.codec.config).__name__}\n")
            save_artifact(artifact, folder, about(artifact))


def _with_database(text: Tokenizer | None, database: str) -> TextEncoder:
    """`text.retrieval.with_database`, whose module takes long to import."""
    from t2i_jax.text.retrieval import with_database

    return with_database(text, database)


def _of_any_database(text: Tokenizer | None) -> Tokenizer | None:
    """`text.retrieval.of_any_database`, whose module only a text that retrieves imports."""
    if text is None or not text.spec.retrieves:
        return text
    from t2i_jax.text.retrieval import of_any_database

    return of_any_database(text)
