"""Names of published convolutional codecs: those of LlamaGen, and those of taming-transformers, which others share."""

import re
from typing import Any, Literal

from t2i_jax.interop.names import CONV, Source, Table, source
from t2i_jax.nn.trees import named

# Buffers, training losses, and other players that lie in published files beside the codec.
IGNORED = r"^loss\.|codebook_used$|num_batches_tracked$"

# From our dotted names to theirs, in this order. LEVEL stands for the number of a level in their order of levels.
COMMON = (
    (r"^autoencoder\.", ""),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.out\.", r"\1.conv_out."),
    (r"^(encoder\.levels\.\d+)\.resample\.", r"\1.downsample."),
    (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(attention(?:\.\d+)?)\.out\.", r"\1.proj_out."),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"\.attention\.(\d+)\.", r".attn.\1."),
)
STYLES = {
    "llamagen": (
        (r"\.middle\.block1\.", ".mid.0."),
        (r"\.middle\.attention\.", ".mid.1."),
        (r"\.middle\.block2\.", ".mid.2."),
        (r"\.levels\.(\d+)\.blocks\.", r".levels.\1.res."),
        (r"\.levels\.(\d+)\.", r".conv_blocks.\1."),
    ),
    "taming": (
        (r"\.middle\.block(\d)\.", r".mid.block_\1."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"\.levels\.(\d+)\.blocks\.", r".levels.\1.block."),
        (r"^encoder\.levels\.", "encoder.down."),
        (r"^decoder\.levels\.", "decoder.up."),
    ),
}


def table(model: Any, style: Literal["llamagen", "taming"]) -> Table:
    """Where each variable of a VQGAN (without discriminator and moving averages) lies in a published file."""
    names = named(model)
    last = max(int(n.split(".levels.")[1].split(".")[0]) for n in names if ".decoder.levels." in n)

    def theirs(name: str) -> str:
        for pattern, to in COMMON + STYLES[style]:
            name = re.sub(pattern, to, name)
        if style == "taming":  # which counts the decoder's levels from the finest, the last to run
            name = re.sub(r"(?<=^decoder\.up\.)\d+", lambda n: str(last - int(n[0])), name)
        return name

    return {name: _line(theirs(name), v) for name, v in names.items()}


def discriminator(model: Any) -> Table:
    """Where each variable of a PatchGAN with BatchNorm lies in taming-transformers."""
    names = named(model)
    layers = len({n for n in names if re.fullmatch(r"convs\.\d+\.w", n)})

    def theirs(name: str) -> str:
        kind, *number, last = name.split(".")
        if number:
            place = 3 * int(number[0]) + {"convs": 2, "norms": 3}[kind]
        else:
            place = {"stem": 0, "out": 3 * layers + 2}[kind]
        return f"main.{place}." + {"w": "weight", "b": "bias", "mean": "running_mean", "var": "running_var"}[last]

    return {name: _line(theirs(name), v) for name, v in names.items()}


def _line(name: str, variable: Any) -> Source:
    return source(name, layout=CONV if variable.ndim == 4 else "")
