"""Formats of single-stream models and of the discrete codecs that they read."""

from typing import Any

import jax

from t2i_jax.codecs.dvae import DVAE, Pooled
from t2i_jax.convert import Format
from t2i_jax.interop import mindalle, openai_dvae
from t2i_jax.interop.names import Table, Tensors
from t2i_jax.models.stream import Stream, Text
from t2i_jax.nn.draw import Sampling


def _abstract(config: Any) -> Any:
    return jax.eval_shape(config.init, jax.random.key(0))


def _openai_dvae(tensors: Tensors, **fields: Any) -> DVAE:
    found = openai_dvae.describe(tensors)
    network = {k: found[k] for k in ("channels", "groups", "blocks", "code") if k in found}
    return DVAE(**({"codes": found["codes"], "half": found["half"], "network": Pooled(**network)} | fields))


def _openai_dvae_table(config: DVAE) -> Table:
    return openai_dvae.table(_abstract(config))


def _mindalle(tensors: Tensors, *, heads: int = 0, **fields: Any) -> Stream:
    found = mindalle.describe(tensors, heads)
    text = Text(**found.pop("text"))
    sampling = Sampling(guidance=1.0, top_k=256)
    return Stream(**(found | {"condition": text, "condition_dropout": 0.0, "sampling": sampling} | fields))


FORMATS = {
    "openai_dvae": Format(_openai_dvae, _openai_dvae_table),
    "mindalle": Format(_mindalle, mindalle.table),
}
