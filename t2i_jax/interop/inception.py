"""InceptionV3 of the FID from the file that pytorch-fid publishes, `pt_inception-2015-12-05-6726825d.pth`."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from t2i_jax.core.params import assemble, named
from t2i_jax.features.classifiers import InceptionV3
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
    names = named(jax.eval_shape(InceptionV3, jax.random.key(0)))
    units = sorted({name.rpartition(".")[0] for name in names} - {"fc"})
    try:
        arrays = {}
        for unit in units:
            arrays[f"{unit}.w"], arrays[f"{unit}.b"] = folded(weights, f"{unit}.conv", f"{unit}.bn", EPS)
        arrays |= {"fc.w": weights["fc.weight"].T, "fc.b": weights["fc.bias"]}
    except KeyError as missing:
        raise ValueError(f"{source} is not the Inception network of pytorch-fid: it has no {missing}") from None
    warn_not_finite(arrays.items(), source)
    return assemble(InceptionV3, arrays, source)
