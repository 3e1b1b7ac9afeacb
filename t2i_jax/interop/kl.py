"""Names of published KL autoencoders, and what their shapes say.

Two ways of naming: that of taming-transformers, which latent diffusion and MAR keep, and that of diffusers, whose older
files call the matrices of attention otherwise.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from t2i_jax.interop import vqgan
from t2i_jax.interop.names import CONV, Table, Tensors, source
from t2i_jax.nn.trees import named

Style = Literal["taming", "diffusers", "diffusers_2022"]

# Training losses, and the averages that latent diffusion keeps beside the weights, with dots taken out of their names.
UNUSED = vqgan.IGNORED + r"|^model_ema\."

# From our dotted names to those of diffusers, in this order; it counts the decoder's levels as they run, as we do.
DIFFUSERS = (
    (r"^autoencoder\.", ""),
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.stem\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.norm\.", r"\1.conv_norm_out."),
    (r"^(encoder|decoder)\.out\.", r"\1.conv_out."),
    (r"^(encoder\.levels\.\d+)\.resample\.", r"\1.downsamplers.0."),
    (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsamplers.0."),
    (r"^encoder\.levels\.", "encoder.down_blocks."),
    (r"^decoder\.levels\.", "decoder.up_blocks."),
    (r"\.blocks\.(\d+)\.", r".resnets.\1."),
    (r"\.middle\.block1\.", ".mid_block.resnets.0."),
    (r"\.middle\.block2\.", ".mid_block.resnets.1."),
    (r"\.middle\.attention\.", ".mid_block.attentions.0."),
    (r"\.attention\.(\d+)\.", r".attentions.\1."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
)
ATTENTION = {
    "diffusers": {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    "diffusers_2022": {"q": "query", "k": "key", "v": "value", "out": "proj_attn"},
}


def table(model: Any, style: Style) -> Table:
    """Where each variable of a KL autoencoder (without discriminator) lies in a published file."""
    if style == "taming":
        return vqgan.table(model, "taming")
    matrices = ATTENTION[style]

    def theirs(name: str) -> str:
        for pattern, to in DIFFUSERS:
            name = re.sub(pattern, to, name)
        return re.sub(r"(attentions\.\d+)\.(q|k|v|out)\.", lambda m: f"{m[1]}.{matrices[m[2]]}.", name)

    def layout(name: str, variable: Any) -> str:
        if variable.ndim != 4:
            return ""
        return "f c -> 1 1 c f" if re.search(r"attention.*\.(q|k|v|out)\.w$", name) else CONV

    return {k: source(theirs(k), layout=layout(k, v)) for k, v in named(model).items()}


def describe(tensors: Tensors, style: Style) -> dict[str, Any]:
    """The sizes that the shapes of `tensors` (arrays or abstract) say, as fields of the codec and its autoencoder.

    Errors: ValueError where a name that every such file has is not there.
    """
    down, up, block, attention = {
        "taming": ("encoder.down.{}", "decoder.up.{}", "block", "attn"),
        "diffusers": ("encoder.down_blocks.{}", "decoder.up_blocks.{}", "resnets", "attentions"),
    }[style.removesuffix("_2022")]
    first = f"{down.format(0)}.{block}.0.conv1.weight"
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", first):
        if name not in tensors:
            raise ValueError(f"no {name} among {len(tensors)} names: this is no KL autoencoder in the names of {style}")
    shape = lambda name: tuple(tensors[name].shape)
    has = lambda prefix: any(name.startswith(prefix + ".") for name in tensors)
    count = lambda prefix: next(n for n in range(len(tensors) + 1) if not has(f"{prefix}.{n}"))

    levels = count(down.rsplit(".", 1)[0])
    channels, latent = shape("encoder.conv_in.weight")[0], shape("decoder.conv_in.weight")[1]
    widths = [shape(f"{down.format(n)}.{block}.0.conv1.weight")[0] for n in range(levels)]
    if any(width % channels for width in widths):
        raise ValueError(
            f"widths {widths} of the levels are no multiples of the {channels} channels of the first layer"
        )
    moments = shape("encoder.conv_out.weight")[0]
    if moments != 2 * latent:
        raise ValueError(
            f"encoder.conv_out gives {moments} channels and decoder.conv_in takes {latent}: "
            "a KL autoencoder gives twice as many, mean and log-variance"
        )
    attends = lambda part: tuple(n for n in range(levels) if has(f"{part.format(n)}.{attention}"))
    decoder = attends(up)
    if style != "taming":  # in the order in which levels run
        decoder = tuple(sorted(levels - 1 - n for n in decoder))
    middle = "encoder.mid.attn_1" if style == "taming" else "encoder.mid_block.attentions"
    convolutions = "quant_conv.weight" in tensors
    return {
        "autoencoder": {
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "blocks": count(f"{down.format(0)}.{block}"),
            "decoder_blocks": count(f"{up.format(0)}.{block}"),
            "latent": latent,
            "moments": True,
            "attention": attends(down),
            "decoder_attention": decoder,
            "middle_attention": has(middle),
        },
        "channels": shape("post_quant_conv.weight")[1] if convolutions else latent,
        "convolutions": convolutions,
    }
