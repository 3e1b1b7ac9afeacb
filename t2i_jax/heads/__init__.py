"""Heads: the distribution p(x | z) of a token's code, given the network's output z at its position; see `TokenHead`."""

from t2i_jax.heads.diffusion import DiffusionHead
from t2i_jax.heads.draws import ImageKeys, PositionKeys
from t2i_jax.heads.family import HeadFamily
from t2i_jax.heads.flow import FlowHead
from t2i_jax.heads.head import TokenHead
from t2i_jax.heads.mixture import MixtureHead
from t2i_jax.heads.softmax import SoftmaxHead

__all__ = [
    "DiffusionHead",
    "FlowHead",
    "HeadFamily",
    "ImageKeys",
    "MixtureHead",
    "PositionKeys",
    "SoftmaxHead",
    "TokenHead",
]
