"""InceptionV3 under torchvision's names: that of the FID, which pytorch-fid publishes as
`pt_inception-2015-12-05-6726825d.pth`, and torchvision's own, which DAMSM reads."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from t2i_jax.core.params import assemble, named
from t2i_jax.features.classifiers import Inception, InceptionV3
from t2i_jax.interop.folding import folded
from t2i_jax.interop.huggingface import Weights
from t2i_jax.interop.names import require, warn_not_finite

EPS = 1e-3
NEEDED = ("Conv2d_1a_3x3.conv.weight", "fc.weight")
"""Names that every such file has."""


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a pytorch-fid file."""
    return inception_from(Weights(path, NEEDED), str(path))


def inception_from(weights: Mapping[str, np.ndarray], source: str = "the state dict") -> InceptionV3:
    """The network from a state dict under torchvision's names: `Mixed_5b.branch1x1.conv.weight`, `.bn.weight`, ..."""
    require(weights, NEEDED, "not the Inception network of pytorch-fid", source)
    try:
        arrays = _convolutions(weights) | {"fc.w": weights["fc.weight"].T, "fc.b": weights["fc.bias"]}
    except KeyError as missing:
        raise ValueError(f"{source} is not the Inception network of pytorch-fid: it has no {missing}") from None
    warn_not_finite(arrays.items(), source)
    return assemble(InceptionV3, arrays, source)


def load_trunk(path: str | Path) -> Inception:
    """The convolutions with the weights of a file under torchvision's names."""
    return trunk_from(Weights(path, NEEDED[:1]), str(path))


def trunk_from(weights: Mapping[str, np.ndarray], source: str = "the state dict") -> Inception:
    """The convolutions alone, with torchvision's poolings, from a state dict under torchvision's names."""
    require(weights, NEEDED[:1], "no Inception-v3 of torchvision", source)
    try:
        arrays = _convolutions(weights)
    except KeyError as missing:
        raise ValueError(f"{source} is no Inception-v3 of torchvision: it has no {missing}") from None
    warn_not_finite(arrays.items(), source)
    return assemble(partial(Inception, kind="torchvision"), arrays, source)


def _convolutions(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of `Inception` by name. Errors: KeyError for a missing tensor."""
    names = named(jax.eval_shape(partial(Inception, kind="torchvision"), jax.random.key(0)))
    arrays = {}
    for unit in sorted({name.rpartition(".")[0] for name in names}):
        arrays[f"{unit}.w"], arrays[f"{unit}.b"] = folded(weights, f"{unit}.conv", f"{unit}.bn", EPS)
    return arrays
