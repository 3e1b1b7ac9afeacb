"""Other models that guide a Gaussian diffusion: arguments of a pipeline."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError, refused
from t2i_jax.core.fields import Checked, Finite
from t2i_jax.core.image_files import digest
from t2i_jax.core.narrow import as_classifier, autoguided, classifier_guided, compares_with_reference
from t2i_jax.core.types import Family, GaussianFamily, SamplingOptions
from t2i_jax.storage.artifacts import Artifact, load_artifact


class Guide(abc.ABC):
    """Base of guides."""

    @property
    def text(self) -> Tokenizer | None:
        """The tokenizer of a guide that reads prompts itself."""
        return None

    @property
    @abc.abstractmethod
    def about(self) -> dict[str, str]:
        """Metadata of images."""

    @property
    @abc.abstractmethod
    def weights(self) -> dict[str, object]:
        """Its model, and images, by the names that `Program.codes` gives them."""

    @abc.abstractmethod
    def check(self, family: Family) -> None:
        """Errors: `ConfigError` if it cannot guide the family."""

    def override(self, options: SamplingOptions) -> SamplingOptions:
        """Sampling options with those of the guide."""
        return options

    def condition(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """What it reads of prompts besides the family's condition."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference(Checked):
    """An image that samples are to be like, for an image-text model of noised images, and the weights of what it
    compares (Liu et al. 2023, Semantic Diffusion Guidance): the terms of `CLIP.log_p`.

    Errors: `ConfigError` for an image of another shape or dtype.
    """

    image: np.ndarray
    """uint8 (i, j, 3), of the model's size"""
    text_weight: Finite = 1.0
    """of the similarity with the caption"""
    image_weight: Finite = 1.0
    """of the similarity with the embedding of the image"""
    layout_weight: Finite = 0.0
    """of the squared distance from the feature map of the image"""

    def __post_init__(self):
        super().__post_init__()
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ConfigError(f"a reference {self.image.dtype} {self.image.shape}: uint8 (i, j, 3) is needed")

    @property
    def weights(self) -> tuple[float, float, float]:
        return self.text_weight, self.image_weight, self.layout_weight

    @property
    def arrays(self) -> dict[str, object]:
        """`reference` fp32 (1, i, j, 3) in [-1, 1] and `reference_weights` fp32 (1, 3), of the condition."""
        image = self.image[None].astype(np.float32) / 127.5 - 1
        return {"reference": image, "reference_weights": np.asarray([self.weights], np.float32)}


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierGuidance(Guide):
    """Follow the gradient of a classifier, or of an image-text model (CLIP guidance), of noised images (Dhariwal &
    Nichol 2021; Nichol et al. 2022).

    An image-text model guides to captions, and with a `reference` to an image and its layout too, with weights that are
    traced (Liu et al. 2023, Semantic Diffusion Guidance)."""

    classifier: Artifact
    """the model, with its weights on the pipeline's mesh; those elsewhere are copied in every call"""
    scale: float | None = None
    """factor of the gradient; None: `classifier_scale` of the options"""
    name: str = ""
    """for errors and metadata, by default that of its type"""
    reference: Reference | None = None
    """an image that samples are to be like"""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        scale: float | None = None,
        *,
        mesh: Mesh | None = None,
        reference: Reference | None = None,
    ) -> ClassifierGuidance:
        """Guidance by the classifier in a run folder; mesh: that of the pipeline. Errors: as of `load_artifact`."""
        return cls(load_artifact(folder, mesh=mesh), scale, str(folder), reference)

    @property
    def about(self) -> dict[str, str]:
        about, given = {"classifier": self.name or type(self.classifier.config).__name__}, self.reference
        if given is None:
            return about
        weights = ", ".join(f"{w:g}" for w in given.weights)
        return about | {"reference": f"{digest(given.image)}, weights {weights}"}

    @property
    def text(self) -> Tokenizer | None:
        """The tokenizer of an image-text model."""
        return self.classifier.text

    @property
    def weights(self) -> dict[str, object]:
        given = self.reference
        return {"classifier": self.classifier.model} | ({} if given is None else given.arrays)

    def check(self, family: Family) -> None:
        """Errors: `ConfigError` unless the classifier was trained on such images with the same noise at the same times,
        reads the family's kind of prompt, unless that has no weight, and a reference, if there is one of the family's
        size."""
        name, guided = self.about["classifier"], classifier_guided(family)
        with refused(name):
            classifier = as_classifier(self.classifier.config)
            classifier = compares_with_reference(classifier) if self.reference else classifier
        if not guided.process.same_noise(classifier.process):
            raise ConfigError(
                f"{name}: it learned the noise of {classifier.process}, and this model draws by that of "
                f"{guided.process}"
            )
        reads, given = classifier.batch_spec(), guided.condition_spec()
        if "label" in reads and "label" not in given:
            raise ConfigError(f"{name}: it is conditioned on classes, and this model on captions")
        reads_prompts = self.reference is None or self.reference.text_weight != 0
        if "label" not in reads and "label" in given and reads_prompts:
            raise ConfigError(f"{name}: it is conditioned on captions, and this model on classes")
        channels, drawn = reads["image"].shape[-1], guided.sample_spec().shape[-1]
        if channels != drawn:
            raise ConfigError(f"{name}: it looks at {channels} channels, and this model draws {drawn}")
        if self.reference and self.reference.image.shape != (shape := guided.sample_spec().shape):
            raise ConfigError(f"the reference has the shape {self.reference.image.shape}; this model draws {shape}")

    def override(self, options: SamplingOptions) -> SamplingOptions:
        return options if self.scale is None else dataclasses.replace(options, classifier_scale=self.scale)

    def condition(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        if self.text is None:
            return {}
        ids, mask = self.text(list(prompts))
        return {"clip_text": ids, "clip_mask": mask}


@dataclasses.dataclass(frozen=True, eq=False)
class Autoguidance(Guide):
    """Guide away from the predictions of a worse model, in place of the unconditional branch (Karras et al. 2024).

    The worse model may be smaller, have another network, or be trained less.
    """

    model: Artifact
    """the worse model, with its weights on the pipeline's mesh; those elsewhere are copied in every call"""
    name: str = ""
    """for errors and metadata"""

    @classmethod
    def load(cls, folder: str | Path, *, mesh: Mesh | None = None) -> Autoguidance:
        """Guidance by the model in a folder; mesh: that of the pipeline. Errors: as of `load_artifact`."""
        return cls(load_artifact(folder, mesh=mesh), str(folder))

    @property
    def about(self) -> dict[str, str]:
        return {"guide model": self.name or "the worse model"}

    @property
    def weights(self) -> dict[str, object]:
        return {"guide_model": self.model.model}

    def check(self, family: Family) -> None:
        """Errors: `ConfigError` if noise, prediction, shape or condition differ from the family's."""
        name = self.about["guide model"]
        with refused(name):
            guide, guided = autoguided(self.model.config), autoguided(family)
        if not guided.process.same_noise(guide.process):
            raise ConfigError(
                f"{name}: process is {guide.process}, and {guided.process} that of the model which it is to guide"
            )
        theirs, ours = guidance_signature(guide), guidance_signature(guided)
        for what in ours:
            if theirs[what] != ours[what]:
                raise ConfigError(
                    f"{name}: {what} is {theirs[what]}, and {ours[what]} that of the model which it is to guide"
                )


def guidance_signature(family: GaussianFamily) -> dict[str, object]:
    """Properties that two Gaussian diffusions must share for one to guide the other."""
    return {
        "predicts": family.predicts,
        "shape": family.sample_spec().shape,
        "condition": dict(family.condition_spec()),
    }
