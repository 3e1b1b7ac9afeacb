"""Several processes: who joins a cluster, what they hold of an array, and sampling, whose pictures are those of one."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from t2i_jax import cli
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core import platform
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import start_cluster
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.storage.artifacts import Artifact, save_artifact
from tests.fixtures.placing import SIZE, grown
from tests.fixtures.processes import outputs, started


@pytest.mark.parametrize(
    ("about", "joins"),
    [
        ({}, False),
        ({"T2I_CLUSTER": "1"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # the shell of an allocation
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # the same, as newer Slurms start it
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
    ],
)
def test_a_process_joins_others_where_there_are_some(monkeypatch, about, joins):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: called.append((a, k)))
    monkeypatch.setattr(os, "environ", about)
    start_cluster()
    assert [k for _, k in called] == [{"heartbeat_timeout_seconds": 100}] * joins


def test_commands_that_are_no_work_of_several_join_nobody(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(platform, "prepare", lambda join: asked.append(join))
    alone = (["plan", "--help"], ["train", "--help"], ["convert", "--help"], ["bench", "solvers", "--odd"])
    for words in (*alone, ["sample"], ["bench", "train"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    assert asked == [False] * len(alone) + [True, True]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"T2I_CLUSTER": "1"}, "T2I_CLUSTER=1 asks for a cluster"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "must be set too"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_clear_line(about, message):
    command = [sys.executable, "-m", "t2i_jax.cli", "train", "nothing.py"]
    done = subprocess.run(command, env=os.environ | about, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A family and its codec, as they are born."""
    path = tmp_path_factory.mktemp("released")
    parts = AutoencoderConfig(8, (1, 2), blocks=1, latent=4, attention=(), middle_attention=False, groups=4)
    codec = VQGAN(parts, QuantizerConfig(codes=16, dim=4), perceptual=0.0)
    save_artifact(Artifact(codec, codec.init(jax.random.key(0))), path / "codec", "# A codec\n")
    family = with_fields(AR(), vocabulary=16, grid=(4, 4), width=32, depth=1, heads=2, condition=ClassEmbedder(4))
    model = family.init(jax.random.key(1))
    save_artifact(Artifact(family, model, codec=str(path / "codec"), image_size=8), path / "model", "# A model\n")
    return path / "model"


def sample(released, out, count, devices):
    """`t2i sample` in several processes."""
    command = ["-m", "t2i_jax.cli", "sample", released, "1", "3", "--count", "5", "--out", out]
    outputs(started(command, count, devices))
    return [np.asarray(Image.open(file)) for file in sorted(out.glob("0*.png"))]


@pytest.mark.slow
def test_several_processes_draw_the_pictures_of_one(released, tmp_path):
    one = sample(released, tmp_path / "one", 1, 1)
    assert len(one) == 10
    for count, devices in ((2, 2), (4, 1)):
        several = sample(released, tmp_path / str(count), count, devices)
        np.testing.assert_allclose(several, one, atol=1)
        assert (tmp_path / str(count) / "grid.png").exists()


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_host_array_costs_a_process_its_own_part(count):
    """Placing it takes no copy of what other processes hold: `jax.device_put` takes more than 4 times the array."""
    assert grown(count, "placed") < 2 * SIZE / count
