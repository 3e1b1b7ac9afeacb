"""Names of DALL-E's discrete VAE: its encoder, its decoder, or both under `encoder.` and `decoder.`."""

import re

from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import CONV, Fields, Source, Table, Tensors, renamed, require, source

NEEDED = (("encoder.blocks.input.w", "decoder.blocks.input.w"), ("blocks.input.w",))
"""Names that both halves in one file have, or one half alone."""
NAMES = (
    (r"\.stem\.", ".blocks.input."),
    (r"\.groups\.(\d+)\.(\d+)\.", lambda m: f".blocks.group_{int(m[1]) + 1}.block_{int(m[2]) + 1}."),
    (r"\.convs\.(\d)\.", lambda m: f".res_path.conv_{int(m[1]) + 1}."),
    (r"\.shortcut\.", ".id_path."),
    (r"^(encoder|decoder)\.out\.", r"\1.blocks.output.conv."),
    (r"^codebook\.w$", "decoder.blocks.input.w"),
    (r"^decoder\.bias$", "decoder.blocks.input.b"),
)


def describe(tensors: Tensors) -> Fields:
    """From the shapes of `tensors` (arrays or abstract): half, codes, channels, groups, blocks, code."""
    if "encoder.blocks.input.w" in tensors:
        half, encoder, decoder = "both", "encoder.", "decoder."
    else:
        require(tensors, ("blocks.input.w",), "no discrete VAE of DALL-E")
        half = "encoder" if tensors["blocks.input.w"].shape[-1] > 1 else "decoder"
        encoder = decoder = ""
    prefix = encoder if half != "decoder" else decoder
    places = [
        re.fullmatch(re.escape(prefix) + r"blocks\.group_(\d+)\.block_(\d+)\.res_path\.conv_1\.w", n) for n in tensors
    ]
    groups, blocks = (max(int(m[n]) for m in places if m) for n in (1, 2))
    fields: Fields = {"half": half, "groups": groups, "blocks": blocks}
    if half == "decoder":
        code, codes = tensors["blocks.input.w"].shape[:2]
        return fields | {"channels": tensors["blocks.output.conv.w"].shape[1], "codes": codes, "code": code}
    fields["channels"] = tensors[f"{encoder}blocks.input.w"].shape[0]
    fields["codes"] = tensors[f"{encoder}blocks.output.conv.w"].shape[0]
    return fields if half == "encoder" else fields | {"code": tensors["decoder.blocks.input.w"].shape[0]}


def table(model: nnx.Module) -> Table:
    """The published name and layout of each variable of a `codecs.dvae.DVAE` with a `OpenAIdVAE` network."""
    variables = named(model)
    alone = len({name.split(".")[0] for name in variables} & {"encoder", "decoder"}) == 1

    def line(name: str, variable: nnx.Variable) -> Source:
        layout = "k v 1 1 -> v k" if name == "codebook.w" else CONV if variable.ndim == 4 else ""
        theirs = renamed(name, NAMES)
        return source(theirs.split(".", 1)[1] if alone else theirs, layout=layout)

    return {name: line(name, variable) for name, variable in variables.items()}
