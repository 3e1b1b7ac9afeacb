"""CLIP as a text encoder: captions and images in one space (Radford et al. 2021).

`ClipText` computes features of every token, `ClipEmbedding` one vector per caption or image, `ClipCaption` both. They
read a run or a released model of `models.clip`; or what was published: a folder in the layout of Hugging Face or
open_clip, or a file with OpenAI's names. Such a file does not record its activation: quick_gelu in OpenAI's own, but
gelu in most that open_clip trained (LAION-2B, DataComp), which must be specified.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from t2i_jax.core.arrays import Float, typed
from t2i_jax.core.conditions import TextSpec, Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.fields import ENCODER, VOCABULARY, Checked
from t2i_jax.core.params import abstract, named
from t2i_jax.interop import clip as published
from t2i_jax.interop import huggingface
from t2i_jax.interop.names import Fields, Table, Tensors, to_ours
from t2i_jax.networks.clip import MEAN, STD, CLIPNetwork, CLIPTowers, ImageTower, TextTower
from t2i_jax.nn.layers import at_least_fp32, unit
from t2i_jax.nn.transformer import Activation, Transformer
from t2i_jax.storage.artifacts import Artifact, is_stored, load_artifact, open_artifact
from t2i_jax.text.bpe import BytePairs, read_pairs
from t2i_jax.text.cut import FolderEncoder, own_tokenizer, room_of, tokens_of

ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""`hidden_act` of a config.json, and our name."""


def of_huggingface(config: Fields) -> CLIPTowers:
    """Sizes from the fields of config.json; that of one tower alone leaves the other at its defaults, and of a text
    tower there may be no `dim`.

    Errors: ValueError naming the field.
    """
    if str(config.get("model_type", "")).startswith("clip_text_model"):
        projects = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        dim = config.get("projection_dim", 512) if projects else 0
        return of_huggingface({"text_config": config, "vision_config": {}, "projection_dim": dim})
    if config.get("model_type") == "clip_vision_model":
        dim = config.get("projection_dim", 512)
        return of_huggingface({"text_config": {}, "vision_config": config, "projection_dim": dim})
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), Mapping):
            raise ValueError(f"config.json has no {part}: it is not that of a CLIP with both towers")
    text, image = config["text_config"], config["vision_config"]
    end = text.get("eos_token_id", 49407)
    return CLIPTowers(
        _transformer(text, "text_config", 512, 8, 2048),
        _transformer(image, "vision_config", 768, 12, 3072),
        config.get("projection_dim", 512),
        text.get("vocab_size", 49408),
        text.get("max_position_embeddings", 77),
        None if end == 2 else end,  # 2 is found in folders from when the largest id marked the end
        size=image.get("image_size", 224),
        patch=image.get("patch_size", 32),
        channels=image.get("num_channels", 3),
    )


def of_openai(tensors: Tensors, head: int = 64, activation: str = "quick_gelu", text_head: int = 0) -> CLIPTowers:
    """Sizes from the tensor shapes of one of OpenAI's files.

    head: size of a head, 64 in all released files; text_head: that of the text tower, if it differs. activation: as
    in ACTIVATIONS; shapes do not determine it. Errors: ValueError for a file that is no CLIP, or has a ResNet image
    tower.
    """
    wanted = ("visual.conv1.weight", "visual.proj", "visual.positional_embedding", "token_embedding.weight")
    missing = [name for name in (*wanted, "positional_embedding", "text_projection") if name not in tensors]
    if missing:
        resnet = any(name.startswith("visual.attnpool") for name in tensors)
        kind = "the image tower is a ResNet; only ViT towers are read" if resnet else f"no {', '.join(missing)}"
        raise ValueError(f"not a file of OpenAI's CLIP with a ViT: {kind}")
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, channels, patch, _ = shape["visual.conv1.weight"]
    grid = math.isqrt(shape["visual.positional_embedding"][0] - 1)

    def tower(prefix: str, width: int, head: int) -> Transformer:
        blocks = {n.split("resblocks.")[1].split(".")[0] for n in shape if n.startswith(f"{prefix}resblocks.")}
        mlp = shape[f"{prefix}resblocks.0.mlp.c_fc.weight"][0]
        kind = activation_of(activation)
        return Transformer(width, len(blocks), width // head, mlp=mlp, norm="layer", activation=kind, bias=True)

    text = tower("transformer.", shape["positional_embedding"][1], text_head or head)
    image = tower("visual.transformer.", width, head)
    return CLIPTowers(
        text,
        image,
        dim=shape["visual.proj"][1],
        vocabulary=shape["token_embedding.weight"][0],
        length=shape["positional_embedding"][0],
        size=grid * patch,
        patch=patch,
        channels=channels,
    )


def _transformer(config: Fields, part: str, width: int, heads: int, mlp: int) -> Transformer:
    try:
        activation = activation_of(config.get("hidden_act", "quick_gelu"))
    except ValueError as error:
        raise ValueError(f"config.json: {part}.hidden_act: {error}") from error
    return Transformer(
        config.get("hidden_size", width),
        config.get("num_hidden_layers", 12),
        config.get("num_attention_heads", heads),
        mlp=config.get("intermediate_size", mlp),
        norm="layer",
        eps=config.get("layer_norm_eps", 1e-5),
        activation=activation,
        bias=True,
    )


# ----------------------------------------------------------------------------------------------------------- files


def read(path: str | Path, head: int = 64, activation: str = "") -> tuple[CLIPTowers, Tensors, Table]:
    """The sizes, the tensors and their table, of a folder (Hugging Face, open_clip) or a file with OpenAI's names.

    head, activation: size of a head, and `hidden_act`, which files do not record; defaults are OpenAI's, with
    quick_gelu. Errors: FileNotFoundError, ValueError for a file that is no CLIP, and for a folder with another
    activation.
    """
    path = Path(path)
    if path.is_dir() and not (path / published.OPEN_CLIP).is_file():
        config, table = of_huggingface(huggingface.config(path)), published.huggingface_table
        tensors = huggingface.Weights(path, *published.FOLDER_NEEDED)
    else:
        hints: Fields = {"head": head, "activation": activation or "quick_gelu"}
        try:
            tensors = published.openai_tensors(path)
            config = of_openai(tensors, **(published.open_clip(path) if path.is_dir() else hints))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        table = published.openai_table
    if activation and activation_of(activation) != config.text.activation:
        raise ValueError(f"{path} has the activation {config.text.activation}; it cannot be read with '{activation}'")
    return config, tensors, table(config.text.head_size, config.image.head_size)


def activation_of(name: str) -> Activation:
    """Our name of a published `hidden_act`. Errors: ValueError listing the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation '{name}' is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@functools.lru_cache(8)
def sizes(path: str, activation: str = "") -> CLIPTowers:
    """The sizes of the CLIP at `path`. Errors: as of `load`."""
    if is_stored(path):
        return _network(open_artifact(path).artifact, path).config
    whole = Path(path).is_dir() and not (Path(path) / published.OPEN_CLIP).is_file() and not activation
    return of_huggingface(huggingface.config(path)) if whole else read(path, activation=activation)[0]


def load(path: str | Path, head: int = 64, activation: str = "") -> tuple[CLIPTowers, CLIPNetwork]:
    """Both towers with their weights in fp32, on the host; arguments as for `read`.

    path: also a run or a released model of this library. Errors: FileNotFoundError; ValueError that lists every
    missing, unused or wrongly shaped tensor; `ConfigError` for a run of another model.
    """
    if is_stored(path):
        model = _network(load_artifact(path, host=True), path)
        return model.config, model
    config, tensors, table = read(path, head, activation)
    return config, to_ours(abstract(config), tensors, table, published.IGNORED, str(path))


def load_text(path: str | Path, activation: str = "") -> TextTower:
    """The text tower alone, in fp32, on the host; of a folder or a file that may have no other."""
    if is_stored(path):
        return load(path)[1].text
    config, tensors, table = read(path, activation=activation)
    tower = abstract(config).text
    if "embeddings.token_embedding.weight" in tensors:  # newer folders of a text tower alone
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    lines = {name: table[f"text.{name}"] for name in named(tower)}
    return to_ours(tower, tensors, lines, ignore=".", file=str(path))


def load_image(path: str | Path, activation: str = "") -> ImageTower:
    """The image tower alone, in fp32, on the host; of a folder or a file that may have no other."""
    if is_stored(path):
        return load(path)[1].image
    config, tensors, table = read(path, activation=activation)
    tower = abstract(config).image
    lines = {name: table[f"image.{name}"] for name in named(tower)}
    return to_ours(tower, tensors, lines, ignore=".", file=str(path))


def _network(artifact: Artifact, path: str | Path) -> CLIPNetwork:
    """Errors: `ConfigError` where a folder holds another model, or a CLIP of noised images."""
    if not isinstance(artifact.model, CLIPNetwork) or not artifact.config.capabilities.image_text:
        what = "CLIP of noised images" if isinstance(artifact.model, CLIPNetwork) else type(artifact.config).__name__
        raise ConfigError(f"{path} holds a {what}; a CLIP of clean images is wanted")
    return artifact.model


# --------------------------------------------------------------------------------------------------------- captions


@dataclasses.dataclass(frozen=True)
class _Captions(FolderEncoder):
    """A text side that uses byte pairs, and cuts before the end token; or the tokenizer of a run."""

    vocabulary: Annotated[str, VOCABULARY] = ""
    """list of merges; empty: the folder's merges.txt, or the one in the package open-clip-torch"""
    activation: str = ""
    """activation of a file, which does not record it: quick_gelu (the default) or gelu"""

    @functools.cached_property
    def own(self) -> Tokenizer | None:
        """The tokenizer with which a run or a released model was trained; None for a published CLIP.

        Errors: `ConfigError` where there is none, or none that gives ids, or with fields of a published CLIP.
        """
        if not is_stored(self.folder):
            return None
        if self.vocabulary or self.activation:
            raise ConfigError(f"{self.folder}: vocabulary and activation are those of its config")
        return own_tokenizer(open_artifact(self.folder).artifact.text, self.folder)

    @property
    def towers(self) -> CLIPTowers:
        """Its sizes. Errors: those of `load`."""
        return sizes(self.folder, self.activation)

    @property
    def room(self) -> int:
        return self.towers.length - 2 if self.own is None else room_of(self.own)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return [self.pairs(caption) for caption in captions] if self.own is None else tokens_of(self.own, captions)

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return ids[:, -1] != ids[:, -2]  # padding is not masked

    @property
    def pairs(self) -> BytePairs:
        merges = Path(self.folder) / "merges.txt"
        return read_pairs(self.vocabulary or (str(merges) if merges.is_file() else ""))

    def encoded(self, captions: Sequence[str], pad: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (n, s), the mask (n, s) of tokens that are no padding, and which captions (n,) are not empty.

        Errors: ImportError if the vocabulary is missing; ValueError where it is that of another CLIP.
        """
        if self.own is not None:
            ids, mask = self.own(captions)
            return ids, mask, mask.any(1) & np.array([bool(x) for x in self.tokens(captions)], bool)
        pairs, config = self.pairs, self.towers
        ids = pairs.encode(captions, config.length, pad)
        if ids.size and ids.max() >= config.vocabulary:
            said = f"the vocabulary gives id {ids.max()}, the model has {config.vocabulary}"
            raise ValueError(f"{self.folder}: {said}")
        mask = np.arange(ids.shape[1]) <= np.argmax(ids == pairs.last, 1)[:, None]
        return ids, mask, ids[:, 1] != pairs.last


@dataclasses.dataclass(frozen=True)
class ClipText(_Captions):
    """Captions as features of every token, after the last norm: the context of VQ-Diffusion and similar models."""

    normalise: bool = False
    """scale every token's vector to length 1, as VQ-Diffusion does"""
    pad: int = 0
    """id after the end; released programs use 0 or the end token, 49407"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and a mask bool (n, s), all False for an empty caption.

        For a published CLIP it is else all True, as published networks attend to padding too; for a run it is True for
        its tokens. Errors: ImportError if the vocabulary is missing.
        """
        ids, mask, filled = self.encoded(captions, self.pad)
        return ids, filled[:, None] & (mask | (self.own is None))

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return super().full(ids, mask) if self.own is None else np.all(mask, axis=-1)

    @property
    def feature_shape(self) -> tuple[int, int]:
        return self.length, self.towers.text.width

    @property
    def length(self) -> int:
        """Ids of a caption, start and end included."""
        return self.towers.length

    def load(self) -> TextTower:
        """The text tower in fp32, on the host. Errors: those of `read`, and ValueError for wrong tensors."""
        return load_text(self.folder, self.activation)

    def features(self, model: TextTower, ids: Array, mask: Array) -> Array:
        """One vector per token: (b, s) ids and mask -> (b, s, k) fp32."""
        x = at_least_fp32(model(ids))
        return unit(x) if self.normalise else x


@dataclasses.dataclass(frozen=True)
class ClipEmbedding(_Captions):
    """One vector of length 1: of the image in training, of the caption in sampling (Wang et al. 2022, CLIP-GEN)."""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and the mask bool (n, 1) of non-empty captions.

        Where the output of a caption is that of its last token, ids are one more, and 0 is padding, which that mask
        does not tell. Errors: ImportError if the vocabulary is missing.
        """
        ids, mask, filled = self.encoded(captions)
        return np.where(mask, ids + 1, 0) if self.towers.last else ids, filled[:, None]

    @property
    def spec(self) -> TextSpec:
        return TextSpec(features=True, image_features=True, limited=True)

    @property
    def feature_shape(self) -> tuple[int, int]:
        return 1, self.towers.dim

    def load(self) -> CLIPNetwork:
        """Both towers in fp32, on the host. Errors: those of `load`."""
        return load(self.folder, activation=self.activation)[1]

    def features(self, model: CLIPNetwork, ids: Array, mask: Array) -> Array:
        """The embedding of each caption: (b, s) ids -> (b, 1, k) fp32."""
        return unit(self.embed_captions(model, ids))[:, None]

    def embed_captions(self, model: CLIPNetwork, ids: Array) -> Array:
        """The same as (b, k), not normalised."""
        return model.text.embed(jnp.maximum(ids - 1, 0), ids > 0) if model.text.last else model.text.embed(ids)

    def image_features(self, model: CLIPNetwork, images: Array) -> Array:
        """The embedding of each image: (b, i, j, c) in [-1, 1] -> (b, 1, k) fp32."""
        return unit(self.embed_images(model, images))[:, None]

    def embed_images(self, model: CLIPNetwork, images: Array) -> Array:
        """The same as (b, k), not normalised."""
        return _embedded(self, model.image, images)


@dataclasses.dataclass(frozen=True)
class ClipCaption(_Captions):
    """The embedding of a caption, then its tokens, padding masked; of an image its embedding: what unCLIP reads (Ramesh
    et al. 2022)."""

    images: bool = True
    """whether there is a tower of images, which training needs; False: the text tower alone, for sampling"""

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n, s) and a mask bool (n, s), True from start to end: two tokens of an empty caption.

        Errors: ImportError if the vocabulary is missing.
        """
        return self.encoded(captions)[:2]

    def full(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.all(mask, axis=-1)

    @property
    def spec(self) -> TextSpec:
        return TextSpec(features=True, image_embedding=self.images, limited=True)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Errors: ValueError for a CLIP whose tokens are not as wide as its embeddings."""
        found = self.towers
        if found.dim != found.text.width:
            raise ValueError(
                f"{self.folder}: its tokens have {found.text.width} numbers, its embeddings {found.dim}: one size is "
                "needed"
            )
        return 1 + found.length, found.dim

    def load(self) -> CLIPNetwork | TextTower:
        """Both towers, or that of text, in fp32, on the host. Errors: those of `load`."""
        if not self.images:
            return load_text(self.folder, self.activation)
        return load(self.folder, activation=self.activation)[1]

    def features(self, model: CLIPNetwork | TextTower, ids: Array, mask: Array) -> Array:
        """Embedding, not normalised, and tokens after the last norm: (b, s) ids -> (b, 1 + s, k) fp32."""
        tower = model.text if isinstance(model, CLIPNetwork) else model
        x = tower(ids)
        return jnp.concatenate([tower.summarise(x, ids, mask)[:, None], x], 1)

    def image_features(self, model: CLIPNetwork, images: Array) -> Array:
        """The embedding of each image, not normalised: (b, i, j, c) in [-1, 1] -> (b, k) fp32."""
        return _embedded(self, model.image, images)


@dataclasses.dataclass(frozen=True)
class ClipImages(Checked):
    """The image tower of a CLIP, for text sides whose encoders of captions have none."""

    folder: Annotated[str, ENCODER]
    """in the layout of Hugging Face, maybe of that tower alone; or as `FolderEncoder.folder`"""
    activation: str = ""
    """activation of a file, which does not record it: quick_gelu (the default) or gelu"""

    def load(self) -> ImageTower:
        """The tower in fp32, on the host. Errors: those of `load_image`."""
        return load_image(self.folder, self.activation)

    def embed(self, model: ImageTower, images: Array) -> Array:
        """The embedding of each image, not normalised: (b, i, j, c) in [-1, 1] -> (b, k) fp32."""
        return _embedded(self, model, images)


def _embedded(text: _Captions | ClipImages, tower: ImageTower, images: Array) -> Array:
    """Embeddings (b, k), not normalised, of images (b, i, j, c) in [-1, 1], as CLIP sees them."""
    return tower.embed(as_seen(images, sizes(text.folder, text.activation).size))


# --------------------------------------------------------------------------------------------------------- images


@typed
def preprocess(images: Sequence[Image.Image | np.ndarray], size: int = 224) -> Float[np.ndarray, "n {size} {size} 3"]:
    """Images, or uint8 (i, j, 3), preprocessed as in OpenAI's program: float32 (n, size, size, 3).

    The short side is resized to `size` with pillow's bicubic filter, the centre is cropped, colours are standardised.
    """
    rows = []
    for image in images:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        w, h = image.size
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        image = image if image.size == (w, h) else image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - size) / 2), round((h - size) / 2)
        rows.append(np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB")))
    return (np.stack(rows).astype(np.float32) / 255 - MEAN) / STD


@typed
def as_seen(images: Float[Array, "b i j 3"], size: int = 224) -> Float[Array, "b {size} {size} 3"]:
    """The same for images (b, i, j, 3) in [-1, 1] on the device, which are cropped first.

    Like pillow it resizes columns, then rows, and rounds to bytes after each; no gradient passes.
    """
    i, j = images.shape[1:3]
    side = min(i, j)
    top, left = (i - side) // 2, (j - side) // 2
    x = images[:, top : top + side, left : left + side].astype(jnp.float32) / 2 + 0.5
    if side != size:
        b, _, _, c = x.shape
        for shape in ((b, side, size, c), (b, size, size, c)):
            x = jnp.clip(jnp.round(jax.image.resize(x, shape, "cubic", antialias=True) * 255) / 255, 0, 1)
    return (x - MEAN) / STD
