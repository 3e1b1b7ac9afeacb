"""A published checkpoint becomes a folder that draws pictures, and a published checkpoint again."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax import convert
from t2i_jax.cli import main
from t2i_jax.codecs.dvae import DVAE, OpenAIdVAE
from t2i_jax.convert import folders
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named
from t2i_jax.networks.condition import TextFeatures
from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import load_artifact
from tests.fixtures.published_models import CODEC, KEY, LLAMA, MODELS, random
from tests.fixtures.t5_files import folder_of, vocabulary


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    config, hints = MODELS[name]
    name, model = name.split()[0], random(config)
    tensors = convert.restore(name, config, model)
    found, loaded = convert.convert(name, tensors, **hints)
    assert found == config
    ours, theirs = named(model), named(loaded)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[k][...], theirs[k][...]) for k in ours)
    again = convert.restore(name, found, loaded)
    assert again.keys() == tensors.keys() and all(np.array_equal(again[k], tensors[k]) for k in tensors)


def test_the_file_of_a_larger_program_holds_the_part():
    config, _ = MODELS["taming-gpt"]
    tensors = convert.restore("taming-gpt", config, random(config))
    whole = {f"transformer.{k}": v for k, v in tensors.items()} | {"first_stage_model.encoder.conv_in.bias": np.ones(3)}
    assert convert.unwrapped({"state_dict": whole}, convert.find("taming-gpt")).keys() == tensors.keys()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Published files of a codec and a model, and the folders that the command makes of them."""
    torch = pytest.importorskip("torch")
    room = tmp_path_factory.mktemp("published")
    codec, family = random(CODEC), random(LLAMA)
    tensors = {k: torch.tensor(v) for k, v in convert.restore("llamagen-vq", CODEC, codec).items()}
    tensors |= {"quantize.codebook_used": torch.zeros(65536)}
    stale = {k: torch.zeros_like(v) for k, v in tensors.items()}
    torch.save({"model": stale, "ema": tensors, "steps": 5}, room / "vq.pt")
    tensors = convert.restore("llamagen", LLAMA, family)
    torch.save({"model": {f"module.{k}": torch.tensor(v) for k, v in tensors.items()}}, room / "c2i.pt")
    main(["convert", "llamagen-vq", str(room / "vq.pt"), "--out", str(room / "codec")])
    places = ["--out", str(room / "model"), "--codec", str(room / "codec")]
    main(["convert", "llamagen", str(room / "c2i.pt"), "--grid", "2", "2", "--head-dim=8", *places])
    return room


def test_the_average_of_the_weights_is_taken(models):
    ours, theirs = named(load_artifact(models / "codec").model), named(random(CODEC))
    assert all(np.array_equal(ours[k][...], theirs[k][...]) for k in theirs)


def test_a_converted_model_draws_pictures(models, tmp_path):
    main(["sample", str(models / "model"), "3", "--out", str(tmp_path / "pictures"), "--guidance=2"])
    assert list((tmp_path / "pictures").rglob("*.png"))
    assert load_artifact(models / "model").image_size == 4


@pytest.mark.parametrize(
    ("format", "folder", "file"), [("llamagen", "model", "c2i.pt"), ("llamagen_vq", "codec", "vq.pt")]
)
def test_back_to_the_published_file(models, tmp_path, format, folder, file):
    main(["convert", format, str(models / folder), "--back", "--out", str(tmp_path / "back.safetensors")])
    published, back = convert.read(models / file, format), load_file(tmp_path / "back.safetensors")
    assert back.keys() == published.keys()
    assert all(np.array_equal(back[k], published[k]) for k in published)


def test_a_model_without_its_codec_says_so(models, tmp_path, capfd):
    main(["convert", "llamagen", str(models / "c2i.pt"), "--grid=2,2", "--head-dim=8", "--out", str(tmp_path / "bare")])
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "bare"), "3", "--out", str(tmp_path / "pictures")])
    assert "has no codec" in " ".join(capfd.readouterr().err.split())


def whole(torch, tensors):
    """A module of modules that holds these tensors."""
    net = torch.nn.Module()
    for name, value in tensors.items():
        *path, last = name.split(".")
        at = net
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, torch.nn.Parameter(torch.tensor(value)))
    return net


def test_both_halves_of_a_codec_saved_as_modules_become_one(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    config = DVAE(12, OpenAIdVAE(channels=8, groups=2, blocks=1, code=4))
    model = random(config)
    tensors = convert.restore("openai_dvae", config, model)
    file = tmp_path / "files"
    file.mkdir()
    arguments = ("openai-dvae", file, "--out", tmp_path / "codec")
    for half in ("encoder", "decoder"):
        assert "one file each of encoder and decoder" in error_of(capfd, *arguments)
        mine = {k.removeprefix(f"{half}."): v for k, v in tensors.items() if k.startswith(half)}
        torch.save(whole(torch, mine), file / f"{half}.pkl", _use_new_zipfile_serialization=half == "encoder")
    main(["convert", *map(str, arguments)])
    artifact = load_artifact(tmp_path / "codec")
    assert artifact.config == config
    assert all(np.array_equal(v[...], named(artifact.model)[k][...]) for k, v in named(model).items())
    halved = dataclasses.replace(config, half="encoder", network=dataclasses.replace(config.network, code=128))
    assert convert.convert("openai_dvae", convert.read(file / "encoder.pkl", "openai_dvae"))[0] == halved
    assert "no weights in it" in error_of(capfd, "llamagen", file, "--out", tmp_path / "out")


@pytest.mark.slow
def test_captions_become_pictures_as_the_original_makes_them(models, tmp_path):
    """A T5 in a folder, LlamaGen's model of captions and its codec, all by the command: the picture is that of the
    codes that follow the features which `transformers` gives."""
    torch = pytest.importorskip("torch")
    encoder = folder_of(tmp_path / "t5", {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 40,
                                          "vocab_size": 300, "feed_forward_proj": "gated-gelu"})  # fmt: skip
    vocabulary(tmp_path / "t5")
    features = TextFeatures(24, 6, trained_null=False, left=True, null_keeps_mask=True)
    family = with_fields(LLAMA, condition=features)
    tensors = convert.restore("llamagen", family, jax.tree.map(lambda x: x / 4, random(family)))
    torch.save({"model": {k: torch.tensor(v) for k, v in tensors.items()}}, tmp_path / "t2i.pt")
    places = ["--out", str(tmp_path / "model"), "--codec", str(models / "codec")]
    text = ["--text", f"t5:{tmp_path / 't5'},length=6"]
    main(["convert", "llamagen", str(tmp_path / "t2i.pt"), "--grid", "2", "2", "--head-dim=8", *places, *text])
    shutil.rmtree(tmp_path / "t5")  # the folder has all that it needs
    main(["sample", str(tmp_path / "model"), "a red apple", "--out", str(tmp_path / "pictures"), "--greedy"])
    assert list((tmp_path / "pictures").rglob("*.png"))

    pipeline = Pipeline.load(tmp_path / "model")
    options = dataclasses.replace(pipeline.options, greedy=True, guidance=3.0)
    prompts = ["a red apple", "two dogs and a cat"]
    drawn = pipeline.sample(prompts, seeds=[1, 2], options=options)
    ids, mask = load_artifact(tmp_path / "model").text(prompts)
    with torch.no_grad():
        seen = encoder(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    artifact, codec = load_artifact(tmp_path / "model"), load_artifact(models / "codec")
    condition = {"features": np.asarray(seen), "text_mask": mask}
    codes = artifact.config.sample(artifact.model, condition, jax.random.split(KEY, 2), options)
    assert len(np.unique(codes)) > 2
    expected = np.asarray(codec.config.decode(codec.model, codes))
    np.testing.assert_allclose(drawn, np.clip(expected * 127.5 + 127.5, 0, 255), atol=1)


def error_of(capfd, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    assert stop.value.code == 2
    return " ".join(capfd.readouterr().err.split())


def test_what_does_not_fit_is_told(models, tmp_path, capfd):
    tensors = convert.read(models / "c2i.pt", "llamagen")
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["output.weight"] = tensors["output.weight"][:-1]
    save_file(tensors, tmp_path / "wrong.safetensors")
    out = ("--out", tmp_path / "out", "--head-dim=8", "--grid=2,2")
    error = error_of(capfd, "llamagen", tmp_path / "wrong.safetensors", *out)
    assert all(part in error for part in ("norm.weight: missing", "extra: unused", "output.weight: [(19, 16)]"))
    assert not (tmp_path / "out").exists()
    assert "did you mean 'llamagen'" in error_of(capfd, "lamagen", models / "c2i.pt", *out)
    assert "gird" in error_of(
        capfd, "llamagen", models / "c2i.pt", "--out", tmp_path / "out", "--head-dim=8", "--gird=2,2"
    )
    assert "this is no next-token model" in error_of(capfd, "llamagen", models / "vq.pt", *out)
    assert "no codec" in error_of(capfd, "llamagen", models / "c2i.pt", *out, "--codec", models / "model")
    other = dataclasses.replace(LLAMA, vocabulary=21)
    with pytest.raises(ConfigError, match="20 codes, the model 21"):
        folders.image_side(other, str(models / "codec"))
    assert "VQGAN" in error_of(capfd, "llamagen", models / "codec", "--back", "--out", tmp_path / "x.safetensors")
    assert "exists already" in error_of(capfd, "llamagen", models / "c2i.pt", "--out", models / "model")


def test_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    for name, format in convert.formats().items():
        assert format.title and format.example
        assert f"  {name}: {format.title}\n" in text and f"t2i convert {name} {format.example} --out" in text
    assert "lm:FOLDER" in text


def test_help_of_a_format_lists_its_hints(capsys):
    main(["convert", "llamagen", "--help"])
    text = capsys.readouterr().out
    assert "t2i convert llamagen c2i_L_384.pt" in text and "--head-dim (int)" in text and "maskgit" not in text
    with pytest.raises(SystemExit):
        main(["convert", "llamagem", "--help"])
    assert "did you mean 'llamagen'" in capsys.readouterr().err
