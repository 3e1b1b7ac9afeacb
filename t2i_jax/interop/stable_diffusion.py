"""Names of Stable Diffusion's UNets (Rombach et al. 2022) in diffusers, and sizes by shapes and settings."""

from __future__ import annotations

import re
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from t2i_jax.core.params import named
from t2i_jax.interop import huggingface
from t2i_jax.interop.names import CONV, LINEAR, POINTWISE, Fields, Source, Table, Tensors, require, source
from t2i_jax.networks.unet import UNet

NEEDED = (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.resnets.0.conv1.weight",
    "conv_in.weight",
    "conv_out.weight",
)
"""Names that every such file has."""
BLOCK = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
WHOLE = {
    "time.into": "time_embedding.linear_1",
    "time.out": "time_embedding.linear_2",
    "stem": "conv_in",
    "norm": "conv_norm_out",
    "out": "conv_out",
    "condition.into": "class_embedding.linear_1",
    "condition.out": "class_embedding.linear_2",
    "noise": "class_embedding",
}
ALONE = {
    "condition.null": source("null_features"),
    "condition.encoded.null": source("null_features"),
    "condition.mean": source("image_mean", layout="1 d -> d"),
    "condition.std": source("image_std", layout="1 d -> d"),
}
"""Lines of a condition; those of the statistics of embeddings are of another file than the UNet."""
IMAGE = "class_embedding.linear_1.weight"
"""Name of the projection of an image's embedding, in Stable unCLIP."""
LEVELS = "class_embedding.weight"
"""Name of the table of noise levels of the small image, in the upscaler."""
TRANSFORMER = {
    "attention_norm": "norm1",
    "attention.q": "attn1.to_q",
    "attention.out": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross.q": "attn2.to_q",
    "cross.out": "attn2.to_out.0",
    "mlp_norm": "norm3",
    "mlp.out": "ff.net.2",
}
A = TypeVar("A", np.ndarray, jax.ShapeDtypeStruct)
OWN = r"down_blocks\.(\d+)\.attentions\.0\.transformer_blocks\.0\.attn1\.to_k\.weight$"
"""Names of the keys of the first attention at each level; of as many numbers as the context they are its own."""
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D")

# Fields of config.json for which only these values are supported.
ONLY = {
    "center_input_sample": (False, None),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "dual_cross_attention": (False, None),
    "class_embed_type": (None, "projection"),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False, None),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional", None),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default", None),
    "class_embeddings_concat": (False, None),
    "cross_attention_norm": (None,),
}


def describe(tensors: Tensors) -> Fields:
    """The sizes given by the shapes of `tensors` (arrays or abstract), as fields of the network.

    Neither the attention heads nor the side of the latents follow.
    Errors: ValueError where the names are not those of such a model.
    """
    require(tensors, NEEDED, "no UNet of Stable Diffusion in diffusers")
    shape = lambda name: tuple(tensors[name].shape)
    width, channels_in = shape("conv_in.weight")[:2]
    channels, enlarges = shape("conv_out.weight")[0], LEVELS in tensors
    if (channels_in != channels) != enlarges:
        raise ValueError(
            f"conv_in.weight reads {channels_in} channels and conv_out.weight gives {channels}, with "
            f"{LEVELS if enlarges else 'no class_embedding'}: further input channels are supported of an upscaler, an "
            "image whose noise level has a table; not masks, and no classes"
        )
    count = lambda pattern: len({m[1] for m in (re.match(pattern, name) for name in tensors) if m})
    levels = count(r"down_blocks\.(\d+)\.")
    widths = [shape(f"down_blocks.{n}.resnets.0.conv1.weight")[0] for n in range(levels)]
    depths = {m[1]: 0 for m in (re.match(r"(.*attentions\.\d+)\.norm\.weight", name) for name in tensors) if m}
    for name in depths:
        depths[name] = count(re.escape(name) + r"\.transformer_blocks\.(\d+)\.")
    if len(set(depths.values())) > 1:
        raise ValueError(f"attentions of {sorted(set(depths.values()))} Transformer blocks: all must have as many")
    context = shape("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")[1]
    small: Fields = {
        "extra_inputs": ("low_res",),
        "low_res_channels": channels_in - channels,
        "noise_aug_conditioning": True,
        "noise_levels": shape(LEVELS)[0] if enlarges else 0,
    }
    read = {m[1]: shape(m[0])[1] for m in (re.match(OWN, name) for name in tensors) if m}
    alone = tuple(2**n for n in range(levels) if read.get(str(n), widths[n]) != widths[n])
    return {
        "channels": channels,
        "width": width,
        "multipliers": tuple(w // width if w % width == 0 else w / width for w in widths),
        "blocks": count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "attention": tuple(2**n for n in range(levels) if f"down_blocks.{n}.attentions.0" in depths),
        "transformers": next(iter(depths.values())),
        "context": context,
        "only_context": alone,
        "scale_shift": False,
        "resample": "conv",
        "pool": "summary" if IMAGE in tensors else "none",
        "learn_variance": False,
        **(small if enlarges else {}),
    }


def settings(config: Fields) -> Fields:
    """Fields of the network that `unet/config.json` has and the shapes have not.

    Errors: ValueError naming a field with an unsupported value.
    """
    huggingface.check_supported(config, ONLY, "unet/config.json")
    down, up = (tuple(config.get(f"{way}_block_types", ())) for way in ("down", "up"))
    mirrored = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    if any(kind not in DOWN for kind in down) or up != mirrored:
        raise ValueError(
            f"unet/config.json: down_block_types {down} and up_block_types {up}; "
            f"what can be read are {', '.join(DOWN)}, and {', '.join(UP)} in reverse order"
        )
    widths, attends = config["block_out_channels"], [kind == DOWN[0] for kind in down]
    counts = config.get("attention_head_dim", 8)  # so it is called, and is the number of heads
    if config.get("num_attention_heads") is not None:
        counts = config["num_attention_heads"]
    found: Fields = {"groups": config.get("norm_num_groups", 32), "eps": config.get("norm_eps", 1e-5)}
    if (side := config.get("sample_size")) is not None:
        found["size"] = (side, side) if isinstance(side, int) else tuple(side)
    alone = config.get("only_cross_attention") or False
    alone = [alone] * len(down) if isinstance(alone, bool) else alone
    if any(alone):
        found["only_context"] = tuple(2**n for n, only in enumerate(alone) if only and attends[n])
    if alone[-1] and attends[-1]:
        raise ValueError(f"unet/config.json: only_cross_attention {alone}: not at the lowest resolution")
    if isinstance(counts, int) or len(set(counts)) == 1:
        return found | {"heads": counts if isinstance(counts, int) else counts[0], "head_dim": 0}
    heads = {width / n for width, n in zip(widths, counts, strict=False)}
    if len(counts) != len(widths) or len(heads) > 1 or next(iter(heads)) % 1:
        raise ValueError(
            f"unet/config.json: attention_head_dim {counts}, heads over {widths} channels: "
            "either their number or their width must be the same at all levels"
        )
    return found | {"head_dim": int(next(iter(heads)))}


def schedule(config: Fields) -> Fields:
    """What `scheduler/scheduler_config.json` says: `schedule`, its `ends` if not those of its paper, `steps`,
    `zero_terminal_snr`, `predicts`.

    Errors: ValueError naming a field with an unknown value.
    """
    name, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "squaredcos_cap_v2": None}
    if name not in ends or config.get("trained_betas") is not None:
        raise ValueError(f"scheduler_config.json: beta_schedule {name!r}; what can be read are {', '.join(ends)}")
    given = tuple(config.get(f"beta_{end}", v) * steps / 1000 for end, v in (("start", 1e-4), ("end", 0.02)))
    other = ends[name] is not None and not np.allclose(given, ends[name], rtol=1e-6)
    if other and not 0 < given[0] <= given[1] < 1:
        raise ValueError(f"scheduler_config.json: betas of {name} from {given[0]} to {given[1]}: above 0, below 1")
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    if (kind := config.get("prediction_type", "epsilon")) not in kinds:
        raise ValueError(f"scheduler_config.json: prediction_type {kind!r} is not one of {', '.join(kinds)}")
    zero = bool(config.get("rescale_betas_zero_snr", False))
    found: Fields = {"schedule": name, "steps": steps, "zero_terminal_snr": zero, "predicts": kinds[kind]}
    return found | ({"ends": given} if other else {})


def squared(tensors: Tensors, linear: bool) -> dict[str, np.ndarray]:
    """The tensors with the ends of all attentions as matrices (`linear`, as in versions 2), or as 1x1 convolutions."""

    def like(name: str, x: A) -> A:
        if not re.search(r"attentions\.\d+\.proj_(in|out)\.weight$", name):
            return x
        shape = x.shape[:2] if linear else (*x.shape[:2], 1, 1)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, x.dtype)
        return x.reshape(shape)

    return {name: like(name, x) for name, x in tensors.items()}


def linear(config: UNet) -> bool:
    """Whether a UNet has matrices at the ends of its attentions: versions 2 do, whose heads have one width, and the
    upscaler."""
    return config.head_dim > 0 or config.noise_levels > 0


def table(model: nnx.Module, config: UNet) -> Table:
    """The name and layout in diffusers of each variable of a UNet with Transformer blocks. config: of the network."""
    lines, period = {}, config.blocks + 1
    for name, variable in named(model).items():
        if name in ALONE:
            lines[name] = ALONE[name]
            continue
        if m := re.match(r"(down|up)\.(\d+)\.(block|attention|resample)\.(.*)", name):
            level, n = divmod(int(m[2]), period)
            way, part, rest = m[1], m[3], m[4]
            inside = {"block": f"resnets.{n}", "attention": f"attentions.{n}"}.get(part, f"{way}samplers.0")
            place = f"{way}_blocks.{level}.{inside}."
        elif m := re.match(r"(before|after|attention)\.(.*)", name):
            part, rest = "attention" if m[1] == "attention" else "block", m[2]
            place = "mid_block." + {"before": "resnets.0.", "after": "resnets.1."}.get(m[1], "attentions.0.")
        else:
            part, rest = "", name
            place = ""
        if part == "attention":
            lines[name] = attention(place, rest, config, variable, LINEAR if linear(config) else POINTWISE)
            continue
        ours, leaf = rest.rsplit(".", 1)
        if part == "resample":
            ours = "conv"
        theirs = f"{place}{(BLOCK if part else WHOLE).get(ours, ours)}.{'weight' if leaf == 'w' else 'bias'}"
        layout = "" if theirs == LEVELS else {4: CONV, 2: LINEAR}.get(variable.ndim, "")
        lines[name] = source(theirs, layout=layout)
    return lines


def attention(place: str, rest: str, config: UNet, variable: nnx.Variable, matrix: str) -> Source:
    """The line of a variable of a `SpatialTransformer`, under names that begin with `place`; matrix: layout of its
    ends."""
    ours, leaf = rest.rsplit(".", 1)
    end = "weight" if leaf == "w" else "bias"
    if not ours.startswith("blocks."):
        theirs = {"into": "proj_in", "out": "proj_out"}.get(ours, ours)
        return source(f"{place}{theirs}.{end}", layout=matrix if variable.ndim == 2 else "")
    ours, block = ours.removeprefix("blocks."), f"{place}transformer_blocks.{{}}."
    if ours in ("attention.qkv", "attention.kv", "cross.kv"):
        attention, letters = "attn2" if ours == "cross.kv" else "attn1", ours.rpartition(".")[2]
        names = [f"{block}{attention}.to_{letter}.{end}" for letter in letters]
        width = variable.shape[-1] // len(letters)
        return source(*names, layout="a (n h) d -> d (n a h)", h=width // config.heads_of(width))
    if ours in ("mlp.into", "mlp.gate"):
        width = variable.shape[-1]
        rows = np.arange(width) + (width if ours == "mlp.gate" else 0)
        layout = LINEAR if leaf == "w" else ""
        return source(f"{block}ff.net.0.proj.{end}", layout=layout, rows=rows, height=2 * width)
    return source(f"{block}{TRANSFORMER[ours]}.{end}", layout=LINEAR if variable.ndim == 3 else "")
