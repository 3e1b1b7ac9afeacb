"""DAMSM of AttnGAN, which DM-GAN, DF-GAN and SSA-GAN use: its two files and its dictionary.

`text_encoder*.pth` holds the embedding and the recurrent layer, `image_encoder*.pth` Inception-v3 under torchvision's
names and two heads. Files of that time have no `num_batches_tracked`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.interop.huggingface import Weights
from t2i_jax.interop.names import POINTWISE, Fields, Table, Tensors, require, source
from t2i_jax.interop.torchfile import read_pickle

TEXT_NEEDED = ("encoder.weight", "rnn.weight_hh_l0")
IMAGE_NEEDED = ("emb_features.weight", "emb_cnn_code.weight")
"""Names that every file of each kind has."""
TRUNK = r"^(Conv2d_|Mixed_|AuxLogits\.|fc\.)"
"""Names of Inception-v3 in a file of the image encoder."""
CELLS = {4: "lstm", 3: "gru"}
"""Cells by their number of gates."""


def describe(tensors: Tensors) -> Fields:
    """Fields of a `DAMSM` from shapes: `vocabulary` 0 without the text encoder, `widths` of the trunk without the image
    encoder None. Errors: ValueError for a file of neither, and for a cell of neither kind."""
    found: Fields = {"vocabulary": 0, "widths": None}
    if TEXT_NEEDED[0] in tensors:
        require(tensors, TEXT_NEEDED, "no text encoder of DAMSM")
        gates, hidden = tensors[TEXT_NEEDED[1]].shape
        cell = CELLS.get(gates // hidden)
        if cell is None or gates % hidden:
            raise ValueError(f"rnn.weight_hh_l0 {(gates, hidden)}: 4 gates of an LSTM or 3 of a GRU are wanted")
        vocabulary, embed = tensors[TEXT_NEEDED[0]].shape
        found |= {"vocabulary": vocabulary, "embed": embed, "dim": 2 * hidden, "cell": cell}
    else:
        require(tensors, IMAGE_NEEDED, "no encoder of DAMSM")
    if IMAGE_NEEDED[0] in tensors:
        require(tensors, IMAGE_NEEDED, "no image encoder of DAMSM")
        dim, regions = tensors[IMAGE_NEEDED[0]].shape[:2]
        found |= {"dim": dim, "widths": (regions, tensors[IMAGE_NEEDED[1]].shape[1])}
    return found


def text_table() -> Table:
    """Names and layouts of the text encoder, a `networks.damsm.WordEncoder`."""
    directions = lambda name: (f"rnn.{name}_l0", f"rnn.{name}_l0_reverse")
    table = {"table.w": source("encoder.weight")}
    for ours, theirs in (("inner", "ih"), ("again", "hh")):
        table[f"rnn.directions.{ours}.w"] = source(*directions(f"weight_{theirs}"), layout="n f d -> n d f")
        table[f"rnn.directions.{ours}.b"] = source(*directions(f"bias_{theirs}"), layout="n f -> n f")
    return table


def image_table() -> Table:
    """Names and layouts of the heads of the image encoder, a `networks.damsm.ImageHeads`."""
    return {
        "regions.w": source("emb_features.weight", layout=POINTWISE),
        "code.w": source("emb_cnn_code.weight", layout="f d -> d f"),
        "code.b": source("emb_cnn_code.bias"),
    }


def table(text: bool, image: bool) -> Table:
    """Names and layouts of a `networks.damsm.DAMSMNetwork` with these parts."""
    parts = {"text": text_table() if text else {}, "image": image_table() if image else {}}
    return {f"{part}.{name}": line for part, lines in parts.items() for name, line in lines.items()}


def read(path: str | Path) -> Tensors:
    """The tensors of a published file of either encoder. Errors: OSError, ValueError naming the file."""
    return Weights(path, TEXT_NEEDED, IMAGE_NEEDED)


def captions_ids(path: str | Path) -> Mapping[str, int]:
    """The id of each word of a published dictionary, `captions.pickle`: a list of training captions, test captions,
    words by id, ids by word; 0 is the end of a caption.

    Errors: OSError; ValueError naming the file where it is no such list.
    """
    path = Path(path)
    return _captions_ids(path, path.stat().st_mtime_ns)


@functools.lru_cache(8)
def _captions_ids(path: Path, changed: int) -> Mapping[str, int]:
    content: Any = read_pickle(path)
    what = "a list of training captions, test captions, words by id and ids by word"
    if not isinstance(content, list | tuple) or len(content) < 4:
        raise ValueError(f"{path}: holds no {what}, but a {type(content).__name__}")
    words, ids = content[2:4]
    if not isinstance(words, dict) or not isinstance(ids, dict):
        raise ValueError(f"{path}: is not {what}: it has {', '.join(type(x).__name__ for x in content)}")
    for word, n in ids.items():
        if not isinstance(word, str) or not isinstance(n, int | np.integer) or words.get(n) != word:
            raise ValueError(f"{path}: damaged: its two tables differ in the word {word!r}, id {n!r}")
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: damaged: its {len(ids)} ids are not 0 to {len(ids) - 1}")
    return {word: int(n) for word, n in ids.items()}
