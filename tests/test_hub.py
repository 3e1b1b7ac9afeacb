"""Models of a hub, by the hub's own library against a server on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from tests.fixtures.families import FAMILIES, fresh
from tests.fixtures.hub import hub

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "model"
    save_artifact(
        Artifact(FAMILIES["ar"], fresh(FAMILIES["ar"])), folder, "---\nlibrary_name: t2i_jax\n---\n# a card\n"
    )
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(code, url, home, **more):
    """Python code in a process of its own, whose hub is at `url`: the library reads its settings when imported."""
    env = (
        os.environ
        | {"HF_ENDPOINT": url, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_XET": "1"}
        | more
    )
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_a_released_model_is_pushed_and_read_back(released, tmp_path):
    with hub() as (url, server):
        push = f"from t2i_jax.cli import main; main(['push', {str(released)!r}, 'someone/small', '--private'])"
        done = run(push, url, tmp_path / "home", HF_TOKEN="hf_token")
        assert done.returncode == 0, done.stderr
        assert server.repos["someone/small"] == files(released)
        read = (
            "from t2i_jax.storage.hub import readable; import sys\n"
            "for path in ('hf://someone/small', 'hf://someone/small@v1', 'hf:/someone/small/config.json'):\n"
            "    print(readable(path))"
        )
        done = run(read, url, tmp_path / "other")
        assert done.returncode == 0, done.stderr
        whole, revision, file = done.stdout.split()
        assert file.endswith("config.json") and os.path.isfile(file)
        ours, theirs = load_artifact(released), load_artifact(whole)
        assert ours.config == theirs.config and whole == revision
        np.testing.assert_array_equal(ours.model.tokens.w[...], theirs.model.tokens.w[...])
    # The copy of an earlier call serves without a network.
    done = run(read.replace("'hf://someone/small@v1', ", ""), url, tmp_path / "other", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout.split()[0] == whole, done.stderr


def test_of_two_copies_of_weights_one_is_downloaded(tmp_path):
    names = ("model_index.json", "all.ckpt", "unet/a.safetensors", "unet/a.bin", "unet/a.fp16.safetensors", "vae/b.bin")
    with hub(**{"someone/both": {name: name.encode() for name in names}}) as (url, _):
        code = "from t2i_jax.storage.hub import readable; print(readable('hf://someone/both'))"
        done = run(code, url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert files(Path(done.stdout.strip())).keys() == {"model_index.json", "unet/a.safetensors", "vae/b.bin"}


SAID = {
    "hf://someone/other": "there is no such repository",
    "hf://someone/small@v9": "the repository has no such revision",
    "hf://someone/small/none.safetensors": "the repository has no such file or folder",
    "hf://someone/closed/config.json": "its licence has to be accepted on the hub",
    "hf://small": "a model of a hub is hf://org/name",
}


def test_errors_are_one_line(released, tmp_path):
    with hub(**{"someone/small": files(released), "someone/closed": files(released)}) as (url, server):
        server.closed.add("someone/closed")
        code = (
            "from t2i_jax.core.errors import ConfigError\nfrom t2i_jax.storage.hub import readable\n"
            f"for path in {list(SAID)!r}:\n"
            "    try:\n        readable(path); print('no error')\n"
            "    except ConfigError as error:\n        print(str(error).replace(chr(10), '<newline>'))"
        )
        done = run(code, url, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        for (path, said), line in zip(SAID.items(), done.stdout.splitlines(), strict=True):
            assert line.startswith(path) and said in line, line
        push = f"from t2i_jax.cli import main; main(['push', {str(released)!r}, 'someone/new'])"
        done = run(push, url, tmp_path / "home")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    gone = run(code.replace(str(list(SAID)), "['hf://someone/small']"), url, tmp_path / "empty")
    assert "cannot be reached" in gone.stdout, gone.stdout + gone.stderr
    offline = run(code.replace(str(list(SAID)), "['hf://a/b/c.json']"), url, tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert "no copy of it is here" in offline.stdout, offline.stdout + offline.stderr


def test_what_is_no_released_model_is_not_pushed(tmp_path):
    done = run(
        f"from t2i_jax.cli import main; main(['push', {str(tmp_path)!r}, 'a/b'])", "http://127.0.0.1:9", tmp_path
    )
    assert done.returncode == 2 and "neither a released model nor released adapters" in done.stderr
