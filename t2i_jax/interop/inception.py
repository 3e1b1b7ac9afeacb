"""InceptionV3 under torchvision's names: that of the FID, which pytorch-fid publishes as
`pt_inception-2015-12-05-6726825d.pth`, and torchvision's own, which DAMSM reads."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np

from t2i_jax.core.params import named
from t2i_jax.features.classifiers import InceptionLayers, InceptionV3
from t2i_jax.interop.folding import network
from t2i_jax.interop.huggingface import Weights

NEEDED = ("Conv2d_1a_3x3.conv.weight", "fc.weight")
"""Names that every such file has."""


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a pytorch-fid file."""
    return inception_from(Weights(path, NEEDED), str(path))


def inception_from(weights: Mapping[str, np.ndarray], source: str = "the state dict") -> InceptionV3:
    """The network from a state dict under torchvision's names: `Mixed_5b.branch1x1.conv.weight`, `.bn.weight`, ..."""
    what = "not the Inception network of pytorch-fid"
    return network(InceptionV3, weights, _units(), "fc", NEEDED, what, source)


def load_trunk(path: str | Path) -> InceptionLayers:
    """The convolutions with the weights of a file under torchvision's names."""
    return trunk_from(Weights(path, NEEDED[:1]), str(path))


def trunk_from(weights: Mapping[str, np.ndarray], source: str = "the state dict") -> InceptionLayers:
    """The convolutions alone, with torchvision's poolings, from a state dict under torchvision's names."""
    build, what = partial(InceptionLayers, kind="torchvision"), "no Inception-v3 of torchvision"
    return network(build, weights, _units(), "", NEEDED[:1], what, source)


def _units() -> dict[str, tuple[str, str]]:
    """Our names of convolutions, and theirs of the convolution and its norm."""
    names = named(jax.eval_shape(partial(InceptionLayers, kind="torchvision"), jax.random.key(0)))
    return {unit: (f"{unit}.conv", f"{unit}.bn") for unit in {name.rpartition(".")[0] for name in names}}
