"""The formats of CLIP: OpenAI's files, open_clip's files and folders, and folders of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from t2i_jax.convert import Format, ModelFolder
from t2i_jax.core.conditions import Tokenizer
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.interop import clip as published
from t2i_jax.interop import huggingface
from t2i_jax.interop.names import Table, Tensors
from t2i_jax.models.clip import CLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.text.bpe import ClipIds
from t2i_jax.text.clip import of_huggingface, of_openai


def _clip(
    tensors: Tensors, *, head_dim: int = 64, text_head_dim: int = 0, activation: str = "quick_gelu", **fields: object
) -> CLIP:
    """Values that do not follow from shapes: sizes of a head, of the text tower if it differs, and the activation, gelu
    in most files of open_clip."""
    return _with_loss(of_openai(tensors, head_dim, activation, text_head_dim), tensors, fields)


def _with_loss(towers: CLIPTowers, tensors: Tensors, fields: Mapping[str, object]) -> CLIP:
    """A CLIP with the loss of a file, which has the bias of a sigmoid or not, and with other fields."""
    sigmoid = "logit_bias" in tensors
    config = CLIP(towers, "sigmoid", scale=10.0) if sigmoid else CLIP(towers)
    return with_fields(config, **fields)


def _transformers(tensors: Tensors, *, towers: CLIPTowers | None = None, **fields: object) -> CLIP:
    """towers: sizes, from config.json. Errors: ValueError for a file without its folder."""
    if towers is None:
        raise ValueError("sizes of heads do not follow from a file alone; the folder with config.json is wanted")
    return _with_loss(towers, tensors, fields)


def _open_clip_folder(path: Path) -> ModelFolder:
    """A folder of open_clip, with what does not follow from shapes."""
    found = published.open_clip(path)
    hints = {"head_dim": found["head"], "text_head_dim": found["text_head"], "activation": found["activation"]}
    return ModelFolder(published.openai_tensors(path), hints)


def _transformers_folder(path: Path) -> ModelFolder:
    merges, towers = path / "merges.txt", of_huggingface(huggingface.config(path))
    text = ClipIds(str(merges) if merges.is_file() else "")
    return ModelFolder(dict(huggingface.Weights(path, *published.FOLDER_NEEDED)), {"towers": towers}, text=text)


def _bias(config: CLIP, table: Table) -> Table:
    """The table with the lines of the parameters of the loss that a CLIP has."""
    found = {**table, **published.bias(config.loss_type == "sigmoid")}
    if not config.learn_scale:
        raise ValueError("its scale is no parameter")
    if config.towers.times or config.towers.last:
        what = "images of several noise levels" if config.towers.times else "the last token as that of a caption"
        raise ConfigError(f"it has {what}, which published programs do not")
    return found


def _heads(config: CLIP) -> tuple[int, int]:
    return config.towers.text.head_size, config.towers.image.head_size


def _ids(config: CLIP, text: Tokenizer | None) -> Tokenizer:
    """CLIP's own tokenizer, of the length that the model reads."""
    ids = text if isinstance(text, ClipIds) else ClipIds()
    return dataclasses.replace(ids, length=config.towers.length)


FORMATS = {
    "clip": Format(
        _clip,
        lambda config: _bias(config, published.openai_table(*_heads(config))),
        unused=published.IGNORED,
        needed=(published.NEEDED,),
        title="CLIP with OpenAI's names: its own files, those of open_clip, and folders of open_clip",
        example="ViT-B-32.pt",
        folder=_open_clip_folder,
        fit_text=_ids,
    ),
    "clip_transformers": Format(
        _transformers,
        lambda config: _bias(config, published.huggingface_table(*_heads(config))),
        unused=published.IGNORED,
        needed=published.FOLDER_NEEDED,
        title="CLIP as Hugging Face lays it out",
        example="clip-vit-base-patch32",
        folder=_transformers_folder,
        fit_text=_ids,
    ),
}
