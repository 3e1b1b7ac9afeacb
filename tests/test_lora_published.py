"""Adapters under published names: ours written and read back; and those of PEFT and diffusers, where they are."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax.cli import main
from t2i_jax.convert import convert, restore
from t2i_jax.convert.adapters import factors, read_published, to_published, write_published
from t2i_jax.core.config import ConfigError
from t2i_jax.interop import pixart, stable_diffusion_3
from t2i_jax.interop import stable_diffusion as published
from t2i_jax.nn.lora import LoRA
from t2i_jax.storage.adapters import Adapter, read_adapter, trained_shapes
from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from tests.fixtures.families import FAMILIES, fresh

CASES = {"dit": "dit", "llamagen": "ar-features", "mar": "masked-diffusion", "rdm": "rdm", "glide": "unet"}


def random_adapter(config, lora, state=False):
    rng = np.random.default_rng(0)
    shapes = trained_shapes(config, lora)  # with the state that a run carries, as positions
    wanted = {k: v for k, v in shapes.items() if k.endswith((".a", ".b")) or state}
    return Adapter(config, lora, {k: rng.normal(size=v.shape).astype(np.float32) for k, v in wanted.items()})


def deltas(adapter):
    names = {k.removesuffix(".a") for k in adapter.arrays if k.endswith(".a")}
    product = lambda k: adapter.lora.scale * np.matmul(adapter.arrays[f"{k}.a"], _b(adapter, k))
    return {k: product(k) for k in names}


def _b(adapter, k):
    a, b = adapter.arrays[f"{k}.a"], adapter.arrays[f"{k}.b"]
    return b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])


@pytest.mark.parametrize("names", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("format", CASES)
def test_adapters_are_written_and_read_back(tmp_path, format, names):
    config = FAMILIES[CASES[format]]
    targets = (r"attention.*\.w$",) + ((r"conv1\.w$",) if format == "glide" else ())
    adapter = random_adapter(config, LoRA(2, 3.0, targets))
    out = tmp_path / ("folder" if names == "peft" else "file.safetensors")
    write_published(adapter, format, out, names)
    back = read_published(out, format, config)
    wanted, found = deltas(adapter), deltas(back)
    assert wanted.keys() == found.keys()
    for k in wanted:
        np.testing.assert_allclose(found[k], wanted[k], atol=1e-4 * np.abs(wanted[k]).max(), err_msg=k)


def test_what_is_written_is_the_change_of_the_published_weights(tmp_path):
    """up x down of each module is the difference of the merged model's weights and the model's, in published names."""
    config, model = FAMILIES["dit"], fresh(FAMILIES["dit"])
    adapter = random_adapter(config, LoRA(2, 3.0, ("attention",)))
    save_artifact(Artifact(config, model), tmp_path / "model", "a card")
    merged = load_artifact(tmp_path / "model", lora=[(adapter, 1.0)]).model
    before, after = (restore("dit", config, m) for m in (model, merged))
    tensors = to_published(adapter, "dit", "diffusers")
    for name in before:
        stem = f"transformer.{name.removesuffix('.weight')}"
        change = after[name] - before[name]
        if f"{stem}.lora_A.weight" not in tensors:
            assert not np.any(change)
            continue
        product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(product, change, atol=1e-4)


def test_alpha_and_names_of_each_kind(tmp_path):
    config, rng = FAMILIES["dit"], np.random.default_rng(1)
    down, up = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(48, 2)).astype(np.float32)
    kinds = {
        "peft": (
            "base_model.model.blocks.0.attn.qkv.lora_A.weight",
            "base_model.model.blocks.0.attn.qkv.lora_B.weight",
        ),
        "diffusers": ("transformer.blocks.0.attn.qkv.lora_A.weight", "transformer.blocks.0.attn.qkv.lora_B.weight"),
        "older": ("transformer.blocks.0.attn.qkv.lora.down.weight", "transformer.blocks.0.attn.qkv.lora.up.weight"),
        "first": (
            "transformer.blocks.0.attn.processor.qkv_lora.down.weight",
            "transformer.blocks.0.attn.processor.qkv_lora.up.weight",
        ),
        "kohya": ("lora_unet_blocks_0_attn_qkv.lora_down.weight", "lora_unet_blocks_0_attn_qkv.lora_up.weight"),
    }
    found = {}
    for kind, (a, b) in kinds.items():
        alpha = {"lora_unet_blocks_0_attn_qkv.alpha": np.asarray(1.0, np.float32)} if kind == "kohya" else {}
        save_file({a: down, b: up, **alpha}, tmp_path / f"{kind}.safetensors")
        (found[kind],) = deltas(read_published(tmp_path / f"{kind}.safetensors", "dit", config)).values()
    for kind in ("diffusers", "older", "first"):
        np.testing.assert_allclose(found[kind], found["peft"], atol=1e-5)
    np.testing.assert_allclose(found["kohya"], found["peft"] / 2, atol=1e-5)


def test_alpha_in_the_header_of_a_file(tmp_path):
    """diffusers writes PEFT's settings there."""
    config, module = FAMILIES["dit"], "transformer.blocks.0.attn.qkv"
    tensors = {f"{module}.lora_A.weight": np.ones((2, 16), np.float32), f"{module}.lora_B.weight": np.ones((48, 2))}
    patterns = (({}, 2), ({"attn.qkv": 6}, 3), ({"proj|attn.qkv": 6}, 3), ({"attn|mlp": 6}, 2))
    for pattern, scale in patterns:
        said = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": pattern}
        file = tmp_path / f"{scale}.safetensors"
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(said)})
        (found,) = deltas(read_published(file, "dit", config)).values()
        np.testing.assert_allclose(found, scale * 2, rtol=1e-5)


def test_what_is_refused(tmp_path):
    config = FAMILIES["dit"]
    other = {"transformer.blocks.9.attn.qkv.lora_A.weight": np.zeros((2, 16), np.float32)}
    dora = {"transformer.blocks.0.attn.qkv.dora_scale": np.zeros((48, 1), np.float32)}
    half = {"transformer.blocks.0.attn.qkv.lora_A.weight": np.zeros((2, 16), np.float32)}
    for name, tensors, said in (
        ("other", other, "no adapters of this model: transformer.blocks.9"),
        ("dora", dora, "holds DoRA"),
        ("half", half, "one of its two matrices alone"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=said):
            read_published(tmp_path / f"{name}.safetensors", "dit", config)
    with pytest.raises(ConfigError, match="another program's; first: t2i convert FORMAT"):
        read_adapter(tmp_path / "other.safetensors")
    whole = Adapter(config, LoRA(2), {"condition.table.w": np.zeros((4, 16), np.float32)})
    with pytest.raises(ConfigError, match=r"adapters of matrices alone, not condition\.table\.w"):
        to_published(whole, "dit", "diffusers")


def test_the_command_converts_both_ways(tmp_path):
    config = FAMILIES["dit"]
    save_artifact(Artifact(config, fresh(config)), tmp_path / "model", "a card")
    adapter = random_adapter(config, LoRA(2, targets=("attention",)))
    write_published(adapter, "dit", tmp_path / "style.safetensors", "kohya")
    main(
        [
            "convert",
            "dit",
            str(tmp_path / "style.safetensors"),
            "--lora",
            str(tmp_path / "model"),
            "--out",
            str(tmp_path / "ours"),
        ]
    )
    main(
        [
            "convert",
            "dit",
            str(tmp_path / "ours"),
            "--back",
            "--names",
            "kohya",
            "--out",
            str(tmp_path / "back.safetensors"),
        ]
    )
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("style", "back"))
    assert first.keys() == second.keys()
    merged = load_artifact(tmp_path / "model", lora=[(read_adapter(tmp_path / "ours"), 1.0)]).model
    wanted = load_artifact(tmp_path / "model", lora=[(adapter, 1.0)]).model
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), merged, wanted)


def test_state_that_a_run_carries_is_in_no_published_file():
    """Such as the fixed positions of a DiT, which are no adapters."""
    config, lora = FAMILIES["dit"], LoRA(2, targets=("attention",))
    carried = random_adapter(config, lora, state=True)
    assert "positions" in carried.arrays
    found, wanted = (to_published(adapter, "dit", "peft") for adapter in (carried, random_adapter(config, lora)))
    assert found.keys() == wanted.keys() and not any("pos" in name for name in found)


def test_factors_are_exact():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20))
    for rank in (3, 5, 40):
        a, b = factors(delta, rank)
        assert a.shape == (30, rank) and b.shape == (rank, 20)
        np.testing.assert_allclose(a @ b, delta, atol=1e-5)


@pytest.mark.parametrize("names", ["peft", "diffusers"])
def test_diffusers_reads_ours_and_we_read_its(tmp_path, names):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    unet = theirs.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    arrays = lambda module: {k: v.numpy() for k, v in module.state_dict().items()}
    config, model = convert("stable-diffusion", arrays(unet), length=5, **published.settings(unet.config))
    save_artifact(Artifact(config, model), tmp_path / "model", "a card")

    # theirs, read by ours
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    if names == "diffusers":
        unet.save_lora_adapter(tmp_path / "theirs")
    else:
        state = peft.get_peft_model_state_dict(unet, adapter_name="default")
        (tmp_path / "theirs").mkdir()
        tensors = {f"base_model.model.{k}": v.contiguous().numpy() for k, v in state.items()}
        save_file(tensors, tmp_path / "theirs/adapter_model.safetensors")
        (tmp_path / "theirs/adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    adapter = read_published(tmp_path / "theirs", "stable-diffusion", config)
    merged = load_artifact(tmp_path / "model", lora=[(adapter, 1.0)]).model
    found = restore("stable-diffusion", config, merged)
    unet.fuse_lora()
    unet.unload_lora()
    fused = arrays(unet)
    for k in found:
        np.testing.assert_allclose(found[k], fused[k], atol=1e-4, err_msg=k)

    # ours, read by theirs
    plain = restore("stable-diffusion", config, model)
    unet.load_state_dict({k: torch.tensor(v) for k, v in plain.items()})
    write_published(adapter, "stable-diffusion", tmp_path / "ours.safetensors", "diffusers")
    state = {k.removeprefix("unet."): torch.tensor(v) for k, v in load_file(tmp_path / "ours.safetensors").items()}
    unet.load_lora_adapter(state, prefix=None)
    unet.fuse_lora()
    unet.unload_lora()
    again = arrays(unet)
    for k in found:
        np.testing.assert_allclose(again[k], found[k], atol=1e-4, err_msg=k)


PIXART = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16}
PIXART |= {"sample_size": 8, "caption_channels": 12}
THIRD = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8}
THIRD |= {"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
THIRD |= {"pooled_projection_dim": 10, "pos_embed_max_size": 5}
OTHERS = {
    "pixart": ("PixArtTransformer2DModel", PIXART, pixart.settings, 5),
    "stable-diffusion-3": ("SD3Transformer2DModel", THIRD, stable_diffusion_3.settings, 6),
}


@pytest.mark.parametrize("format", OTHERS)
def test_adapters_of_transformers_go_both_ways(tmp_path, format):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    kind, sizes, settings, tokens = OTHERS[format]
    torch.manual_seed(0)
    module = getattr(theirs, kind)(**sizes).eval()
    arrays = lambda: {k: v.numpy().copy() for k, v in module.state_dict().items()}
    null = {"null_features": np.zeros((tokens, 12), np.float32)}
    hints = settings(module.config) | ({"length": 5} if format == "stable-diffusion-3" else {})
    config, model = convert(format, arrays() | null, **hints)
    save_artifact(Artifact(config, model), tmp_path / "model", "a card")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    targets += ["add_q_proj", "add_k_proj", "add_v_proj"] if format == "stable-diffusion-3" else []
    given = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)

    # theirs, read by ours
    adapted = peft.get_peft_model(module, given)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    adapter = read_published(tmp_path / "theirs", format, config)
    merged = load_artifact(tmp_path / "model", lora=[(adapter, 1.0)]).model
    found = restore(format, config, merged)
    before = restore(format, config, model)
    module = adapted.merge_and_unload()
    fused = arrays()
    same = [k for k, v in fused.items() if k in before and before[k].shape == v.shape]  # positions are a part of theirs
    assert sum(np.abs(fused[k] - before[k]).max() > 1e-3 for k in same) >= 2 * len(targets)
    for k in same:
        np.testing.assert_allclose(found[k], fused[k], atol=1e-4, err_msg=k)

    # ours, read by theirs
    module.load_state_dict({k: torch.tensor(before[k] if k in same else v) for k, v in fused.items()})
    write_published(adapter, format, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(module, tmp_path / "ours").merge_and_unload()
    for k, v in again.state_dict().items():
        if k in same:
            np.testing.assert_allclose(v.numpy(), found[k], atol=1e-4, err_msg=k)
    write_published(adapter, format, tmp_path / "ours.safetensors", "diffusers")
    names = load_file(tmp_path / "ours.safetensors").keys()
    assert all(name.startswith("transformer.") for name in names), sorted(names)[:3]
