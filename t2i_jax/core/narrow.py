"""Functions that narrow the type of a config by what it declares, one for each capability.

At run time objects are not inspected: a config declares what it can do (`Capabilities`, `TextSpec`), and each function
returns it as the Protocol that it then has, or raises `ConfigError` if the capability is not declared.
"""

from __future__ import annotations

import dataclasses
from typing import cast

from t2i_jax.core.conditions import ImageTextEncoder, NeighbourRetriever, TextEncoder, TextSpec, Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.types import (
    AnySize,
    Capabilities,
    Classifier,
    Codec,
    Family,
    Fitted,
    GaussianFamily,
    Interpolates,
    Likelihood,
    MeasuresScale,
    ReadsCodec,
    SharesForward,
    TokenByToken,
    Trainable,
    UsesFrozenNetworks,
)


def as_trainable(value: object) -> Trainable:
    """Narrow a value of a config file to `Trainable`. Errors: `ConfigError` if it declares no `Capabilities`."""
    # The only place that inspects a model of unknown type; afterwards the type is known.
    if not isinstance(getattr(value, "capabilities", None), Capabilities):
        raise ConfigError(f"{value!r}: a family or a codec")
    return cast(Trainable, value)


def _declares(config: Trainable, flag: str, what: str) -> Trainable:
    """The config. Errors: `ConfigError` "a Name `what`" if it does not declare the capability `flag`."""
    if not dataclasses.asdict(config.capabilities)[flag]:
        raise ConfigError(f"a {type(config).__name__} {what}")
    return config


def as_family(config: Trainable) -> Family:
    """Narrow to `Family`. Errors: `ConfigError` for a config that does not sample."""
    return cast(Family, _declares(config, "family", "does not sample images"))


def as_codec(config: Trainable) -> Codec:
    """Narrow to `Codec`. Errors: `ConfigError` for a config that is not a codec."""
    return cast(Codec, _declares(config, "codec", "is no codec"))


def check_codes(family: Family, codec: Codec, name: str, exact: bool = False) -> None:
    """Check that the codec `name` matches the codes that a family samples.

    A family may have more codes than its codec, such as a start token or a padded table, unless `exact`. Errors:
    `ConfigError` if they do not match.
    """
    if (mine := family.sample_spec().scales) != (its := codec.spec.scales):
        maps = lambda scales: f"maps of sides {', '.join(map(str, scales))}" if scales else "one map of codes"
        raise ConfigError(f"{name} has {maps(its)}, the model {maps(mine)}: this is not its codec")
    ours, theirs = family.sample_spec().code, codec.spec.code
    fits = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        a >= b for a, b in zip(ours.sizes, theirs.sizes, strict=True)
    )
    if ours != theirs if exact else not fits:
        raise ConfigError(f"{name} has {theirs}, the model {ours}: this is not its codec")


def uses_frozen_networks(config: Trainable) -> UsesFrozenNetworks:
    """Narrow to `UsesFrozenNetworks`. Errors: `ConfigError` for a config whose losses read no frozen networks."""
    return cast(UsesFrozenNetworks, _declares(config, "frozen_networks", "has no frozen networks"))


def shares_forward(config: Trainable) -> SharesForward:
    """Narrow to `SharesForward`. Errors: `ConfigError` for a config whose objectives share no forward pass."""
    return cast(SharesForward, _declares(config, "shared_forward", "has no forward pass that its objectives share"))


def fitted(config: Trainable) -> Fitted:
    """Narrow to `Fitted`. Errors: `ConfigError` for a config without state that is computed from examples."""
    return cast(Fitted, _declares(config, "fitted", "has nothing that is fitted to examples before training"))


def measures_scale(config: Trainable) -> MeasuresScale:
    """Narrow to `MeasuresScale`. Errors: `ConfigError` for a config whose codes have no scale."""
    return cast(MeasuresScale, _declares(config, "measures_scale", "has no scale of its codes"))


def as_classifier(config: Trainable) -> Classifier:
    """Narrow to `Classifier`. Errors: `ConfigError` for a config that is not a classifier of noised images."""
    return cast(Classifier, _declares(config, "classifier", "does not classify noised images"))


def compares_with_reference(config: Trainable) -> Classifier:
    """Narrow to a `Classifier` that reads a reference image. Errors: `ConfigError` for a config that does not."""
    what = "does not compare images with a reference; a CLIP of noised images does, by embeddings and by patches"
    return cast(Classifier, _declares(config, "reference", what))


def token_by_token(config: Trainable) -> TokenByToken:
    """Narrow to `TokenByToken`. Errors: `ConfigError` for a config that does not sample token by token."""
    return cast(TokenByToken, _declares(config, "token_by_token", "does not sample token by token"))


def likelihood(config: Trainable) -> Likelihood:
    """Narrow to `Likelihood`. Errors: `ConfigError` for a config that computes no probabilities."""
    return cast(Likelihood, _declares(config, "likelihood", "does not give the likelihood of an image"))


def inpainting(config: Trainable) -> Family:
    """Check for inpainting. Errors: `ConfigError` for a config that cannot keep a part of an image."""
    return cast(Family, _declares(config, "inpaint", "keeps no part of an image"))


def negative_prompts(config: Trainable) -> Family:
    """Check for negative prompts. Errors: `ConfigError` for a config that cannot be guided away from a prompt."""
    return cast(Family, _declares(config, "negative", "takes no negative prompt; a masked model does"))


def image_to_image(config: Trainable) -> Family:
    """Check for image-to-image sampling. Errors: `ConfigError` for a config that cannot start from an image."""
    what = "keeps nothing of an image without a mask; a Gaussian diffusion can"
    return cast(Family, _declares(config, "init_image", what))


def super_resolution(config: Trainable) -> Family:
    """Check for super-resolution. Errors: `ConfigError` for a config that does not upsample images."""
    what = "is no second stage of a cascade, which reads a small image, so it cannot make images larger"
    return cast(Family, _declares(config, "super_resolution", what))


def any_size(config: Trainable) -> AnySize:
    """Narrow to `AnySize`. Errors: `ConfigError` for a config whose parameters are of one grid."""
    what = "draws images of one size; a DiT or UNet, and Transformers with rotary positions, draw others"
    return cast(AnySize, _declares(config, "any_size", what))


def classifier_guided(config: Trainable) -> GaussianFamily:
    """Check for classifier guidance. Errors: `ConfigError` for a config that does not support it."""
    what = "is not guided by a classifier; a Gaussian diffusion is"
    return cast(GaussianFamily, _declares(config, "classifier_guidance", what))


def reads_codec(config: Trainable) -> ReadsCodec:
    """Narrow to `ReadsCodec`. Errors: `ConfigError` for a config whose network reads no vectors of its codec."""
    return cast(ReadsCodec, _declares(config, "reads_codec", "has no part of its codec in its network"))


def autoguided(config: Trainable) -> GaussianFamily:
    """Check for autoguidance. Errors: `ConfigError` for a config that can neither be guided by a weaker model nor be
    one."""
    what = "cannot guide, nor be guided by, a weaker model; a Gaussian diffusion can"
    return cast(GaussianFamily, _declares(config, "autoguidance", what))


def int8_sampling(config: Trainable) -> Family:
    """Check for int8 sampling. Errors: `ConfigError` for a config that does not sample with int8 weights."""
    return cast(
        Family, _declares(config, "int8", "has no int8 weights: they are for models that sample token by token")
    )


def interpolates(config: Trainable) -> Interpolates:
    """Narrow to `Interpolates`. Errors: `ConfigError` for a config that draws no images between prompts or seeds."""
    what = "draws no images between two prompts or seeds; a GAN does"
    return cast(Interpolates, _declares(config, "interpolation", what))


def as_tokenizer(value: object) -> Tokenizer:
    """Narrow a value of a config file to `Tokenizer`. Errors: `ConfigError` if it declares no `TextSpec`."""
    # The only place that inspects a text of unknown type; afterwards the type is known.
    if not isinstance(getattr(value, "spec", None), TextSpec):
        raise ConfigError(f"{value!r} is no tokenizer: its `spec` is no TextSpec")
    return cast(Tokenizer, value)


def gives_features(text: Tokenizer | None) -> bool:
    """Whether a text computes features, and not ids alone."""
    return text is not None and text.spec.features


def learns_from_images(text: Tokenizer | None) -> bool:
    """Whether training reads features of images, and captions are read only in sampling."""
    return text is not None and text.spec.image_features


def embeds_images(text: Tokenizer | None) -> bool:
    """Whether training reads embeddings of images besides captions."""
    return text is not None and text.spec.image_embedding


def text_encoder(text: Tokenizer | None) -> TextEncoder:
    """Narrow to `TextEncoder`. Errors: `ConfigError` for a tokenizer without features, and if there is no text."""
    if not gives_features(text):
        raise ConfigError(f"{_named(text)} gives no features: a frozen text encoder is wanted")
    return cast(TextEncoder, text)


def image_text_encoder(text: Tokenizer | None) -> ImageTextEncoder:
    """Narrow to `ImageTextEncoder`. Errors: `ConfigError` for a text that does not read images."""
    if not learns_from_images(text) and not embeds_images(text):
        raise ConfigError(f"{_named(text)} gives no features of images: an encoder of both is wanted, as ClipEmbedding")
    return cast(ImageTextEncoder, text)


def retrieves_neighbours(text: Tokenizer | None) -> bool:
    """Whether a text also gives images with captions that are near to a caption."""
    return text is not None and text.spec.neighbours


def neighbour_retriever(text: Tokenizer | None) -> NeighbourRetriever:
    """Narrow to `NeighbourRetriever`. Errors: `ConfigError` for a text without a database of images and captions."""
    if not retrieves_neighbours(text):
        raise ConfigError(f"{_named(text)} gives no images with captions: NeighbourPairs does")
    return cast(NeighbourRetriever, text)


def _named(text: Tokenizer | None) -> str:
    return "no text" if text is None else f"text: a {type(text).__name__}"
