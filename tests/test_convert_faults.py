"""`t2i convert`: whatever is given wrong ends in one clear line and status 2, and writes nothing."""

import json
import os
import shutil
import stat

import pytest
from safetensors.numpy import save_file

from t2i_jax import convert
from t2i_jax.cli import main
from tests.fixtures.clip_files import TEXT, letters
from tests.fixtures.published_files import CODEC, LFS, MODEL, PAGE, random
from tests.fixtures.published_models import MODELS
from tests.fixtures.published_models import random as model_of
from tests.fixtures.t5_files import SIZES, vocabulary


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Published files, converted ones, and much that is neither."""
    room = tmp_path_factory.mktemp("faults")
    save_file(random("dit", MODEL), room / "dit.safetensors")
    save_file(random("kl_diffusers", CODEC), room / "kl.safetensors")
    captions = MODELS["llamagen captions"][0]
    save_file(convert.restore("llamagen", captions, model_of(captions)), room / "t2i.safetensors")
    for name in ("empty", "t5", "clip", "hf", "cut", "odd", "list", "page"):
        (room / name).mkdir()
    (room / "text.txt").write_text("notes")
    (room / "lfs.pt").write_bytes(LFS)
    (room / "hub" / "unet").mkdir(parents=True)
    for folder in ("hf", "hub/unet"):
        (room / folder / "config.json").write_text("{}")
    (room / "t5" / "config.json").write_text(json.dumps(SIZES))
    vocabulary(room / "t5")
    fields = TEXT | {"vocab_size": 516, "model_type": "clip_text_model"}
    (room / "clip" / "config.json").write_text(json.dumps(fields))
    letters(room / "clip")
    for name, text in {
        "cut": '{"model": {',
        "odd": '{"model": {"type": 3}}',
        "list": "[]",
        "page": PAGE.decode(),
    }.items():
        (room / name / "config.json").write_text(text)
        save_file({}, room / name / "model.safetensors")
    here = os.getcwd()
    os.chdir(room)
    main(["convert", "dit", "dit.safetensors", "--heads", "1", "--out", "model"])
    main(["convert", "kl_diffusers", "kl.safetensors", "--groups=4", "--scale=0.2", "--out", "codec"])
    yield room
    os.chdir(here)


DIT = "dit dit.safetensors --out out "
T2I = "llamagen t2i.safetensors --head-dim=8 --grid 2 2 --out out "
FAULTS = {
    # formats
    "dti dit.safetensors --out out": "no format 'dti'; did you mean 'dit'? known are adm",
    "stable_difusion dit.safetensors --out out": "did you mean 'stable-diffusion'",
    "adm dit.safetensors --out out": "this is no UNet of guided-diffusion: no input_blocks.0.0.weight",
    "mar dit.safetensors --out out": "its names are those of dit, sit",
    # weights
    "dit nowhere.pt --out out": "nowhere.pt: there is no such file or folder",
    "dit someone/model --out out": "there is no such file or folder; a hub",
    "dit https://some.where/model.pt --out out": "paths are local, or begin with gs:// or s3://",
    "dit empty --out out": "empty: no weights in it",
    "dit hf --out out": "it holds config.json",
    "dit text.txt --out out": "text.txt: is a text file",
    "dit lfs.pt --out out": "git lfs pull",
    "dit /dev/null --out out": "is an empty file",
    "dit model/config.json --out out": "no index of weights",
    "dit model --out out": "model: is a run or a released model already; --back",
    "stable-diffusion hub --out out": "hub/unet/config.json: has no 'block_out_channels'",
    "stable-diffusion empty --out out": "empty: no weights in it",
    "kl_diffusers page --out out": "page/config.json: is a web page, not JSON",
    "kl_diffusers list --out out": "list/config.json: holds a list",
    "kl_diffusers cut --out out": "cut/config.json: cut short, or no JSON",
    "glide_clip empty --out out": "one file each of clip_text_enc and clip_image_enc",
    # hints
    f"{DIT}--heads": "--heads: True is not of the kind int",
    f"{DIT}--heads abc": "--heads abc: 'abc' is not of the kind int",
    f"{DIT}--heads 1.5": "1.5 is not of the kind int",
    f"{DIT}--heads 1 2": "(1, 2) is not of the kind int",
    f"{DIT}--heads=-1": "--heads -1: it is not negative",
    f"{DIT}--heads 3": "width 64 cannot be split into heads 3",
    f"{DIT}--null maybe": "'maybe' is not of the kind bool",
    f"{DIT}--hads=1": "dit takes no hint --hads; did you mean --heads?",
    f"{DIT}--heads=1 --solvr euler": "did you mean --solver?",
    f"{DIT}--heads=1 --bak": "did you mean --back?",
    f"{DIT}--heads=1 --grid 4 4": "dit takes no hint --grid",
    f"{DIT}--heads=1 --solver eulr": "Diffusion.solver 'eulr': one of own, ddpm, ddim",
    f"{DIT}--heads=1 --predicts noise": "Diffusion.predicts 'noise': one of eps, x0,",
    f"{DIT}--heads=1 --sampling 3": "Diffusion.sampling 3: a DiffusionSampler",
    f"{DIT}--heads=1 --guided-channels x": "Diffusion.guided_channels 'x': a number, 0 to 2147483647",
    f"{DIT}--heads=1 --network 3": "Diffusion.network 3: a DiT or a UNet",
    f"{DIT}--heads=1 stray": "what is 'stray'? Hints are --name value",
    f"{DIT}--=3": "what is '--=3'? Hints are --name value",
    "llamagen t2i.safetensors --head-dim=7 --out out": "head_dim=7 does not divide the width 16",
    "llamagen t2i.safetensors --head-dim=8 --grid=4 --out out": "4 is not of the kind tuple[int, int]",
    "llamagen t2i.safetensors --head-dim=8 --grid 2 2 2 --out out": "(2, 2, 2) is not of the kind tuple[int, int]",
    # text sides
    f"{T2I}--text t5:nowhere": "--text t5:nowhere: there is no 'nowhere'",
    f"{T2I}--text t5:": "there is no ''",
    f"{T2I}--text t5": "there is no ''",
    f"{T2I}--text bert:t5": "it is one of t5:FOLDER, clip:FOLDER",
    f"{T2I}--text t5:t5,lenght=3": "T5 has no field lenght; it has length, dtype",
    f"{T2I}--text t5:t5,length=x": "--length: 'x' is not of the kind int",
    f"{T2I}--text t5:t5,dtype=float16": "'float16' is not of the kind Literal",
    f"{T2I}--text lm:hf,template=words": "has no {}, the place of the caption",
    f"{T2I}--text t5:t5,length=3": "gives 3 vectors of 24 numbers a caption; the model reads 3 vectors of 6",
    f"{T2I}--text t5:hf": "config.json has no d_model",
    f"{T2I}--text t5:empty": "empty: no config.json in it",
    f"{T2I}--text lm:t5": "model_type None is not one of llama",
    f"{T2I}--text clip:text.txt": "text.txt: is a text file",
    f"{T2I}--text clip-tokens:hf": "config.json has no text_config",
    f"{DIT}--heads=1 --text t5:t5": "a Diffusion without captions takes no --text",
    # codecs
    f"{DIT}--heads=1 --codec nowhere": "nowhere: neither a run nor a released model",
    f"{DIT}--heads=1 --codec model": "model holds a Diffusion, which is no codec",
    f"{DIT}--heads=1 --codec text.txt": "neither a run nor a released model",
    f"{DIT}--heads=1 --codec cut": "cut/config.json: cut short, or no JSON",
    f"{DIT}--heads=1 --codec hf": "hf: its config.json is not that of a run",
    f"{T2I}--codec codec": "codec has codes of 4 numbers, the model 20 codes: this is not its codec",
    # places
    "dit dit.safetensors --heads=1 --out empty": "empty: exists already",
    "dit dit.safetensors --heads=1 --out text.txt": "text.txt: exists already",
    "dit dit.safetensors --heads=1 --out text.txt/out": "text.txt/out",
    "dit dit.safetensors --heads=1 --out s3://bucket/out": "is written to this machine alone",
    "dit dit.safetensors --heads=1 --out \0": "no path has a NUL in it",
    "dit dit.safetensors --heads=1": "--out",
    "dit": "Missing",
    # back
    "dit model --back --out out.pt": "safetensors is written; the name has to end in .safetensors",
    "dit model --back --out kl.safetensors": "kl.safetensors: exists already",
    "dit codec --back --out out.safetensors": "codec holds a KL, which is no dit",
    "llamagen model --back --out out.safetensors": "model holds a Diffusion, which is no llamagen",
    "adm model --back --out out.safetensors": "model holds a Diffusion, which is no adm",
    "stable-diffusion model --back --out out.safetensors": "model holds a Diffusion, which is no stable-diffusion",
    "mar codec --back --out out.safetensors": "codec holds a KL, which is no mar",
    "dti model --back --out out.safetensors": "did you mean 'dit'",
    "dit dit.safetensors --back --out out.safetensors": "dit.safetensors: neither a run nor a released model",
    "dit nowhere --back --out out.safetensors": "nowhere: neither a run nor a released model",
    "dit cut --back --out out.safetensors": "cut/config.json: cut short, or no JSON",
    "dit odd --back --out out.safetensors": 'config names the class "3"',
    "dit list --back --out out.safetensors": "list/config.json: holds a list",
    "dit page --back --out out.safetensors": "page/config.json: is a web page",
    "dit model --back --out text.txt/out.safetensors": "text.txt",
    "dit model --back --heads=1 --out out.safetensors": "--back takes no hints",
    "dit model --back --codec codec --out out.safetensors": "no --codec",
}


@pytest.mark.parametrize("command", FAULTS)
def test_a_fault_is_one_line(room, capfd, command):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *command.split(" ")])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    said = " ".join(error.split())
    assert FAULTS[command] in said and len(said) < 900
    assert not (room / "out").exists() and not (room / "out.safetensors").exists() and not (room / "out.pt").exists()


def test_what_may_not_be_read_or_written_is_named(room, tmp_path, capfd):
    if os.geteuid() == 0:
        pytest.skip("root may do all")
    shutil.copy(room / "dit.safetensors", tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0)
    (tmp_path / "closed").mkdir(stat.S_IRUSR)
    for arguments in (
        ["dit", f"{tmp_path}/w.pt", "--out", "out"],
        ["dit", "dit.safetensors", "--out", f"{tmp_path}/closed/out"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        assert stop.value.code == 2 and "Permission denied" in capfd.readouterr().err


def test_what_is_said_right_is_done(room, tmp_path, capfd):
    text = ["--text", "t5:t5,length=3"]
    with pytest.raises(SystemExit):  # 24 numbers where 6 are read
        main(["convert", *T2I.split(), *text])
    (room / "t5" / "config.json").write_text(json.dumps(SIZES | {"d_model": 6}))
    main(["convert", *T2I.replace("--out out", f"--out {tmp_path}/captions").split(), *text])
    main(["convert", "DIT", "dit.safetensors", "--heads=1", "--out", f"{tmp_path}/dit", "--codec", "codec"])
    assert (tmp_path / "captions" / "text").is_dir() and (tmp_path / "dit" / "codec").is_dir()
