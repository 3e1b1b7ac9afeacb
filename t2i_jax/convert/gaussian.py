"""Formats of Gaussian diffusion: DiT."""

from typing import Any

from t2i_jax.convert import Format
from t2i_jax.interop import dit
from t2i_jax.interop.names import Table, Tensors
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.nn.condition import Classes
from t2i_jax.nn.dit import DiT
from t2i_jax.noise.processes import Discrete


def _dit(tensors: Tensors, *, heads: int = 0, null: bool = True, **fields: Any) -> Diffusion:
    """null: the last row of the table of classes stands for none; models trained without dropping have no such row."""
    found = dit.describe(tensors, heads)
    network = DiT(condition=Classes(found.pop("classes") - null, null), **found)
    published = {"process": Discrete("linear"), "guided_channels": 3, "condition_dropout": 0.1 if null else 0.0}
    return Diffusion(network, **(published | fields))


def _dit_table(config: Diffusion) -> Table:
    return dit.table(config.network)


FORMATS = {"dit": Format(_dit, _dit_table, wrappers=("ema", "model", "state_dict"))}
