"""Names of TAESD and its kin: sequences of layers, numbered with those that have no weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import reduce

from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import CONV, Fields, Table, Tensors, source

NEEDED = (
    ("encoder.0.weight", "decoder.1.weight", "decoder.3.conv.0.weight"),
    ("encoder.layers.0.weight", "decoder.layers.0.weight", "decoder.layers.2.conv.0.weight"),
    ("1.weight", "3.conv.0.weight"),
    ("0.weight", "2.weight", "4.conv.0.weight"),
)
"""Names that both sides in one file have, those of diffusers, those of a decoder alone, and of an encoder alone."""
ONLY = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}
"""Fields of diffusers' config.json, and the values of them that are supported."""
LAYER = re.compile(r"^autoencoder\.(encoder|decoder)\.(stem|out|layers\.\d+)")
INSIDE = (
    (r"\.residual\.convs\.(\d)\.", lambda m: f".conv.{2 * int(m[1])}."),
    (r"\.pool\.into\.", ".pool.0."),
    (r"\.pool\.norm\.", ".pool.1."),
    (r"\.pool\.out\.", ".pool.3."),
    (r"^(\w+\.\d+)\.conv\.([wb])$", r"\1.\2"),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
)
"""From our names, after a layer has its number, to theirs."""


def sides(tensors: Tensors) -> Tensors:
    """Tensors under `encoder.` and `decoder.`, from diffusers' names and from those of a decoder alone.

    Errors: ValueError for an encoder alone.
    """
    if "decoder.layers.0.weight" in tensors:  # without the first layer, which has no weights
        number = lambda m: f"{m[1]}{int(m[2]) + (m[1] == 'decoder.')}."
        return {re.sub(r"^(encoder\.|decoder\.)layers\.(\d+)\.", number, name): t for name, t in tensors.items()}
    if "decoder.1.weight" in tensors:
        return tensors
    if "0.weight" in tensors:
        raise ValueError("this is an encoder alone; give the folder that holds the decoder, too")
    return {f"decoder.{name}": tensor for name, tensor in tensors.items()}


def describe(tensors: Tensors) -> Fields:
    """From the shapes of `tensors` (arrays or abstract): channels of a code, sizes of decoder and encoder."""
    decoder, channels = _levels(tensors, "decoder", 1), tensors["decoder.1.weight"].shape[1]
    encoder = _levels(tensors, "encoder", 0) if "encoder.0.weight" in tensors else None
    return {"channels": channels, "encoder": encoder, "decoder": decoder}


def _levels(tensors: Tensors, side: str, first: int) -> Fields:
    """Channels and blocks of each level of one side, whose first layer is number `first`."""
    found = (re.fullmatch(rf"{side}\.(\d+)\.(conv\.0\.)?weight", name) for name in tensors)
    layers = sorted((int(m[1]), m[2] is not None, tensors[m[0]].shape[0]) for m in found if m)
    start = next((n for n, (_, block, _) in enumerate(layers) if block), len(layers))
    # A first convolution that halves the image has a ReLU after it, which takes a number; that of a decoder, too.
    entry = tuple(f for _, _, f in layers[:start]) if side == "encoder" and layers[start][0] > first + start else ()
    channels, blocks = [], []
    for _, block, f in layers[start - 1 : -1]:
        if block:
            blocks[-1] += 1
        else:
            channels.append(f)
            blocks.append(0)
    normed = any(name.startswith(f"{side}.") and ".pool." in name for name in tensors)
    return {"channels": tuple(channels), "blocks": tuple(blocks), "normed": normed} | (
        {"entry": entry} if entry else {}
    )


def table(model: nnx.Module) -> Table:
    """The published name and layout of each variable of a `codecs.taesd.TAESD`."""
    variables = named(model)
    places = dict(_places(set(variables)))

    def theirs(name: str) -> str:
        return reduce(lambda name, step: re.sub(*step, name), INSIDE, LAYER.sub(lambda m: places[m[0]], name))

    return {n: source(theirs(n), layout=CONV if v.ndim == 4 else "") for n, v in variables.items()}


def _places(names: set[str]) -> Iterator[tuple[str, str]]:
    """Our layers, and the published ones with their numbers."""
    for side in ("encoder", "decoder"):
        if f"autoencoder.{side}.out.w" not in names:
            continue
        at = 0
        if side == "decoder":
            at = 3  # after the limit, the first convolution, and its ReLU
            yield f"autoencoder.{side}.stem", f"{side}.1"
        for n in itertools.count():
            layer = f"autoencoder.{side}.layers.{n}"
            if not any(name.startswith(f"{layer}.") for name in names):
                break
            at += side == "decoder" and f"{layer}.conv.w" in names  # doubling, before a convolution
            yield layer, f"{side}.{at}"
            at += 1 + (f"{layer}.conv.b" in names)  # a ReLU after it
        yield f"autoencoder.{side}.out", f"{side}.{at}"
