"""Weights are found in files and folders under any usual wrapping; what holds none is named, and nothing is a guess."""

import gzip
import json
import logging
import shutil
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.convert import folders
from t2i_jax.core.params import named
from t2i_jax.core.sniff import sniff_file
from t2i_jax.interop import huggingface
from t2i_jax.interop.clip import openai_tensors
from t2i_jax.interop.efficientnet import load_efficientnet
from t2i_jax.interop.inception import load_inception
from t2i_jax.interop.tensorfile import SafeTensors
from t2i_jax.interop.vgg import load as load_vgg
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.decoder_lm import DecoderLM
from t2i_jax.text.t5 import T5
from tests.fixtures.published_files import CODEC, LFS, MODEL, PAGE, random
from tests.fixtures.torchfiles import Object, save_torch

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def tensors():
    return random("dit", MODEL)


def cast(tensors, dtype):
    return {k: v.astype(dtype) for k, v in tensors.items()}


def under(prefix, tensors):
    return {prefix + k: v for k, v in tensors.items()}


def zeros(tensors):
    return {k: np.zeros_like(v) for k, v in tensors.items()}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name].astype(np.float32), wanted[name].astype(np.float32), name)


PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "ema_model.", "diffusion_model.", "denoiser.backbone."]
PREFIXES += ["module._orig_mod.", "_orig_mod.module.", "model.module.", "module.model._orig_mod.", "_forward_module."]
NAMESPACE = Object("argparse", "Namespace", lr=1e-4)
OPTIMIZER = {"state": {0: {"exp_avg": np.ones(3, np.float32), "step": 1}}, "param_groups": [{"lr": 1e-4}]}
WRAPPINGS = {
    "state_dict": lambda t: {"state_dict": t},
    "model": lambda t: {"model": t, "optimizer": OPTIMIZER, "epoch": 3},
    "training": lambda t: {"model": zeros(t), "ema": t, "opt": OPTIMIZER, "args": NAMESPACE},
    "model_ema": lambda t: {"state_dict": zeros(t), "model_ema": t},
    "ema_model with a module": lambda t: {"ema_model": {"module": t, "decay": 0.99}, "model": zeros(t)},
    "average of swa_utils": lambda t: {"n_averaged": np.asarray(5), **under("module.", t)},
    "averages flat": lambda t: under("ema.", t) | under("model.", zeros(t)),
    "no average": lambda t: {"ema": {}, "model": t},
    "average None": lambda t: {"ema": None, "model": t},
    "wrappers in two layers": lambda t: {"model": {"module": under("module.", t)}},
    "half in a wrapper": lambda t: {("module." if k < "m" else "") + k: v for k, v in t.items()},
    "wrappers within names": lambda t: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in t.items()},
    "lightning": lambda t: {"state_dict": under("model.", t), "loops": {"fit": 1}, "hparams": NAMESPACE},
    "another model": lambda t: {"state_dict": under("model.", t) | {"loss.logvar": np.ones(1, np.float32)}},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("write", [save_torch, save_file], ids=["torch", "safetensors"])
def test_prefixes_of_names_are_taken_off(tensors, tmp_path, prefix, write):
    write(under(prefix, tensors), tmp_path / "w.bin")
    equal(convert.read(tmp_path / "w.bin", "dit"), tensors)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_are_taken_off(tensors, tmp_path, wrapping):
    save_torch(WRAPPINGS[wrapping](tensors), tmp_path / "w.pt")
    equal(convert.read(tmp_path / "w.pt", "dit"), tensors)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("write", [save_torch, save_file], ids=["torch", "safetensors"])
def test_every_width_of_numbers_is_read(tensors, tmp_path, caplog, dtype, write):
    narrow = cast(tensors, getattr(ml_dtypes, dtype, dtype))
    write(narrow, tmp_path / "w.pt")
    found = convert.read(tmp_path / "w.pt", "dit")
    assert all(v.dtype == dtype for v in found.values())
    equal(found, narrow)
    model = convert.convert("dit", found, "w.pt", heads=1)[1]
    assert all(v.dtype == np.float32 for v in jax.tree.leaves(model))
    assert ("tensors are float8" in caplog.text) == dtype.startswith("float8")


@pytest.mark.parametrize("ending", ["safetensors", "SAFETENSORS", "pt", "bin", "ckpt", "pth", "weights", ""])
@pytest.mark.parametrize("write", [save_torch, save_file], ids=["torch", "safetensors"])
def test_an_ending_says_nothing(tensors, tmp_path, ending, write):
    file = tmp_path / ("w." + ending).rstrip(".")
    write(tensors, file)
    equal(convert.read(file, "dit"), tensors)


def test_safetensors_are_what_the_package_reads(tensors, tmp_path):
    kinds = {
        "i": np.arange(6).reshape(2, 3),
        "u": np.ones(3, np.uint8),
        "b": np.array([True, False]),
        "one": np.ones(()),
    }
    save_file(tensors | kinds | {"none": np.zeros((0, 3), np.float16)}, tmp_path / "w")
    found = SafeTensors(tmp_path / "w")
    for name, value in (tensors | kinds).items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    assert found["none"].shape == (0, 3)


@pytest.mark.parametrize("length", [128, 384, 640, 896, 1152, 1408, 0x4B50, 0x8B1F, 0x4D42, 0x12345])
def test_the_length_of_a_header_looks_like_nothing_else(tmp_path, length):
    """It stands first in the file, and may have the bytes with which pickles, zips, gzips and images begin."""
    head = json.dumps({"a": F}).encode().ljust(length)
    (tmp_path / "w.pt").write_bytes(len(head).to_bytes(8, "little") + head + np.arange(2, dtype=np.float32).tobytes())
    assert sniff_file(tmp_path / "w.pt") == "a safetensors file"
    np.testing.assert_array_equal(huggingface.Weights(tmp_path / "w.pt")["a"], [0, 1])


def shards(tensors, folder, stem="model", ending=".safetensors", index=".safetensors.index.json", write=save_file):
    """Two files and their index."""
    names = sorted(tensors)
    parts = {f"{stem}-0000{n}-of-00002{ending}": names[n - 1 :: 2] for n in (1, 2)}
    for file, some in parts.items():
        write({k: tensors[k] for k in some}, folder / file)
    if index:
        where = {"weight_map": {k: file for file, some in parts.items() for k in some}}
        (folder / f"{stem.split('.')[0]}{index}").write_text(json.dumps(where))


D = "diffusion_pytorch_model"
HALF = np.float16
FOLDERS = {
    "diffusers": lambda t, f: save_file(t, f / f"{D}.safetensors"),
    "diffusers fp16": lambda t, f: save_file(cast(t, HALF), f / f"{D}.fp16.safetensors"),
    "diffusers bin": lambda t, f: save_torch(t, f / f"{D}.bin"),
    "diffusers fp16 bin": lambda t, f: save_torch(cast(t, HALF), f / f"{D}.fp16.bin"),
    "non_ema": lambda t, f: save_file(t, f / f"{D}.non_ema.safetensors"),
    "shards": lambda t, f: shards(t, f, D),
    "shards fp16 of today": lambda t, f: shards(cast(t, HALF), f, f"{D}.fp16", index=".safetensors.index.fp16.json"),
    "shards fp16 of before": lambda t, f: shards(
        cast(t, HALF), f, D, ".fp16.safetensors", ".safetensors.index.fp16.json"
    ),
    "shards fp16 of transformers": lambda t, f: shards(
        cast(t, HALF), f, "model.fp16", index=".fp16.safetensors.index.json"
    ),
    "shards bin": lambda t, f: shards(t, f, D, ".bin", ".bin.index.json", save_torch),
    "shards bin of transformers": lambda t, f: shards(t, f, "pytorch_model", ".bin", ".bin.index.json", save_torch),
    "shards without an index": lambda t, f: shards(t, f, D, index=""),
    "upper case": lambda t, f: save_file(t, f / "MODEL.SAFETENSORS"),
    "bin that is safetensors": lambda t, f: save_file(t, f / "pytorch_model.bin"),
    "another name": lambda t, f: save_torch(under("module.", t), f / "checkpoint-last.pth"),
    "with an optimiser": lambda t, f: (
        save_file(t, f / "model.safetensors"),
        save_torch(OPTIMIZER, f / "optimizer.bin"),
    ),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_folders_of_diffusers_and_transformers(tmp_path, layout):
    """A KL autoencoder in a folder with settings, and DiT's names in one without."""
    tensors = random("kl_diffusers", CODEC)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4, "scaling_factor": 0.2}))
    FOLDERS[layout](tensors, tmp_path)
    found = convert.find("kl_diffusers").folder(tmp_path)
    config, model = convert.convert("kl_diffusers", found.tensors, **found.hints)
    half = HALF if "fp16" in layout else np.float32
    equal(convert.restore("kl_diffusers", config, model), cast(tensors, half))
    plain = tmp_path / "dit"
    plain.mkdir()
    FOLDERS[layout](random("dit", MODEL), plain)
    equal(convert.read(plain, "dit"), cast(random("dit", MODEL), half))


def test_an_index_is_read_by_its_own_name(tensors, tmp_path):
    shards(tensors, tmp_path)
    equal(convert.read(tmp_path / "model.safetensors.index.json", "dit"), tensors)


@pytest.mark.parametrize(
    "best, others",
    [
        (
            f"{D}.safetensors",
            [f"{D}.fp16.safetensors", f"{D}.non_ema.safetensors", f"{D}.non_ema.bin", f"{D}.fp16.bin"],
        ),
        (f"{D}.bf16.safetensors", [f"{D}.fp16.safetensors", f"{D}.fp8.safetensors"]),
        ("model.fp16.safetensors", ["model.non_ema.safetensors"]),
        ("model.bin", ["model.fp16.safetensors"]),
    ],
)
def test_the_widest_variant_is_taken_and_named(tensors, tmp_path, caplog, best, others):
    save_file(tensors, tmp_path / best)
    for other in others:
        save_file(zeros(tensors), tmp_path / other)
    equal(huggingface.Weights(tmp_path), tensors)
    assert best in caplog.text and all(other in caplog.text for other in others)


def test_one_variant_in_two_formats_needs_no_word(tensors, tmp_path, caplog):
    save_file(tensors, tmp_path / "model.safetensors")
    save_torch(zeros(tensors), tmp_path / "pytorch_model.bin")
    equal(huggingface.Weights(tmp_path), tensors)
    assert not caplog.records


def test_a_variant_that_was_not_fetched_is_left_aside(tensors, tmp_path, caplog):
    (tmp_path / "model.safetensors").write_bytes(LFS)
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    equal(huggingface.Weights(tmp_path), tensors)
    assert "not those in model.safetensors" in caplog.text


def test_averages_are_taken_with_a_word(tensors, tmp_path, caplog):
    save_torch(WRAPPINGS["training"](tensors), tmp_path / "w.pt")
    convert.read(tmp_path / "w.pt", "dit")
    assert "weights under 'ema' are taken, not those under 'model'" in caplog.text
    caplog.clear()
    save_torch({"ema": {"shadow_params": list(zeros(tensors).values())}, "model": tensors}, tmp_path / "w.pt")
    equal(convert.read(tmp_path / "w.pt", "dit"), tensors)
    assert "'ema' does not hold this model by its names; 'model' is taken" in caplog.text


def test_numbers_that_are_not_finite_are_counted(tensors, tmp_path, caplog):
    bad = {k: v.copy() for k, v in tensors.items()}
    bad["blocks.0.mlp.fc1.weight"][0, :2] = np.nan
    bad["blocks.0.mlp.fc1.weight"][1, 0] = -np.inf
    bad["pos_embed"] = np.full_like(tensors["pos_embed"], 1e300, np.float64)  # beyond fp32
    convert.convert("dit", bad, "w.pt", heads=1)
    said = "w.pt: pos_embed has 0 NaN and 1024 infinite of 1024 numbers; 1 more tensors"
    again = "w.pt: blocks.0.mlp.fc1.weight has 2 NaN and 1 infinite of 16384 numbers; 1 more tensors"
    assert [r.getMessage().split(" have")[0] for r in caplog.records] in ([said], [again])
    caplog.clear()
    save_file({f"features.{n}.{k}": np.full((2, 3, 3, 3)[: 4 if k == "weight" else 1], np.inf, np.float32)
               for n in (0, 2) for k in ("weight", "bias")}, tmp_path / "vgg.pth")  # fmt: skip
    load_vgg(str(tmp_path / "vgg.pth"), blocks=1)
    assert "features.0.weight has 0 NaN and 54 infinite" in caplog.text


def zipped(path, name="w.pt", content=b"x"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def cut(write, share):
    def make(path, tensors):
        write(tensors, path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return make


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


FAULTS = {
    "lfs": (lambda p, t: p.write_bytes(LFS), "is a Git LFS pointer in place of the file (`git lfs pull`"),
    "page": (lambda p, t: p.write_bytes(PAGE), "is a web page"),
    "xml": (lambda p, t: p.write_bytes(b"<?xml version='1.0'?><Error>AccessDenied</Error>"), "is an XML document"),
    "empty": (lambda p, t: p.write_bytes(b""), "is an empty file"),
    "json": (lambda p, t: p.write_bytes(b'{"error": "not found"}'), "is a JSON file"),
    "text": (lambda p, t: p.write_bytes(b"Not found\n"), "is a text file"),
    "noise": (lambda p, t: p.write_bytes(bytes(range(256))), "not a safetensors or PyTorch file"),
    "gzip": (lambda p, t: p.write_bytes(gzip.compress(b"x" * 99)), "is a gzip file"),
    "gguf": (lambda p, t: p.write_bytes(b"GGUF" + bytes(99)), "is a GGUF file"),
    "zip": (lambda p, t: zipped(p, "sub/w.pt"), "a zip archive that holds sub/w.pt"),
    "cut safetensors": (cut(save_file, 0.5), "cut short"),
    "cut header": (cut(save_file, 0.005), "cut short"),
    "cut torch": (cut(save_torch, 0.5), "cut short"),
    "cut torch early": (cut(save_torch, 0.01), "cut short"),
    "pickle": (lambda p, t: p.write_bytes(b"\x80\x02K\x01."), "not a PyTorch file"),
    "list": (lambda p, t: save_torch(list(t.values()), p), "holds a list of"),
    "number": (lambda p, t: save_torch(3, p), "holds a int"),
    "no tensors": (lambda p, t: save_torch({"epoch": 3}, p), "holds no tensors (its keys are epoch)"),
    "no names": (lambda p, t: save_torch({}, p), "holds no tensors"),
    "optimiser": (lambda p, t: save_torch(OPTIMIZER, p), "the state of an optimiser"),
    "lora": (lambda p, t: save_file({"blocks.0.lora_A.weight": np.ones((2, 3))}, p), "this is a LoRA"),
    "compvis": (lambda p, t: save_file({"model.diffusion_model.out.2.bias": np.ones(4)}, p), "single-file kind"),
    "comfyui": (lambda p, t: save_file({"diffusion_model.out.2.bias": np.ones(4)}, p), "single-file kind"),
    "controlnet": (lambda p, t: save_file({"controlnet_cond_embedding.x": np.ones(4)}, p), "a ControlNet"),
    "another": (lambda p, t: save_file({f"rnn.{n}.w": np.ones(4) for n in range(9)}, p),
                "no pos_embed nor x_embedder.proj.weight nor y_embedder.embedding_table.weight among 9 names (rnn.0.w"),
    "another format": (lambda p, t: save_file(random("kl_diffusers", CODEC), p), "names are those of kl_diffusers"),
    "twice": (lambda p, t: save_torch(t | under("module.", t), p), "times, under names that differ in"),
    "two models": (lambda p, t: save_torch(under("student.", t) | under("teacher.", t), p),
                   "are there more than once: 'student', 'teacher'"),
    "one more": (lambda p, t: save_file(t | {"extra.weight": np.ones(3)}, p), "extra.weight: unused"),
    "one less": (lambda p, t: save_file({k: v for k, v in t.items() if "fc2.b" not in k}, p), "fc2.bias: missing"),
    "quantised": (lambda p, t: save_file({k: v.astype(np.int8) if "fc2" in k else v for k, v in t.items()}, p),
                  "int8 where floats are wanted"),
    "scaled float8": (lambda p, t: save_file(
        cast(t, ml_dtypes.float8_e4m3fn) | {"blocks.0.mlp.fc1.scale_weight": np.ones(1)}, p), "with scales"),
    "no header": (lambda p, t: p.write_bytes(header({"a": 3})), "damaged"),
    "a name twice": (lambda p, t: p.write_bytes(header(F)[:8] + b'{"a":1,"a":2}'), "cut short"),
    "wrong size": (lambda p, t: p.write_bytes(header({"a": F | {"shape": [3]}}, bytes(8))), "damaged: a has 8 bytes"),
    "negative": (lambda p, t: p.write_bytes(header({"a": F | {"shape": [-2]}}, bytes(8))), "damaged"),
    "unknown numbers": (lambda p, t: p.write_bytes(header({"a": F | {"dtype": "F4"}}, bytes(8))), "of kind F4"),
    "scalars": (lambda p, t: save_file({k: np.ones((), np.float32) for k in t}, p), "w."),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_what_holds_no_weights_is_named_in_one_line(tensors, tmp_path, fault, ending):
    make, said = FAULTS[fault]
    file = tmp_path / f"w.{ending}"
    make(file, tensors)
    with pytest.raises(ValueError) as error:
        folders.to_folder("dit", file, tmp_path / "out", {"heads": 1})
    assert said in str(error.value) and str(file) in str(error.value)
    assert not (tmp_path / "out").exists()


BROKEN = {
    "no weights": (lambda f, t: (f / "notes.md").write_text("x"), "no weights in it"),
    "index is a pointer": (
        lambda f, t: (f / "model.safetensors.index.json").write_bytes(LFS),
        "index.json: is a Git LFS",
    ),
    "index without a map": (lambda f, t: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "index is a list": (lambda f, t: (f / "model.safetensors.index.json").write_text("[]"), "holds a list"),
    "index is cut": (lambda f, t: (f / "model.safetensors.index.json").write_text('{"weight'), "no JSON"),
    "index leads elsewhere": (
        lambda f, t: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "is not in the same folder",
    ),
    "shard missing": (
        lambda f, t: (shards(t, f), (f / "model-00002-of-00002.safetensors").unlink()),
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "shard missing without an index": (
        lambda f, t: (shards(t, f, index=""), (f / "model-00002-of-00002.safetensors").unlink()),
        "model-00002-of-00002.safetensors, which is not there",
    ),
    "shard is a pointer": (
        lambda f, t: (shards(t, f), (f / "model-00002-of-00002.safetensors").write_bytes(LFS)),
        "model-00002-of-00002.safetensors: is a Git LFS pointer",
    ),
    "a name in two shards": (
        lambda f, t: (shards(t, f), save_file(t, f / "model-00002-of-00002.safetensors")),
        "and so does model-00001-of-00002.safetensors",
    ),
    "which of two": (
        lambda f, t: (save_file(t, f / "a.safetensors"), save_file(t, f / "b.safetensors")),
        "name the file that is meant",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_with_a_folder_is_said(tensors, tmp_path, fault):
    make, said = BROKEN[fault]
    make(tmp_path, tensors)
    with pytest.raises((ValueError, OSError)) as error:
        convert.read(tmp_path, "dit")
    assert said in str(error.value) and tmp_path.name in str(error.value)


def test_a_shard_alone_is_no_model(tensors, tmp_path):
    shards(tensors, tmp_path)
    with pytest.raises(ValueError, match="shard 1 of 2; name the folder or the index"):
        convert.read(tmp_path / "model-00001-of-00002.safetensors", "dit")


def folder_loader(load):
    def inside(path):
        shutil.copy(path, path.parent / "model.safetensors")
        return load(str(path.parent))

    return inside


T5_FIELDS = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "vocab_size": 9, "d_kv": 4}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 8, "vocab_size": 9}
LOADERS = {
    "clip": openai_tensors,
    "t5": folder_loader(lambda folder: T5(folder).load()),
    "decoder_lm": folder_loader(lambda folder: DecoderLM(folder).load()),
    "inception": load_inception,
    "efficientnet": load_efficientnet,
    "vgg": lambda path: load_vgg(str(path), blocks=1),
    "openai_dvae": lambda path: convert.read(path, "openai_dvae"),
    "a released model": folder_loader(load_artifact),
}


@pytest.mark.parametrize("content, said", [(LFS, "Git LFS pointer"), (PAGE, "web page"), (b"", "empty file")])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_says_what_a_file_is(tmp_path, loader, content, said):
    fields = {"t5": T5_FIELDS, "decoder_lm": LLAMA}.get(loader, {})
    if loader == "a released model":
        fields = {"model": {"type": "t2i_jax.codecs.vqgan:VQGAN"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises((ValueError, RuntimeError), match=said) as error:
        LOADERS[loader](tmp_path / "w.pt")
    assert str(tmp_path) in str(error.value)


def test_a_converted_file_of_any_wrapping_gives_the_model_of_the_plain_one(tensors, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    save_file(tensors, tmp_path / "plain.safetensors")
    save_torch(WRAPPINGS["training"](under("module._orig_mod.", tensors)), tmp_path / "wrapped.bin")
    models = []
    for file in ("plain.safetensors", "wrapped.bin"):
        folders.to_folder("dit", tmp_path / file, tmp_path / Path(file).stem, {"heads": 1})
        models.append(named(load_artifact(tmp_path / Path(file).stem).model))
    assert all(np.array_equal(models[0][k][...], models[1][k][...]) for k in models[0])
