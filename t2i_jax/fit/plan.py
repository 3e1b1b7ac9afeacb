"""What `t2i fit` makes of a data set: the condition, the codec, the text encoder and the family, chosen from a look."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Literal

from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.config import ConfigError
from t2i_jax.core.narrow import as_codec, as_family
from t2i_jax.core.specs import CodecSpec
from t2i_jax.core.types import Family
from t2i_jax.data.look import Look
from t2i_jax.data.pipeline import Data
from t2i_jax.interop import minilm
from t2i_jax.storage.artifacts import OpenArtifact, open_artifact
from t2i_jax.text.minilm import MiniLM
from t2i_jax.text.sentencepiece import SentencePiece

Kind = Literal["ar", "masked", "diffusion", "gan"]
Condition = Literal["captions", "classes", "none"]
FEW = 100
"""Pictures below which a model mostly learns them by heart."""
PIXELS = 64
"""Side up to which a diffusion draws pixels; larger images are drawn by their latents."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user has said; None where it is to be chosen."""

    size: int | None = None
    family: Kind | None = None
    condition: Condition | None = None
    codec: str = ""
    """run or released codec"""
    start: str = ""
    """run or released model to begin with"""


@dataclasses.dataclass(frozen=True)
class FitPlan:
    """What is to be trained."""

    look: Look
    size: int
    family: Kind
    condition: Condition
    classes: int
    """number of classes; 0 without"""
    text: Literal["minilm", "learned", "start", ""]
    """where text is read by: a frozen encoder, one that is trained with the model, that of `start`; or not at all"""
    length: int
    """tokens of a caption"""
    codec: str
    """run or released codec that is taken; empty where one is trained, and for models of pixels"""
    trains: Literal["vq", "kl", ""]
    """the codec that is trained"""
    start: str
    base: OpenArtifact | None
    """the model in `start`"""
    given: CodecSpec | None
    """of the codec that is taken"""
    why: tuple[str, ...]
    """sentences on what was chosen, and why"""

    @property
    def factor(self) -> int:
        """Pixels per code along a side."""
        if self.given is not None:
            return self.given.factor
        return factor_of(self.size) if self.trains else 1

    @property
    def grid(self) -> tuple[int, int]:
        return self.size // self.factor, self.size // self.factor

    @property
    def is_discrete(self) -> bool:
        """Whether the codes of the codec are whole numbers."""
        return self.given.code.is_discrete if self.given is not None else self.trains == "vq"

    @property
    def pictures(self) -> Data:
        """The data set as it is."""
        broken = len(self.look.broken) / max(len(self.look.seen), 1)
        bare = len(self.look.uncaptioned) > 0 and self.condition == "captions"
        share = max(0.01, min(1.0, 2 * broken)) if broken else 0.01
        fields = {"broken_share": round(share, 4), "empty_captions": bare}
        return Data(self.look.source, self.look.source, image_size=self.size, batch_size=32, **fields)

    def tokenizer(self, vocabulary: str) -> Tokenizer | None:
        """What reads captions; vocabulary: the file of a learned one."""
        if self.text == "start" and self.base is not None:
            return self.base.artifact.text
        if self.text == "minilm":
            return MiniLM(self.length, pooled=True)
        return SentencePiece(vocabulary, self.length) if self.text == "learned" else None

    def family_of_start(self) -> Family:
        assert self.base is not None
        return as_family(self.base.artifact.config)


def factor_of(size: int) -> int:
    """Pixels per code along a side, of a codec that is trained here: 8x8 codes up to 64 pixels, about 16x16 above."""
    wanted = size // (8 if size <= 64 else 16)
    return next(f for f in (16, 8, 4, 2) if f <= max(wanted, 2) and size % f == 0)


def has_minilm() -> bool:
    """Whether the package with MiniLM's weights is installed."""
    return importlib.util.find_spec(minilm.PACKAGE) is not None


def make_plan(look: Look, wishes: Wishes) -> FitPlan:
    """Choose what is to be trained on a data set.

    Errors: `ConfigError` for wishes that do not go together, or not with the data: captions where there are none, a
    codec whose codes the family does not draw.
    """
    base = open_artifact(wishes.start) if wishes.start else None
    if base is not None and not base.artifact.config.capabilities.family:
        raise ConfigError(f"--from {wishes.start}: a {type(base.artifact.config).__name__} draws no images")
    if base is not None and (wishes.codec or wishes.family):
        what = "--codec" if wishes.codec else "--family"
        raise ConfigError(f"{what} with --from: codec and family are those of the model to begin with")
    codec = wishes.codec or (base.artifact.codec if base is not None else "")
    given = _spec(codec) if codec else None
    size = _size(wishes, base, given)
    condition, why = _condition(look, wishes.condition)
    family, trains, said = _family(wishes.family, base, size, given, codec)
    why += said
    text, length = "", 0
    if base is not None:
        condition, text, said = _condition_of_start(look, wishes, base, condition)
        why += said
    elif condition == "captions":
        length = _length(look)
        text = "minilm" if has_minilm() else "learned"
        why.append(
            f"captions are read by MiniLM, frozen, as one vector of at most {length} tokens"
            if text == "minilm"
            else f"captions are read by an encoder that is trained here, {length} tokens each; MiniLM is not installed"
        )
    why += _warnings(look, size, condition)
    classes = len(look.classes) if condition == "classes" else 0
    return FitPlan(
        look, size, family, condition, classes, text, length, codec, trains, wishes.start, base, given, tuple(why)
    )  # fmt: skip


def _spec(codec: str) -> CodecSpec:
    config = open_artifact(codec).artifact.config
    if not config.capabilities.codec:
        raise ConfigError(f"--codec {codec}: a {type(config).__name__} is no codec")
    spec = as_codec(config).spec
    if not (spec.encodes and spec.decodes) or spec.scales:
        raise ConfigError(f"--codec {codec}: one that encodes and decodes a single map of codes is needed")
    if spec.code.is_discrete and spec.code.shape:
        raise ConfigError(f"--codec {codec}: has several numbers at each position; one, or a vector, is needed")
    return spec


def _size(wishes: Wishes, base: OpenArtifact | None, given: CodecSpec | None) -> int:
    known = 0
    if base is not None:
        known = as_family(base.artifact.config).sample_spec().grid[0] * (given.factor if given is not None else 1)
    if known and wishes.size not in (None, known):
        raise ConfigError(f"--size {wishes.size}: {wishes.start} draws {known}; another size is a config's train.start")
    size = wishes.size or known or 64
    factor = given.factor if given is not None else 8 if size > 64 else 4 if size > 16 else 2
    if size % factor or size < 8:
        raise ConfigError(f"--size {size}: a multiple of {factor}, from 8 on")
    return size


def _condition(look: Look, wanted: Condition | None) -> tuple[Condition, list[str]]:
    """What images are drawn of."""
    usable, bare = len(look.usable), len(look.uncaptioned)
    captioned = usable - bare
    if wanted == "captions" and not captioned:
        raise ConfigError(f"--condition captions: {look.data} has none; the first: {look.uncaptioned[0].uncaptioned}")
    if wanted == "classes" and len(look.classes) < 2:
        raise ConfigError(f"--condition classes: {look.data} has no classes: folders right below it, or labels")
    if wanted is not None:
        return wanted, [f"the model draws by {wanted}, as asked" if wanted != "none" else "the model draws by nothing"]
    if captioned and 2 * captioned >= usable:
        less = f"; {bare} without one teach what is drawn without a prompt" if bare else ""
        return "captions", [f"the model draws by captions, which {captioned} of {usable} pictures have{less}"]
    few = f"only {captioned} of {usable} pictures have captions" if captioned else "there are no captions"
    if len(look.classes) > 1:
        return "classes", [f"{few}: the model draws by class, of {len(look.classes)}, by the number of the class"]
    return "none", [f"{few}, and no classes: the model draws without a prompt, pictures like all of these"]


def _family(
    wanted: Kind | None, base: OpenArtifact | None, size: int, given: CodecSpec | None, codec: str
) -> tuple[Kind, Literal["vq", "kl", ""], list[str]]:
    """The family, the codec that is trained for it, and why."""
    if base is not None:
        kind = type(base.artifact.config).__name__
        return "ar", "", [f"the model is a {kind}, and begins with the weights of {base.source}"]
    if given is not None:
        vectors = not given.code.is_discrete
        family: Kind = wanted or ("diffusion" if vectors else "ar")
        if family == "gan":
            raise ConfigError("--codec with --family gan: it draws pixels")
        if family == "ar" and vectors:
            raise ConfigError(
                f"--family ar with --codec {codec}: its codes are vectors; diffusion and masked draw them"
            )
        if family == "diffusion" and not vectors:
            raise ConfigError(
                f"--family diffusion with --codec {codec}: its codes are numbers; ar and masked draw them"
            )
        what = f"vectors of {given.code.shape[0]}" if vectors else f"one of {given.code.values}"
        return family, "", [f"the codec is {codec}: {size // given.factor}x{size // given.factor} codes, {what}"]
    family = wanted or "ar"
    if family == "gan" or (family == "diffusion" and size <= PIXELS):
        return family, "", ["the model draws pixels and needs no codec"]
    kind, name = ("kl", "KL autoencoder") if family == "diffusion" else ("vq", "VQGAN")
    n = size // factor_of(size)
    return family, kind, [f"a codec is trained first, a {name} of {n}x{n} codes; --codec takes one that is there"]


def _condition_of_start(
    look: Look, wishes: Wishes, base: OpenArtifact, condition: Condition
) -> tuple[Condition, Literal["start", ""], list[str]]:
    """What the model to begin with reads."""
    reads = as_family(base.artifact.config).condition_spec()
    if base.artifact.text is not None:
        if condition != "captions":
            raise ConfigError(f"--from {wishes.start}: it reads captions, and {look.data} has none for most pictures")
        return "captions", "start", [f"captions are read by the text encoder of {wishes.start}"]
    if "label" in reads:
        if len(look.classes) < 2:
            raise ConfigError(f"--from {wishes.start}: it draws by class, and {look.data} has no classes")
        return "classes", "", []
    if reads.keys() - {"text_mask"}:
        wanted = ", ".join(sorted(reads))
        raise ConfigError(f"--from {wishes.start}: it reads {wanted}, and has no text encoder that gives it")
    return "none", "", [] if condition == "none" else [f"{wishes.start} draws without a prompt, and so does this model"]


def _length(look: Look) -> int:
    """Tokens of a caption: about those of nine of ten."""
    longest = int(1.5 * look.words().get("nine of ten below", 8)) + 2
    return next((n for n in (16, 32, 64) if longest <= n), 128)


def _warnings(look: Look, size: int, condition: Condition) -> list[str]:
    """What will not be as good as it could be."""
    found, usable = [], look.usable
    if len(usable) < FEW:
        found.append(f"{len(usable)} pictures are few: the model will learn them by heart, and draw little else")
    small = sum(min(one.size) < size for one in usable)
    if small:
        found.append(f"{small} of {len(usable)} pictures have a side under {size} and are enlarged")
    if look.broken:
        found.append(f"{len(look.broken)} of {len(look.seen)} cannot be read and are left out")
    repeated = sum(len(group) - 1 for group in look.duplicates())
    if repeated:
        found.append(f"{repeated} pictures are there twice or more often, and count as often")
    if condition == "captions" and len(set(look.captions)) < len(usable) / 4:
        found.append(f"only {len(set(look.captions))} captions are different: images of one prompt will vary")
    return found
