"""Names and shapes of the files of StackGAN, StackGAN++ (StackGAN-v2), AttnGAN and DM-GAN.

A file holds a generator, a discriminator, or all of them under `netG.`, `netD0.`, ... (for StackGAN `stage2_G.`,
`stage1_D.`, `stage2_D.`).
"""

from __future__ import annotations

import re
from typing import Literal

from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop.names import (
    CONV,
    LINEAR,
    POINTWISE,
    Fields,
    Rename,
    Source,
    Table,
    Tensors,
    renamed,
    require,
    source,
)

Style = Literal["stackgan", "stackgan_v2", "attngan", "dmgan"]
UNUSED = r"num_batches_tracked$|^stub_image_encoder\."

GENERATOR: dict[Style, tuple[str, ...]] = {
    "stackgan": ("STAGE1_G.fc.0.weight", "STAGE1_G.img.0.weight", "img.0.weight"),
    "stackgan_v2": ("h_net1.fc.0.weight", "img_net1.img.0.weight", "h_net2.jointConv.0.weight"),
    "attngan": ("ca_net.fc.weight", "h_net1.fc.0.weight", "h_net2.att.conv_context.weight"),
    "dmgan": ("ca_net.fc.weight", "h_net1.fc.0.weight", "h_net2.M_w.0.weight"),
}
"""Names that every generator has."""
DISCRIMINATOR: dict[Style, tuple[str, ...]] = {
    "stackgan": ("encode_img.0.weight", "get_cond_logits.outlogits.0.weight"),
    "stackgan_v2": ("img_code_s16.0.weight", "logits.0.weight"),
    "attngan": ("img_code_s16.0.weight", "COND_DNET.jointConv.0.weight"),
    "dmgan": ("img_code_s16.0.module.weight_bar", "COND_DNET.jointConv.0.module.weight_bar"),
}
"""Names that every discriminator has."""

WHOLE: dict[str, str] = {"stackgan": "stage2_G."}
"""Prefix of the generator where a file holds discriminators too, unless `netG.`."""

NORM = {"w": "weight", "b": "bias", "mean": "running_mean", "var": "running_var"}
RESIDUAL = (
    (r"residuals\.(\d+)\.inner\.conv\.", r"residual.\1.block.0."),
    (r"residuals\.(\d+)\.inner\.norm\.", r"residual.\1.block.1."),
    (r"residuals\.(\d+)\.outer\.conv\.", r"residual.\1.block.3."),
    (r"residuals\.(\d+)\.outer\.norm\.", r"residual.\1.block.4."),
)
TREE: tuple[tuple[str, Rename], ...] = (
    (r"^augmenting\.", "ca_net."),
    (r"^first\.fc\.", "h_net1.fc.0."),
    (r"^first\.norm\.", "h_net1.fc.1."),
    (r"^first\.up\.(\d+)\.conv\.conv\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.1."),
    (r"^first\.up\.(\d+)\.norm\.", lambda m: f"h_net1.upsample{int(m[1]) + 1}.2."),
    (r"^first\.out\.", "img_net1.img.0."),
    (r"^stages\.(\d+)\.out\.", lambda m: f"img_net{int(m[1]) + 2}.img.0."),
    (r"^stages\.(\d+)\.", lambda m: f"h_net{int(m[1]) + 2}."),
    *RESIDUAL,
    (r"\.up\.conv\.conv\.", ".upsample.1."),
    (r"\.up\.norm\.", ".upsample.2."),
    (r"\.mixer\.project\.", ".att.conv_context."),
    (r"\.mixer\.conv\.conv\.", ".jointConv.0."),
    (r"\.mixer\.conv\.norm\.", ".jointConv.1."),
    (r"\.mixer\.gate_words\.", ".A."),
    (r"\.mixer\.gate_image\.", ".B."),
    (r"\.mixer\.write_words\.", ".M_w.0."),
    (r"\.mixer\.write_image\.", ".M_r.0."),
    (r"\.mixer\.response\.", ".response_gate.0."),
    (r"\.mixer\.(key|value)\.", r".\1.0."),
)
TWO_STAGES: tuple[tuple[str, Rename], ...] = (
    (r"^augmenting\.", "STAGE1_G.ca_net."),
    (r"^first\.fc\.", "STAGE1_G.fc.0."),
    (r"^first\.norm\.", "STAGE1_G.fc.1."),
    (r"^first\.out\.", "STAGE1_G.img.0."),
    (r"^first\.", "STAGE1_G."),
    (r"^stages\.0\.", ""),
    (r"^augmenting\.", "ca_net."),
    (r"^stem\.", "encoder.0."),
    (r"^down\.(\d+)\.conv\.", lambda m: f"encoder.{3 * int(m[1]) + 2}."),
    (r"^down\.(\d+)\.norm\.", lambda m: f"encoder.{3 * int(m[1]) + 3}."),
    (r"^mixer\.conv\.conv\.", "hr_joint.0."),
    (r"^mixer\.conv\.norm\.", "hr_joint.1."),
    *RESIDUAL,
    (r"up\.(\d+)\.conv\.conv\.", lambda m: f"upsample{int(m[1]) + 1}.1."),
    (r"up\.(\d+)\.norm\.", lambda m: f"upsample{int(m[1]) + 1}.2."),
    (r"^out\.", "img.0."),
)


def table(model: nnx.Module, style: Style, sizes: tuple[int, ...]) -> Table:
    """The published name and layout of each variable of a `models.staged_gan.StagedGANNetwork`.

    sizes: rows of the image of each scale. The names have the prefixes of several files in one where the model has
    discriminators.
    """
    variables = named(model)
    judged = any(name.startswith("discriminators.") for name in variables)
    generator = WHOLE.get(style, "netG.") if judged else ""

    def line(name: str, variable: nnx.Variable) -> Source:
        if name.startswith("generator.network."):
            return _line(generator + _generator(name.removeprefix("generator.network."), style), variable)
        _, scale, rest = name.split(".", 2)
        prefix = f"stage{int(scale) + 1}_D." if style == "stackgan" else f"netD{scale}."
        alone = f"discriminators.{scale}.matching.w" not in variables
        return _line(prefix + _judge(rest, style, sizes[int(scale)], alone), variable)

    return {name: line(name, variable) for name, variable in variables.items()}


def discriminator(model: nnx.Module, style: Style, size: int) -> Table:
    """The same of one discriminator in a file of its own."""
    variables = named(model)
    alone = not any(name.startswith("matching.") for name in variables)
    return {name: _line(_judge(name, style, size, alone), variable) for name, variable in variables.items()}


def _generator(name: str, style: Style) -> str:
    return _suffix(renamed(name, TWO_STAGES if style == "stackgan" else TREE))


def _suffix(name: str) -> str:
    head, last = name.rsplit(".", 1)
    return f"{head}.{NORM.get(last, last)}"


def _judge(name: str, style: Style, size: int, alone: bool) -> str:
    """The name of a variable of a discriminator of images of this size; alone: it reads no condition."""
    kind, rest = name.split(".", 1)
    if kind == "trunk":
        number, rest = rest.split(".", 1)
        place = _place(int(number), style, size)
    elif kind == "joint":
        place = {"stackgan": "get_cond_logits.outlogits.", "stackgan_v2": "jointConv."}.get(
            style, "COND_DNET.jointConv."
        )
        place = (place, 0, 1)
    else:
        where = {
            ("stackgan", "matching"): "get_cond_logits.outlogits.3",
            ("stackgan", "alone"): "get_uncond_logits.outlogits.0",
            ("stackgan_v2", "matching"): "logits.0",
            ("stackgan_v2", "alone"): "logits.0" if alone else "uncond_logits.0",
        }
        names = {"matching": "COND_DNET.outlogits.0", "alone": "UNCOND_DNET.outlogits.0"}
        return _suffix(f"{where.get((style, kind), names[kind])}.{rest}")
    block, conv, norm = place
    if style == "dmgan":
        last = {"conv.conv.w": "weight_bar", "conv.conv.b": "bias", "conv.u": "weight_u", "conv.v": "weight_v"}[rest]
        return f"{block}{conv}.module.{last}"
    return _suffix(rest.replace("conv.", f"{block}{conv}.").replace("norm.", f"{block}{norm}."))


def _place(n: int, style: Style, size: int) -> tuple[str, int, int]:
    """The sequence that block n of a trunk is in, and the numbers of its convolution and its norm there."""
    halvings = (size // 4).bit_length() - 1
    conv, norm = max(3 * n - 1, 0), 3 * n
    if style == "stackgan":
        return "encode_img.", conv, norm
    if n < min(halvings, 4):
        return "img_code_s16.", 2 * n if style == "dmgan" else conv, norm
    return f"img_code_s{2 << n}." if n < halvings else f"img_code_s{1 << halvings}_{n - halvings + 1}.", 0, 1


def _line(name: str, variable: nnx.Variable) -> Source:
    if name.endswith("weight_v"):
        i, j, _ = variable.shape
        return source(name, layout="(c i j) -> i j c", i=i, j=j)
    if variable.ndim == 4:
        return source(name, layout=CONV)
    if variable.ndim == 2:
        one = re.search(r"\.(M_w|M_r|key|value)\.0\.", name)
        plane = re.search(r"conv_context|response_gate", name)
        return source(name, layout="f c 1 -> c f" if one else POINTWISE if plane else LINEAR)
    return source(name)


def describe(tensors: Tensors, style: Style) -> Fields:
    """From the shapes of `tensors` (arrays or abstract): `words`, the size of sentence and words, 0 without a
    condition; `network` and `discriminator`, fields of their configurations.

    Errors: ValueError where a name that every such file has is not there.
    """
    whole = WHOLE.get(style, "netG.")
    prefix = whole if any(name.startswith(whole) for name in tensors) else ""
    require(tensors, [f"{prefix}{name}" for name in GENERATOR[style]], f"no generator of {style}")
    shape = lambda name: tuple(tensors[f"{prefix}{name}"].shape)
    has = lambda name: f"{prefix}{name}" in tensors
    count = lambda form, first=0: next(n for n in range(len(tensors) + 1) if not has(form.format(n + first)))
    two = style == "stackgan"
    first = "STAGE1_G." if two else "h_net1."
    augmenting = f"{'STAGE1_G.' if two else ''}ca_net.fc.weight"
    conditional = has(augmenting)
    code = shape(augmenting)[0] // (2 if two else 4) if conditional else 0
    doublings = count(first + "upsample{}.1.weight", 1)
    network: Fields = {
        "width": shape(f"{'STAGE1_G.img' if two else 'img_net1.img'}.0.weight")[1],
        "noise": shape(first + "fc.0.weight")[1] - code,
        "augmentation": code,
    }
    if two:
        network["redraw"] = {"width": shape("encoder.0.weight")[0], "residuals": count("residual.{}.block.0.weight")}
        network["size"] = 16 << doublings
    else:
        stages = count("h_net{}.upsample.1.weight", 2)
        network["residuals"] = [count(f"h_net{n + 2}.residual.{{}}.block.0.weight") for n in range(stages)]
        network["size"] = 4 << doublings + stages
    judges = [n for n in tensors if re.search(r"^(stage2_D\.encode_img|netD0\.img_code_s16)\.0\..*weight(_bar)?$", n)]
    found: Fields = {"words": shape(augmenting)[1] if conditional else 0, "network": network}
    return {**found, "discriminator": {"width": tensors[judges[0]].shape[0]}} if judges else found


def describe_discriminator(tensors: Tensors, style: Style) -> Fields:
    """The same of a file of one discriminator: `width`, `size` of its images, size `c` of its condition, `alone`.

    Errors: ValueError where a name that every such file has is not there.
    """
    require(tensors, DISCRIMINATOR[style], f"no discriminator of {style}")
    first, joint = DISCRIMINATOR[style]
    width = tensors[first].shape[0]
    joint = "jointConv.0.weight" if style == "stackgan_v2" else joint
    shapes = [tuple(t.shape) for t in tensors.values()]
    halvings = sum(len(s) == 4 and s[0] > 1 and s[2] == 4 for s in shapes)
    conditional = joint in tensors
    c = tensors[joint].shape[1] - tensors[joint].shape[0] if conditional else 0
    alone = {"stackgan": "get_uncond_logits.outlogits.0.weight", "stackgan_v2": "uncond_logits.0.weight"}
    both = alone.get(style, "UNCOND_DNET.outlogits.0.weight") in tensors
    return {"width": width, "size": 4 << halvings, "c": c, "alone": both}
