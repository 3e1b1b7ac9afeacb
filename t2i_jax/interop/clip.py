"""Names of CLIP (Radford et al. 2021): those of Hugging Face and those of OpenAI's files."""

from pathlib import Path

from t2i_jax.interop.huggingface import Weights, settings
from t2i_jax.interop.names import LINEAR, Fields, Source, Table, Tensors, by_head, layers, source

PATCH = "d c i j -> i j c d"
OPEN_CLIP = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of a folder of open_clip."""
PLAIN = {
    "embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "layers", "width", "head_width", "heads", "mlp_ratio",
    "patch_size", "image_size", "patch_dropout", "context_length", "vocab_size",
}  # fmt: skip
"""Fields there of a network that is OpenAI's, but for its sizes and its activation."""
NEEDED = ("token_embedding.weight", "visual.conv1.weight", "positional_embedding")
"""Names that every file of OpenAI has."""
FOLDER_NEEDED = (
    ("text_model.embeddings.token_embedding.weight",),
    ("embeddings.token_embedding.weight",),
    ("vision_model.embeddings.class_embedding",),
)
"""Names that every folder of `transformers` has, or newer ones of a text tower alone, or those of an image tower."""
IGNORED = r"position_ids$|^(input_resolution|context_length|vocab_size)$|attn_mask$"


def huggingface_table(text_head: int, image_head: int) -> Table:
    """The names of `transformers` for a `networks.clip.CLIPTowers`, whose towers have heads of these sizes."""
    norms = {"text.norm": "text_model.final_layer_norm", "image.before": "vision_model.pre_layrnorm"}
    lines = {
        "text.words.w": source("text_model.embeddings.token_embedding.weight"),
        "text.positions": source("text_model.embeddings.position_embedding.weight"),
        "text.out.w": source("text_projection.weight", layout=LINEAR),
        "image.first": source("vision_model.embeddings.class_embedding"),
        "image.patches.w": source("vision_model.embeddings.patch_embedding.weight", layout=PATCH),
        "image.positions": source("vision_model.embeddings.position_embedding.weight"),
        "image.out.w": source("visual_projection.weight", layout=LINEAR),
        "logit_scale": source("logit_scale"),
        **layers(norms | {"image.norm": "vision_model.post_layernorm"}),
    }
    for ours, theirs, head in (("text", "text_model", text_head), ("image", "vision_model", image_head)):
        layer = f"{theirs}.encoder.layers.{{}}."
        lines |= by_head(f"{ours}.blocks.attention.qkv", [f"{layer}self_attn.{p}_proj." for p in "qkv"], h=head)
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
        **layers({"text.norm": "ln_final", "image.before": "visual.ln_pre", "image.norm": "visual.ln_post"}),
    }
    for ours, theirs, head in (("text", "", text_head), ("image", "visual.", image_head)):
        layer = f"{theirs}transformer.resblocks.{{}}."
        lines |= by_head(f"{ours}.blocks.attention.qkv", [f"{layer}attn.in_proj_"], "(a n h)", a=3, h=head)
        lines |= _layer(ours, layer, "attn.out_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
    return lines


def bias(learned: bool) -> Table:
    """The line of the bias of a sigmoid loss, as open_clip names it, if there is one."""
    return {"logit_bias": source("logit_bias")} if learned else {}


def openai_tensors(path: str | Path) -> Tensors:
    """The tensors of one of OpenAI's files, a TorchScript archive, or of a state dict in a PyTorch or safetensors file,
    or in a folder of open_clip.

    Nothing of an archive's program is run: the modules in it are read as dictionaries of tensors.
    Errors: FileNotFoundError, ValueError where the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no weights in it; one of {', '.join(WEIGHTS)} is wanted")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, and no folder as Hugging Face lays it out")
    return Weights(path, NEEDED)


def open_clip(folder: str | Path) -> Fields:
    """Fields that do not follow from shapes, from `open_clip_config.json`: head, text_head, activation.

    Errors: ValueError for settings that make another network than OpenAI's.
    """
    config = settings(Path(folder) / OPEN_CLIP)
    model = config.get("model_cfg", config)
    image, text = (model.get(part) if isinstance(model, dict) else None for part in ("vision_cfg", "text_cfg"))
    if not isinstance(image, dict) or not isinstance(text, dict):
        raise ValueError(f"{OPEN_CLIP} cannot be read: it has no objects vision_cfg and text_cfg")
    numbers = (image.get("head_width", 64), text.get("width", 512), text.get("heads", 8))
    if not all(isinstance(n, int) and n > 0 for n in numbers):
        raise ValueError(f"{OPEN_CLIP} cannot be read: head_width, width and heads are {numbers}, not positive numbers")
    for part, fields in {"": model, "vision_cfg.": image, "text_cfg.": text}.items():
        if other := sorted(k for k, v in fields.items() if v and k not in PLAIN):
            field = f"{part}{other[0]}={fields[other[0]]!r}"
            raise ValueError(f"{OPEN_CLIP}: {field} makes another network; towers of plain Transformers are read")
    head, width, heads = numbers
    return {
        "head": head,
        "text_head": width // heads,
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def _layer(ours: str, layer: str, out: str, into: str, back: str, first: str, second: str) -> dict[str, Source]:
    norms = {"attention_norm": first, "mlp_norm": second}
    linears = {"attention.out": out, "mlp.into": into, "mlp.out": back}
    place = lambda names: {f"{ours}.blocks.{part}": layer + theirs for part, theirs in names.items()}
    return layers(place(norms)) | layers(place(linears), LINEAR)
