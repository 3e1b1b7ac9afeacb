"""Formats of CogView2: its three Transformers, and the first one alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import numpy as np

from t2i_jax.convert import Format
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import values
from t2i_jax.interop import cogview2
from t2i_jax.interop.names import Fields, Table, Tensors, source
from t2i_jax.models.coarse_to_fine import CoarseToFine
from t2i_jax.models.stream import Stream, StreamText
from t2i_jax.networks.local import LocalTransformer
from t2i_jax.presets import OF_COARSE_TO_FINE, OF_STREAM


def _coglm(
    tensors: Tensors,
    *,
    heads: int = 0,
    grid: tuple[int, int] = (20, 20),
    codes: int = 20000,
    image_place: int = 513,
    start_of_image: int = 145653,
    text_length: int = 110,
    prefix: str = "",
    **fields: object,
) -> Stream:
    """codes: ids of images, the first ones, after which those of text count from 0. image_place: row of the first code
    in the table of positions. start_of_image: id, among all, of the token between text and image."""
    found = cogview2.describe(tensors, prefix, heads)
    text = StreamText(found["words"] - codes, text_length, bidirectional=True, end=start_of_image - codes)
    published = {
        "vocabulary": codes,
        "grid": grid,
        "condition": text,
        "places": (image_place, found["places"] - image_place),
        "clusters": _clusters(tensors),
        "understanding": None,
        **found["transformer"],
    }
    return _without_clusters(with_fields(OF_STREAM["coglm"], **(published | fields)))


def _cogview2(
    tensors: Tensors,
    *,
    heads: int = 0,
    coarse_grid: tuple[int, int] = (20, 20),
    codes: int = 20000,
    image_place: int = 513,
    start_of_image: int = 145653,
    text_length: int = 110,
    direct_text: int = 96,
    refiner_text: int = 16,
    window: int = 5,
    **fields: object,
) -> CoarseToFine:
    """text_length, direct_text, refiner_text: tokens of a caption that each of the networks reads at most; the others
    as of `coglm`, and window the columns of that of fine tokens."""
    coarse = _coglm(
        tensors,
        heads=heads,
        grid=coarse_grid,
        codes=codes,
        image_place=image_place,
        start_of_image=start_of_image,
        text_length=text_length,
        prefix=cogview2.PARTS["coarse"],
    )
    base = OF_COARSE_TO_FINE["cogview2"]
    direct, refiner = (cogview2.describe(tensors, cogview2.PARTS[name], heads) for name in ("direct", "refiner"))

    def local(part: LocalTransformer, found: Fields, **more: int) -> LocalTransformer:
        kept = {k: found[k] for k in ("places", "own_attention")}
        hidden = start_of_image - codes
        return with_fields(part, **found["transformer"], **kept, **more, hidden=hidden, window=window)

    published = {
        "coarse": coarse,
        "grid": direct["grid"],
        "direct": local(base.direct, direct, text=direct_text, coarse_place=image_place),
        "refiner": local(base.refiner, refiner, text=refiner_text),
        "clusters": coarse.clusters,
    }
    return _without_clusters(with_fields(base, **(published | fields)))


M = TypeVar("M", Stream, CoarseToFine)


def _without_clusters(config: M) -> M:
    """The model, whose default options ask for no clusters where it has none."""
    if config.clusters:
        return config
    known = {"top_clusters", "direct_top_clusters"} & values(config.sampling).keys()
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **dict.fromkeys(known, 0)))


def _clusters(tensors: Tensors) -> int:
    """Clusters of codes: the largest number and one, or none."""
    labels = tensors.get(cogview2.LABELS)
    return int(labels.max()) + 1 if isinstance(labels, np.ndarray) else 0


def _with_labels(tensors: Tensors, *, labels: str = "", **hints: object) -> tuple[Tensors, Fields]:
    """labels: the file cluster_label.npy of the published program, with the cluster of each code; without it codes are
    drawn at once."""
    if not labels:
        return tensors, hints
    try:
        found = np.load(Path(labels), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{labels}: the clusters of codes, an array in a file .npy, are wanted: {error}") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ConfigError(f"{labels}: {found.dtype} {found.shape} where the number of a cluster of each code is wanted")
    return {**tensors, cogview2.LABELS: found}, hints


def _coglm_table(config: Stream, prefix: str = "") -> Table:
    words = config.vocabulary + config.condition.vocabulary
    table = cogview2.coarse(config.transformer, words, config.vocabulary, config.places, prefix)
    return {**table, **({"clusters": source(cogview2.LABELS)} if config.clusters else {})}


def _cogview2_table(config: CoarseToFine) -> Table:
    coarse = config.coarse
    assert isinstance(coarse, Stream)
    words = coarse.vocabulary + coarse.condition.vocabulary
    tables = {"coarse": _coglm_table(coarse, cogview2.PARTS["coarse"])}
    for name, part in {"direct": config.direct, "refiner": config.refiner}.items():
        prefix = cogview2.PARTS[name]
        tables[name] = cogview2.fine(part.transformer, words, coarse.vocabulary, part.own_attention, prefix)
    lines = {f"{name}.{ours}": line for name, table in tables.items() for ours, line in table.items()}
    return {**lines, **({"clusters": source(cogview2.LABELS)} if config.clusters else {})}


WHOLE = tuple(prefix + name for prefix in cogview2.PARTS.values() for name in cogview2.NEEDED)

FORMATS = {
    "coglm": Format(
        _coglm,
        _coglm_table,
        needed=(cogview2.NEEDED,),
        adapt=_with_labels,
        title="CogLM, the first stage of CogView2: codes of 20 x 20 after text",
        example="mp_rank_00_model_states.pt --labels cluster_label.npy",
    ),
    "cogview2": Format(
        _cogview2,
        _cogview2_table,
        needed=(WHOLE, cogview2.NEEDED),
        adapt=_with_labels,
        title="CogView2: a folder with coglm.pt, cogview2-dsr.pt and cogview2-itersr.pt",
        example="FOLDER --labels cluster_label.npy",
        files={"coglm": "coglm.", "(cogview2-)?dsr": "dsr.", "(cogview2-)?itersr": "itersr."},
    ),
}
