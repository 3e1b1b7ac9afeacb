"""What can happen to a run: kill -9, a full disk, signals, other process counts. The command is run as users do."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from t2i_jax.core.params import named
from t2i_jax.data.records import write_records
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.training import records
from tests.fixtures.processes import started

CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer
experiment = Experiment(
    with_fields(AR(16, (4, 4)), width=32, depth=2, heads=2, condition=ClassEmbedder(4)),
    Data(ArrayRecord("{data}"), batch_size=16),
    Train(steps=24, optimizer=Optimizer(learning_rate=1e-3, warmup=4), ema=0.9, log_every=1, save_every=3,
          evaluate_every=0, preview_every=0),
    MeshConfig(*{mesh}),
)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A data set of codes, and a function that runs `t2i train` on it."""
    folder = tmp_path_factory.mktemp("faults")
    rng = np.random.default_rng(0)
    rows = (
        {"codes": rng.integers(0, 16, (4, 4)).astype(np.uint16), "label": i % 4, "captions": [], "key": str(i)}
        for i in range(64)
    )
    write_records(folder / "data", rows)

    def start(run, mesh=(1, 1, 1), devices=1, env=None, limit=None, arguments=(), count=1):
        config = folder / f"config{''.join(map(str, mesh))}.py"
        config.write_text(CONFIG.format(data=folder / "data", mesh=mesh))
        command = ["-m", "t2i_jax.cli", "train", str(config), "--run", str(folder / run), *arguments]
        if limit:  # no file may grow beyond it: the same error path as a disk that is full
            small = f"import os, resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, {limit})); "
            command = ["-c", f"{small}os.execv({sys.executable!r}, {[sys.executable, *command]!r})"]
        return started(command, count, devices, env)

    def finish(run, **options):
        (process,) = start(run, **options)
        output = process.communicate(timeout=900)[0]
        return process.returncode, output

    status, output = finish("straight")
    assert status == 0, output
    return folder, start, finish


def curve(folder):
    return {line["step"]: line["loss"] for line in records.read(folder / "metrics.jsonl")}


def same(a: Path, b: Path, tolerance=0.0):
    np.testing.assert_allclose(list(curve(a).values()), list(curve(b).values()), rtol=tolerance)
    assert list(curve(a)) == list(curve(b))
    one, other = load_artifact(a), load_artifact(b)
    x, y = named(one.model), named(other.model)
    assert one.step == other.step and x.keys() == y.keys()
    for name in x:
        np.testing.assert_allclose(x[name][...], y[name][...], rtol=tolerance, atol=tolerance, err_msg=name)


def kill_at(process, run: Path, when: random.Random):
    """Kill -9 at a random moment: at some step, or as soon as a checkpoint is being written."""
    checkpoints = run / "checkpoints"
    inside_write = when.random() < 0.5
    target = (max(curve(run), default=0)) + when.randint(1, 8)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        writing = checkpoints.exists() and any("tmp" in p.name for p in checkpoints.iterdir())
        if (inside_write and writing) or (not inside_write and max(curve(run), default=0) >= target):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kills", [2, pytest.param(int(os.environ.get("T2I_KILLS", "20")), marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_changes_nothing(room, kills):
    folder, start, finish = room
    when, run = random.Random(kills), folder / f"killed{kills}"
    for kill in range(kills):
        kill_at(*start(run.name), run, when)
        print(f"kill {kill + 1} of {kills}: {run.name}, step {max(curve(run), default=0)}")
        if max(curve(run), default=0) >= 22:  # begin anew: a finished run cannot be killed
            status, output = finish(run.name)
            assert status == 0, output
            same(folder / "straight", run)
            run = folder / f"{run.name}+"
    status, output = finish(run.name)
    assert status == 0, output
    same(folder / "straight", run)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(room, number):
    folder, start, finish = room
    run = folder / f"signal{int(number)}"
    (process,) = start(run.name)
    while process.poll() is None and max(curve(run), default=0) < 2:
        time.sleep(0.005)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number and "goes on from here" in output, output
    assert "Traceback" not in output
    assert finish(run.name)[0] == 0
    same(folder / "straight", run)


def test_a_full_disk_is_said_and_harms_nothing(room):
    folder, _, finish = room
    run = "full"
    assert finish(run, arguments=["--train.steps=24", "--train.save-every=9"])[0] == 0
    for step in ("24", "18"):
        (folder / run / "checkpoints" / step).rename(folder / f"aside{step}")
    env = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    tries = ["--train.save-retries=1", "--train.save-backoff=0.1"]
    status, output = finish(run, limit=40_000, env=env, arguments=tries)
    assert "try 1 of 1" in output, output
    assert status == 2 and "could not be written" in output and "checkpoints/9" in output, output
    assert "could not be written" in output.strip().splitlines()[-1] and "Traceback" not in output, output
    status, output = finish(run)
    assert status == 0 and "going on from step 9" in output, output
    same(folder / "straight", folder / run)


def cluster(start, run, count, mesh=(2, 2, 2), devices=8, **options):
    """`count` processes on this machine that share the devices, as hosts of a cluster would."""
    return start(run, mesh, devices // count, env={"T2I_HEARTBEAT": "10"}, count=count, **options)


def all_finish(processes):
    for process in processes:
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def one(room):
    """The run of one process with eight devices."""
    folder, _, finish = room
    status, output = finish("one", mesh=(2, 2, 2), devices=8)
    assert status == 0, output
    return folder / "one"


@pytest.mark.slow
def test_two_processes_equal_one(room, one):
    folder, start, _ = room
    all_finish(cluster(start, "two", 2))
    same(one, folder / "two", 1e-5)
    same(folder / "straight", folder / "two", 1e-4)


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_every_process(room):
    """Parameters lie on devices of two processes: each says what is wrong, with the status that is not repeated."""
    _, start, _ = room
    wrong = ["--train.optimizer.learning-rate=1e30", "--train.optimizer.warmup=0", "--train.tolerate=2"]
    processes = cluster(start, "infinite", 2, mesh=(1, 4, 1), devices=4, arguments=wrong)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        printed = [line for line in output.splitlines() if line.startswith("t2i train: ")]
        assert len(printed) == 1 and output.strip().endswith(printed[0]) and "Traceback" not in output, output
        assert re.search(r"step 4: .*gradients that are not finite: .*first operation that made one: ", printed[0]), (
            output
        )


@pytest.mark.slow
def test_two_processes_refuse_another_config_or_go_on_with_it(room):
    folder, start, _ = room
    shutil.copytree(folder / "straight", folder / "other_config")
    other = ["--train.steps=26", "--train.seed=5"]
    for process in cluster(start, "other_config", 2, mesh=(1, 2, 1), devices=2, arguments=other):
        output = process.communicate(timeout=300)[0]
        printed = [line for line in output.splitlines() if line.startswith("t2i train: ")]
        assert process.returncode == 2 and len(printed) == 1 and "Traceback" not in output, output
        assert "train.seed: 0 -> 5. " in printed[0] and "--accept-changes" in printed[0], output
    arguments = [*other, "--accept-changes"]
    processes = cluster(start, "other_config", 2, mesh=(1, 2, 1), devices=2, arguments=arguments)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output.count("after step 24 the learning rate was") for output in outputs] == [1, 0], outputs
    (line,) = records.read(folder / "other_config" / "history.jsonl")
    assert line["step"] == 24 and line["changes"]["train.seed"] == [0, 5] and line["changes"]["train.steps"] == [24, 26]
    assert max(curve(folder / "other_config")) == 26


def test_a_signal_to_one_process_stops_all_at_the_same_step(room):
    """The notice of a preemption reaches the second process alone."""
    folder, start, finish = room
    run = folder / "preempted"
    small = {"mesh": (1, 2, 1), "devices": 2}
    processes = cluster(start, run.name, 2, **small)
    while processes[1].poll() is None and max(curve(run), default=0) < 1:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    steps = [re.findall(r"stopped at step (\d+), saved in", output) for output in outputs]
    assert steps[0] == steps[1] and len(steps[0]) == 1, outputs
    assert max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == int(steps[0][0]) < 24
    status, output = finish(run.name, **small)
    assert status == 0 and f"going on from step {steps[0][0]}" in output, output
    same(folder / "straight", run, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGKILL, 4), (signal.SIGSTOP, 1)])
def test_a_process_that_dies_or_hangs_stops_the_others(room, one, number, after):
    """The rest ends with a message, within the heartbeat and the time that a step may take; another count goes on."""
    folder, start, finish = room
    run = folder / f"lost{int(number)}"
    first, second = cluster(start, run.name, 2, arguments=["--train.stuck-after=60"])
    while first.poll() is None and max(curve(run), default=0) < 7:
        time.sleep(0.005)
    second.send_signal(number)
    began = time.monotonic()
    output = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, 2) and time.monotonic() - began < 100, output
    assert re.search("one of them is gone|another task|nothing was finished|heartbeat", output), output
    second.kill()
    second.communicate()
    if after == 1:
        status, output = finish(run.name, mesh=(2, 2, 2), devices=8)
        assert status == 0 and "going on from step" in output, output
    else:
        all_finish(cluster(start, run.name, after))
    same(one, run, 1e-5)


@pytest.mark.slow
def test_processes_agree_on_a_damaged_checkpoint(room, one):
    """The newest of a run of two processes is cut short; four of them pass over it together."""
    folder, start, _ = room
    all_finish(cluster(start, "hole", 2))
    for file in (folder / "hole" / "checkpoints" / "24" / "state").rglob("ocdbt.process_1/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    four = cluster(start, "hole", 4)
    output = four[0].communicate(timeout=900)[0]
    assert "passed over" in output and "going on from step 21" in output, output
    all_finish(four[1:])
    same(one, folder / "hole", 1e-5)


def test_errors_are_one_clear_line(room):
    folder, _, finish = room
    status, output = finish("straight", arguments=["--train.seed=5"])
    assert status == 2 and "train.seed: 0 -> 5" in output and "Traceback" not in output
    status, output = finish("other", arguments=["--data.source.path=/nowhere"])
    assert status == 2 and "/nowhere" in output and "Traceback" not in output
    config = json.loads((folder / "straight" / "config.json").read_text())
    assert config["train"]["seed"] == 0
