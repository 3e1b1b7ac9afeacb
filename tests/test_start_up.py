"""What commands import, and what the first ones compute before they begin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_jax.cli import COMMANDS
from t2i_jax.storage.artifacts import Artifact, save_artifact
from tests.fixtures.families import FAMILIES, fresh

HEAVY = {
    "array_record", "ftfy", "gcsfs", "grain", "h5py", "huggingface_hub", "libtpu", "lxml", "matplotlib", "orbax",
    "pandas", "pyarrow", "s3fs", "scipy", "sentencepiece", "sklearn", "tensorboardX", "tensorflow",
    "tensorflow_datasets", "tensorstore", "tokenizers", "torch", "transformers",
}  # fmt: skip
"""Packages that take long to import, and are no part of every command."""
TRAINING = {"array_record", "grain", "orbax", "tensorstore"}
MEASURING = TRAINING | {"ftfy", "scipy", "tokenizers"}
BRINGS = {
    "fit": MEASURING | {"sentencepiece"},
    "data": TRAINING | {"ftfy", "sentencepiece", "tokenizers"},
    "train": TRAINING | {"tokenizers"},
    "encode": TRAINING | {"ftfy", "tokenizers"},
    "sample": set(),
    "zoo": set(),
    "plot": set(),
    "evaluate": MEASURING,
    "compare": MEASURING,
    "convert": TRAINING | {"ftfy", "tokenizers", "sentencepiece"},
    "release": TRAINING,
    "push": set(),
    "plan": TRAINING,
    "bench": set(),
}
"""Those of them that a command brings before it reads its arguments, at most."""
MODULES = {"sample": 1500, "zoo": 1350, "plot": 1350, "push": 1400, "bench": 1300}
"""Most modules in all, those of JAX and Flax, some 1100, included."""

IMPORTED = """
import os, sys
from t2i_jax.cli import COMMANDS
import jax, flax.nnx
for name in COMMANDS:
    sys.stdout.flush()
    if os.fork() == 0:
        import importlib
        importlib.import_module(f"t2i_jax.cli.{name}")
        print(name, *sorted({m.partition(".")[0] for m in sys.modules}), len(sys.modules))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported():
    """The packages that each command imports, and how many modules."""
    env = {k: v for k, v in os.environ.items() if k != "T2I_CHECK_ARRAYS"}  # which brings what checks arrays
    call = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(call, env=env, check=True, capture_output=True, text=True, timeout=240)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {name: (set(packages), int(count)) for name, *packages, count in rows}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_what_it_needs(name, imported):
    packages, count = imported[name]
    assert packages & HEAVY <= BRINGS[name]
    assert count <= MODULES.get(name, 2400)


def test_the_usage_imports_no_arrays():
    code = "import sys; from t2i_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "usage: t2i COMMAND" in done.stdout and not {"jax", "numpy", "flax", "PIL"} & set(done.stderr.split())


def test_sampling_brings_no_more_than_it_needs(tmp_path):
    """A whole call of `t2i sample`, twice: the second one traces no sampler."""
    pytest.importorskip("flatbuffers")
    config = FAMILIES["gan-spatial"]
    save_artifact(Artifact(config, fresh(config)), tmp_path / "model", "# a card\n")
    code = (
        "import sys, jax; from t2i_jax.cli import main\n"
        "traced = []\n"
        "jax.monitoring.register_event_duration_secs_listener(\n"
        "    lambda event, seconds, fun_name='', **_: traced.append(fun_name) if 'trace' in event else None)\n"
        "main(['sample', 'model', '1', '--out', 'out', '--seed', sys.argv[1]])\n"
        "print(*{m.partition('.')[0] for m in sys.modules}, '#', *traced)"
    )
    paths = os.pathsep.join((str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {
        "PYTHONPATH": paths,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "T2I_PROGRAMS": "on",
        "XLA_FLAGS": "",
    }
    said = []
    for seed in "01":
        done = subprocess.run(
            [sys.executable, "-c", code, seed],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        said.append(done.stdout)
    packages, _, traced = said[1].partition("#")
    assert set(packages.split()) & HEAVY <= {"scipy", *BRINGS["sample"]}  # JAX reads the routines of LAPACK from it
    kept = any((tmp_path / "cache" / "t2i_jax" / "programs").iterdir())
    assert kept and len(traced.split()) < len(said[0].partition("#")[2].split())
