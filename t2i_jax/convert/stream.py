"""Formats of single-stream models and of the discrete codecs that they read."""

from typing import Any

import jax

from t2i_jax.codecs.dvae import DVAE, Pooled
from t2i_jax.convert import Format
from t2i_jax.interop import openai_dvae
from t2i_jax.interop.names import Table, Tensors


def _abstract(config: Any) -> Any:
    return jax.eval_shape(config.init, jax.random.key(0))


def _openai_dvae(tensors: Tensors, **fields: Any) -> DVAE:
    found = openai_dvae.describe(tensors)
    network = {k: found[k] for k in ("channels", "groups", "blocks", "code") if k in found}
    return DVAE(**({"codes": found["codes"], "half": found["half"], "network": Pooled(**network)} | fields))


def _openai_dvae_table(config: DVAE) -> Table:
    return openai_dvae.table(_abstract(config))


FORMATS = {"openai_dvae": Format(_openai_dvae, _openai_dvae_table)}
