"""DAMSM: captions and images in one space, by words and regions (Xu et al. 2018, arXiv:1711.10485, section 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
from jax import Array

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import LARGEST, Checked, Count, Positive, Range, Rate, Size
from t2i_jax.core.specs import BatchSpec, FieldSpec
from t2i_jax.core.types import Capabilities, Compute, LossOutput, Objective
from t2i_jax.features.trunks import EfficientNetTrunk, InceptionTrunk, PixelTrunk
from t2i_jax.interop.efficientnet import load_efficientnet
from t2i_jax.interop.inception import load_trunk
from t2i_jax.networks.condition import text_spec
from t2i_jax.networks.damsm import DAMSMNetwork, ImageHeads, Trunk, WordEncoder
from t2i_jax.nn.matching import losses_of_scores, matching_accuracy, matching_scores
from t2i_jax.nn.recurrent import Cell


@dataclasses.dataclass(frozen=True)
class EfficientNet(Checked):
    """EfficientNet-Lite0 (ImageNet-1k), for images of any size."""

    size: Annotated[int, Range(16, LARGEST)] = 128
    """side that images are resized to; there are (size / 16)^2 regions"""
    weights: str = ""
    """weights file; empty: the installed package"""
    pixels: Count = 0
    """pixels along a side of the image, averaged down, that the heads read too: its features hardly know colours. A
    multiple of size / 16; 0: none"""

    has_weights = True

    def __post_init__(self):
        super().__post_init__()
        if self.pixels % (self.size // 16):
            raise ConfigError(
                f"EfficientNet.pixels {self.pixels}: a multiple of the {self.size // 16} regions of a side"
            )

    @property
    def widths(self) -> tuple[int, int]:
        return 112 + 3 * self._patch**2, 1280 + 3 * self.pixels**2

    @property
    def _patch(self) -> int:
        return self.pixels // (self.size // 16)

    def load(self) -> EfficientNetTrunk:
        """The network with its weights. Errors: `FileNotFoundError`, `ValueError` name what is missing."""
        pixels = PixelTrunk(self.pixels, self._patch) if self.pixels else None
        return EfficientNetTrunk(load_efficientnet(self.weights or None), self.size, pixels)


@dataclasses.dataclass(frozen=True)
class Inception(Checked):
    """Inception-v3, as published: 17 x 17 regions of Mixed_6e, and the pooled Mixed_7c."""

    weights: str = ""
    """a file with torchvision's names: its own, or `image_encoder*.pth` of a published DAMSM"""
    align_corners: bool = True
    """whether images are resized corner to corner, as in AttnGAN and DM-GAN, or edge to edge, as in SSA-GAN"""

    widths = (768, 2048)
    has_weights = True

    def load(self) -> InceptionTrunk:
        """The network with its weights. Errors: `FileNotFoundError`, `ValueError` name what is missing."""
        if not self.weights:
            raise ConfigError("trunk.weights: Inception needs a file with torchvision's names, as image_encoder200.pth")
        return InceptionTrunk(load_trunk(self.weights), self.align_corners)


@dataclasses.dataclass(frozen=True)
class Pixels(Checked):
    """No network, the image averaged down: what similarity of colours and places alone does."""

    side: Size = 16
    """pixels along a side"""
    patch: Size = 4
    """pixels of a region along a side"""

    has_weights = False

    def __post_init__(self):
        super().__post_init__()
        if self.side % self.patch:
            raise ConfigError(f"Pixels.side {self.side}: a multiple of patch {self.patch}")

    @property
    def widths(self) -> tuple[int, int]:
        return 3 * self.patch**2, 3 * self.side**2

    def load(self) -> PixelTrunk:
        """The averaging alone."""
        return PixelTrunk(self.side, self.patch)


class Encoded(NamedTuple):
    """Outputs of both encoders for a batch."""

    words: Array
    """(b, s, k)"""
    sentence: Array
    """(b, k)"""
    regions: Array
    """(b, r, k)"""
    code: Array
    """(b, k)"""


class EncoderBatch(TypedDict):
    """What `forward` reads of a batch."""

    image: Array
    """float (b, i, j, 3) in [-1, 1]"""
    text: Array
    """ids (b, s)"""
    text_mask: Array
    """bool (b, s), True for the first n words of each row"""
    frozen: NotRequired[Trunk]
    """of `frozen()`, if the trunk has weights"""


class MatchingBatch(EncoderBatch):
    """What the losses read of a batch."""

    label: NotRequired[Array]
    """class (b,)"""
    outputs: Encoded
    """of `forward`"""


@dataclasses.dataclass(frozen=True)
class DAMSM(Checked):
    """A recurrent encoder of captions, and heads on a frozen network of images, trained to match.

    The objectives `text` and `image` train the two parts by the same loss, the sum of the four of `nn.matching`, so
    that each may have an optimiser and a bound of its gradient of its own; the metrics are those of `text`. Losses and
    accuracies are of pairs among those of their batch, so batches of one size are compared.
    """

    vocabulary: Count = 2000
    """ids of words; 0: no text encoder, as in a published file of the other part"""
    length: Size = 32
    """words per caption, padding included"""
    embed: Size = 300
    """width of the embedding of a word"""
    dim: Size = 256
    """size k of the common space, half of it for each direction"""
    cell: Cell = "lstm"
    dropout: Rate = 0.5
    """dropout of embeddings in training"""
    trunk: EfficientNet | Inception | Pixels | None = EfficientNet()
    """the frozen network of images; None: no image encoder"""
    gamma1: Positive = 4.0
    """sharpness of the attention of words to regions"""
    gamma2: Positive = 5.0
    """sharpness of the mean over words"""
    gamma3: Positive = 10.0
    """sharpness of the choice among pairs of a batch"""
    mask_classes: bool = True
    """other pairs of the same `label`, where the data has labels, are no negatives"""

    def __post_init__(self):
        super().__post_init__()
        if self.dim % 2:
            raise ConfigError(f"DAMSM.dim {self.dim}: an even number, as each direction has half of it")

    @property
    def capabilities(self) -> Capabilities:
        """Supported features beyond training."""
        frozen = self.trunk is not None and self.trunk.has_weights
        return Capabilities(frozen_networks=frozen, shared_forward=True, image_text=True)

    @property
    def compute(self) -> Compute:
        """Settings of the computation."""
        return Compute()

    def with_compute(self, compute: Compute) -> DAMSM:
        """The same model with other settings of the computation."""
        compute.check(self.capabilities)
        return self

    def init(self, key: Array) -> DAMSMNetwork:
        keys = jax.random.split(key)
        text = WordEncoder(self.vocabulary, self.embed, self.dim, keys[0], self.cell) if self.vocabulary else None
        return DAMSMNetwork(text, ImageHeads(*self.trunk.widths, self.dim, keys[1]) if self.trunk else None)

    def frozen(self) -> Trunk:
        """The network of images with its weights; losses read it as `batch["frozen"]`."""
        if self.trunk is None:
            raise ConfigError("DAMSM.trunk None: a text encoder alone has no network of images")
        return self.trunk.load()

    def batch_spec(self) -> BatchSpec:
        """Fields of a training batch: images of any size, captions, and classes if there are any."""
        image, label = FieldSpec((None, None, 3), "float32"), FieldSpec((), "int32", 0, LARGEST, optional=True)
        spec = {"image": image, **text_spec(max(self.vocabulary, 1), self.length)}
        return spec | ({"label": label} if self.mask_classes else {})

    def objectives(self) -> dict[str, Objective[DAMSMNetwork, MatchingBatch]]:
        """The text encoder and the image heads."""
        if not self.vocabulary or self.trunk is None:
            part = "text" if self.trunk is None else "image"
            raise ConfigError(f"a DAMSM of its {part} encoder alone is not trained: both are needed")
        return {"text": Objective(self.text_loss, ("text",)), "image": Objective(self.image_loss, ("image",))}

    def forward(self, model: DAMSMNetwork, batch: EncoderBatch, key: Array, step: Array, train: bool = True) -> Encoded:
        """Both encoders; train: with dropout."""
        words, sentence = model.text(batch["text"], batch["text_mask"], self.dropout, key if train else None)
        trunk = batch.get("frozen")
        if trunk is None:
            if self.capabilities.frozen_networks:
                raise ValueError('a trunk with weights is batch["frozen"], which `DAMSM.frozen()` gives')
            trunk = self.frozen()
        features = jax.lax.stop_gradient(trunk(batch["image"].astype(jnp.float32)))
        return Encoded(words, sentence, *model.image(*features))

    def text_loss(
        self, model: DAMSMNetwork, batch: MatchingBatch, key: Array, step: Array, train: bool = True
    ) -> LossOutput:
        """The sum of the four losses, with each of them and the accuracies as metrics."""
        words, sentence, regions, code = batch["outputs"]
        classes = batch.get("label") if self.mask_classes else None
        gammas = self.gamma1, self.gamma2, self.gamma3
        scores = matching_scores(words, batch["text_mask"], sentence, regions, code, *gammas)
        losses = losses_of_scores(scores, classes)
        return LossOutput(sum(losses.values(), jnp.zeros(())), losses | matching_accuracy(scores, classes))

    def image_loss(
        self, model: DAMSMNetwork, batch: MatchingBatch, key: Array, step: Array, train: bool = True
    ) -> LossOutput:
        """The same sum."""
        return LossOutput(self.text_loss(model, batch, key, step, train).loss, {})
