"""Names of DF-GAN (Tao et al. 2022) and SSA-GAN (Liao et al. 2022), and sizes by their shapes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from flax import nnx

from t2i_jax.core.params import Named, named
from t2i_jax.interop.names import CONV, LINEAR, Fields, Source, Table, Tensors, renamed, require, source

Style = Literal["dfgan", "ssagan"]

UNUSED = r"num_batches_tracked$|^netD\..*\.conv_s\.(weight|bias)$"
"""Counters, and shortcuts of the discriminator's blocks that keep the channels: files have them, programs do not use
them."""
ALONE = ((r"^module\.", ""), (r"^(?!net[GDC]\.)", "netG."))
"""The generator's names in a file that holds it alone, maybe those of a parallel module."""

# From our dotted names to theirs, in this order.
COMMON = (
    (r"\.scale_in\.", ".fc_gamma.linear1."),
    (r"\.scale_out\.", ".fc_gamma.linear2."),
    (r"\.shift_in\.", ".fc_beta.linear1."),
    (r"\.shift_out\.", ".fc_beta.linear2."),
    (r"\.share$", ".gamma"),
    (r"^generator\.into\.", "netG.fc."),
    (r"^discriminator\.into\.", "netD.conv_img."),
    (r"^(discriminator\..*)\.conv1\.", r"\1.conv_r.0."),
    (r"^(discriminator\..*)\.conv2\.", r"\1.conv_r.2."),
    (r"^(discriminator\..*)\.shortcut\.", r"\1.conv_s."),
    (r"^(generator\..*)\.conv1\.(conv\.)?", r"\1.c1."),
    (r"^(generator\..*)\.conv2\.", r"\1.c2."),
    (r"^(generator\..*)\.shortcut\.", r"\1.c_sc."),
)
STYLES: dict[Style, tuple[tuple[str, str], ...]] = {
    "dfgan": (
        (r"\.(fuse\d)\.(\d+)\.", r".\1.affine\2."),
        (r"^generator\.blocks\.", "netG.GBlocks."),
        (r"^generator\.out\.", "netG.to_rgb.1."),
        (r"^discriminator\.blocks\.", "netD.DBlocks."),
        (r"^discriminator\.joint\.", "netC.joint_conv.0."),
        (r"^discriminator\.out\.", "netC.joint_conv.2."),
    ),
    "ssagan": (
        (r"\.mask\.conv\.", ".conv_mask.0."),
        (r"\.mask\.norm\.", ".conv_mask.1."),
        (r"\.mask\.out\.", ".conv_mask.3."),
        (r"\.norm1\.", ".affine0."),
        (r"\.norm2\.", ".affine2."),
        (r"(\.affine\d)\.affine\.", r"\1."),
        (r"(\.affine\d)\.norm\.", r"\1.batch_norm2d."),
        (r"^(generator|discriminator)\.blocks\.(\d+)", r"\1.block\2"),
        (r"^generator\.norm\.", "netG.conv_img.0."),
        (r"^generator\.out\.", "netG.conv_img.2."),
        (r"^discriminator\.joint\.", "netD.COND_DNET.joint_conv.0."),
        (r"^discriminator\.out\.", "netD.COND_DNET.joint_conv.2."),
    ),
}
ENDS = (
    (r"^generator\.", "netG."),
    (r"^discriminator\.", "netD."),
    (r"\.w$", ".weight"),
    (r"\.b$", ".bias"),
    (r"\.mean$", ".running_mean"),
    (r"\.var$", ".running_var"),
)


class GANShapes(NamedTuple):
    """The names by which a style of files shows the sizes of a GAN."""

    block: str
    affine: str
    last: str
    joint: str


SHAPES: dict[Style, GANShapes] = {
    "dfgan": GANShapes("netG.GBlocks.{}", "fuse1.affine0", "netG.to_rgb.1", "netC.joint_conv.0"),
    "ssagan": GANShapes("netG.block{}", "affine0", "netG.conv_img.2", "netD.COND_DNET.joint_conv.0"),
}


def needed(style: Style) -> tuple[str, ...]:
    """Names that every file of a style has."""
    first = SHAPES[style].block.format(0)
    return "netG.fc.weight", f"{first}.c1.weight", f"{first}.{SHAPES[style].affine}.fc_gamma.linear1.weight"


def describe(tensors: Tensors, style: Style) -> Fields:
    """From the shapes of `tensors` (arrays or abstract): `network` and `discriminator`, None where it lacks, as
    fields of theirs; `sentence`, the size of a sentence vector; and of the blocks `layers`, or `mask_width`.

    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, needed(style), "no GAN of this kind")
    shape = lambda name: tuple(tensors[f"{name}.weight"].shape)
    block, affine, last, joint = SHAPES[style]
    count = next(n for n in range(len(tensors)) if f"{block.format(n)}.c1.weight" not in tensors)
    hidden, noise = shape("netG.fc")
    width, widest = shape(last)[1], shape(f"{block.format(0)}.c1")[1]
    start = math.isqrt(hidden // widest)
    sentence = shape(f"{block.format(0)}.{affine}.fc_gamma.linear1")[1]
    found: Fields = {"discriminator": None}
    if style == "dfgan":
        sentence -= noise
        found["layers"] = sum(
            f"{block.format(0)}.fuse1.affine{n}.fc_gamma.linear1.weight" in tensors for n in range(99)
        )
    else:
        count -= 1
        found["mask_width"] = shape("netG.conv_mask.0")[0]
    found["network"] = {
        "size": (start << count, start << count),
        "width": width,
        "largest": widest // width,
        "noise": noise,
    }
    if f"{joint}.weight" in tensors and "netD.conv_img.weight" in tensors:
        width = shape("netD.conv_img")[0]
        found["discriminator"] = {"width": width, "largest": (shape(joint)[1] - sentence) // width}
    return found | {"sentence": sentence}


def table(model: nnx.Module, style: Style, start: tuple[int, int]) -> Table:
    """The published name and layout of each variable of a `GAN`, whose generator begins at a grid of `start`."""
    return {name: _line(_theirs(name, style), variable, start) for name, variable in named(model).items()}


def buffers(model: nnx.Module, style: Style) -> dict[str, np.ndarray]:
    """What published programs expect besides the weights, and do not use."""
    ours: Named = named(model)
    found = {}
    for name, variable in ours.items():
        theirs = _theirs(name, style)
        if theirs.endswith(".running_mean"):
            found[theirs.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
        if theirs.endswith(".conv_r.2.weight") and name.replace("conv2.w", "shortcut.w") not in ours:
            c = variable.shape[-1]
            shortcut = theirs.removesuffix("conv_r.2.weight") + "conv_s."
            found |= {f"{shortcut}weight": np.zeros((c, c, 1, 1), np.float32)}
            found |= {f"{shortcut}bias": np.zeros(c, np.float32)}
    return found


def _theirs(name: str, style: Style) -> str:
    return renamed(name, COMMON + STYLES[style] + ENDS)


def _line(name: str, variable: nnx.Variable, start: tuple[int, int]) -> Source:
    if name.startswith("netG.fc."):
        rows, columns = start
        layout = "(c i j) z -> z (i j c)" if variable.ndim == 2 else "(c i j) -> (i j c)"
        return source(name, layout=layout, i=rows, j=columns)
    return source(name, layout={4: CONV, 2: LINEAR}.get(variable.ndim, ""))
