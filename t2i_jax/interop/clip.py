"""Names of CLIP (Radford et al. 2021): those of Hugging Face and those of OpenAI's files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from t2i_jax.interop.names import LINEAR, Source, Table, source
from t2i_jax.interop.torchfile import StandIn, read_torch

PATCH = "d c i j -> i j c d"
IGNORED = r"position_ids$|^(input_resolution|context_length|vocab_size)$|attn_mask$"


def huggingface_table(text_head: int, image_head: int) -> Table:
    """The names of `transformers` for a `t2i_jax.text.clip.Clip`, whose towers have heads of these sizes."""
    lines = {
        "text.words.w": source("text_model.embeddings.token_embedding.weight"),
        "text.positions": source("text_model.embeddings.position_embedding.weight"),
        "text.out.w": source("text_projection.weight", layout=LINEAR),
        "image.first": source("vision_model.embeddings.class_embedding"),
        "image.patches.w": source("vision_model.embeddings.patch_embedding.weight", layout=PATCH),
        "image.positions": source("vision_model.embeddings.position_embedding.weight"),
        "image.out.w": source("visual_projection.weight", layout=LINEAR),
        "logit_scale": source("logit_scale"),
    }
    lines |= _both("text.norm", "text_model.final_layer_norm")
    lines |= _both("image.before", "vision_model.pre_layrnorm") | _both("image.norm", "vision_model.post_layernorm")
    for ours, theirs, head in (("text", "text_model", text_head), ("image", "vision_model", image_head)):
        layer = f"{theirs}.encoder.layers.{{}}."
        for part, letters in (("weight", "d"), ("bias", "")):
            names = [f"{layer}self_attn.{p}_proj.{part}" for p in "qkv"]
            layout = f"a (n h) {letters} -> {letters} (n a h)"
            lines[f"{ours}.blocks.attention.qkv.{part[0]}"] = source(*names, layout=layout, h=head)
        lines |= _layer(ours, layer, "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
    return lines


def openai_table(text_head: int, image_head: int) -> Table:
    """The names of OpenAI's own files."""
    lines = {
        "text.words.w": source("token_embedding.weight"),
        "text.positions": source("positional_embedding"),
        "text.out.w": source("text_projection"),
        "image.first": source("visual.class_embedding"),
        "image.patches.w": source("visual.conv1.weight", layout=PATCH),
        "image.positions": source("visual.positional_embedding"),
        "image.out.w": source("visual.proj"),
        "logit_scale": source("logit_scale"),
    }
    lines |= _both("text.norm", "ln_final") | _both("image.before", "visual.ln_pre")
    lines |= _both("image.norm", "visual.ln_post")
    for ours, theirs, head in (("text", "", text_head), ("image", "visual.", image_head)):
        layer = f"{theirs}transformer.resblocks.{{}}."
        for part, letters in (("weight", "d"), ("bias", "")):
            layout = f"(a n h) {letters} -> {letters} (n a h)"
            name = f"{layer}attn.in_proj_{part}"
            lines[f"{ours}.blocks.attention.qkv.{part[0]}"] = source(name, layout=layout, a=3, h=head)
        lines |= _layer(ours, layer, "attn.out_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
    return lines


def openai_tensors(path: str | Path) -> dict[str, Any]:
    """The tensors of one of OpenAI's files, a TorchScript archive, or of a state dict in .pt or .safetensors.

    Nothing of an archive's program is run: the modules in it are read as dictionaries of tensors.
    Errors: FileNotFoundError, ValueError where the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file, and no folder as Hugging Face lays it out")
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    content = read_torch(path, unknown="stand-in")
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    return dict(_tensors(content))


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors below a module, by dotted name."""
    content = module.state if isinstance(module, StandIn) else module
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if hasattr(value, "shape"):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")


def _both(ours: str, theirs: str, layout: str = "") -> dict[str, Source]:
    return {f"{ours}.w": source(f"{theirs}.weight", layout=layout), f"{ours}.b": source(f"{theirs}.bias")}


def _layer(ours: str, layer: str, out: str, into: str, back: str, first: str, second: str) -> dict[str, Source]:
    lines = _both(f"{ours}.blocks.attention_norm", layer + first) | _both(f"{ours}.blocks.mlp_norm", layer + second)
    for name, theirs in (("attention.out", out), ("mlp.into", into), ("mlp.out", back)):
        lines |= _both(f"{ours}.blocks.{name}", layer + theirs, LINEAR)
    return lines
