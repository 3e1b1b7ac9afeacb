"""The trainer: what a run computes depends on its config alone, not on the mesh, on restarts or on how it is cut."""

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.core.config import ConfigError, to_json
from t2i_jax.core.params import named, rebuild
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.core.types import LossOutput
from t2i_jax.data import Data, Folder
from t2i_jax.data.records import DataError
from t2i_jax.storage import checkpoints
from t2i_jax.storage.checkpoints import CheckpointError
from t2i_jax.storage.checksums import checksums
from t2i_jax.training import records
from t2i_jax.training.guard import NotFinite
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.runs import same, stop_after

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]


class Unsplit(toys.Numbers):
    """Like pictures of one folder, which are all for training."""

    def check_split(self, split):
        Data(Folder("pictures")).check_split(split)


def curve(folder):
    return {line["step"]: line["loss"] for line in records.read(folder / "metrics.jsonl")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return train(toys.experiment(), folder), folder


def test_loss_falls_and_metrics_are_written(straight):
    state, folder = straight
    losses = curve(folder)
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    assert int(state.carried["seen"][...]) == 6
    assert list((folder / "tensorboard").iterdir())


def test_a_step_is_traced_once_for_all_steps(tmp_path, traces):
    train(toys.experiment(), tmp_path)
    assert traces["step"] == 1


def test_a_run_that_goes_on_equals_one_that_never_stopped(straight, tmp_path):
    experiment = toys.experiment()
    stopped = stop_after(experiment, tmp_path, 3)
    assert int(stopped.step) == 3
    state = train(experiment, tmp_path)
    same(state, straight[0])
    assert curve(tmp_path) == curve(straight[1])


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_every_mesh_gives_the_same_run(straight, tmp_path, mesh):
    state = train(toys.experiment(mesh=MeshConfig(*mesh)), tmp_path)
    same(state, straight[0], 1e-5)


@pytest.mark.parametrize("after", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (8, 1, 1)])
def test_a_run_goes_on_on_another_mesh(straight, tmp_path, after):
    stop_after(toys.experiment(mesh=MeshConfig(1, 4, 2)), tmp_path, 3)
    state = train(toys.experiment(mesh=MeshConfig(*after)), tmp_path)
    same(state, straight[0], 1e-5)


def test_moments_and_average_lie_as_the_parameters_do(tmp_path):
    trainer = Trainer(toys.experiment(mesh=MeshConfig(1, 4, 2)), tmp_path)
    state = trainer.start()
    for _ in range(2):
        expected = {v.shape: v[...].sharding for v in state.params.values()}
        assert any(not s.is_fully_replicated for s in expected.values())
        moments = [v for v in jax.tree.leaves(state.optimizer) if v.ndim > 1]
        assert moments
        for v in [*moments, *[a[...] for a in state.ema.values()]]:
            assert v.sharding == expected[v.shape], (v.shape, v.sharding)
        with jax.set_mesh(trainer.mesh):
            state, _ = trainer.step(state, trainer.frozen, next(trainer.batches(0)))


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    model, plain = toys.Identity(noise=0.0), Optimizer("sgd", learning_rate=0.1)
    settings = {"optimizer": plain, "mesh": MeshConfig(4)}
    whole = train(toys.experiment(model, **settings), tmp_path / "whole")
    parts = train(toys.experiment(model, accumulate=4, **settings), tmp_path / "parts")
    assert int(parts.carried["seen"][...]) == 24
    for k, v in whole.params.items():
        np.testing.assert_allclose(v[...], parts.params[k][...], rtol=1e-5, atol=1e-6)


def test_objectives_move_only_their_parameters(tmp_path):
    experiment = toys.experiment(toys.Game(), steps=1, optimizers={"critic": Optimizer("sgd", learning_rate=0.0)})
    trainer = Trainer(experiment, tmp_path)
    before = jax.device_get({k: v[...] for k, v in trainer.start().params.items()})
    after = train(experiment, tmp_path)
    moved = {k for k, v in after.params.items() if not np.array_equal(v[...], before[k])}
    assert moved == {"artist.w", "artist.b"}
    assert set(after.optimizer) == {"artist", "critic"}
    line = records.read(tmp_path / "metrics.jsonl")[-1]
    assert "artist/loss" in line and "critic/gradient_norm" in line


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon"])
def test_optimisers_by_name(name, tmp_path):
    experiment = toys.experiment(toys.Identity(noise=0.0), optimizer=Optimizer(name, learning_rate=1e-2), steps=4)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(1, 4, 2))
    train(experiment, tmp_path)
    assert curve(tmp_path)[4] < curve(tmp_path)[1]


def test_unknown_optimiser_and_option_name_the_nearest():
    with pytest.raises(ConfigError, match="adamw|adam"):
        Optimizer("adamW2").build(10)
    with pytest.raises(ConfigError, match="eps_root"):
        Optimizer(options={"epsroot": 1.0}).build(10)


def test_schedules_start_low_and_end_where_they_should():
    for schedule, last in (("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)):
        rate = Optimizer(learning_rate=1.0, schedule=schedule, warmup=10).learning_rates(100)
        assert rate(0) == pytest.approx(0.1) and rate(10) == pytest.approx(1.0) and rate(100) == pytest.approx(last)


def test_the_guard_names_the_step_and_the_layer(tmp_path):
    trainer = Trainer(toys.experiment(), tmp_path)
    state = trainer.start()
    broken = state.params["layers.w"].replace(state.params["layers.w"][...].at[1, 0, 0].set(jnp.nan))
    state = dataclasses.replace(state, params=state.params | {"layers.w": broken})
    writer = checkpoints.Checkpoints(tmp_path / "checkpoints")
    writer.finish(state, 16, 1)
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps(to_json(toys.experiment())))
    with pytest.raises(NotFinite, match=r"step 1(.|\n)*layers\.w\[layer 1\]"):
        train(toys.experiment(), tmp_path)


@dataclasses.dataclass(frozen=True)
class Logarithm(toys.Identity):
    def loss(self, model, batch, key, train=True):
        return LossOutput(jnp.mean(jnp.log(model(batch["x"]))), {})


def test_the_guard_finds_the_operation(tmp_path):
    with pytest.raises(NotFinite, match=r"step 1(.|\n)*log"):
        train(toys.experiment(Logarithm(), tolerate=0), tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_finished_run_can_be_made_longer(tmp_path, schedule):
    optimizer = Optimizer(learning_rate=0.01, warmup=2, schedule=schedule)
    whole = train(toys.experiment(optimizer=optimizer), tmp_path / "whole")
    train(toys.experiment(optimizer=optimizer, steps=2), tmp_path / "parts")
    same(train(toys.experiment(optimizer=optimizer), tmp_path / "parts"), whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_another_model_is_refused_by_array_name(straight):
    _, folder = straight
    kept, other = (folder / "config.json").read_text(), toys.experiment(toys.Identity(depth=2))
    (folder / "config.json").write_text(json.dumps(to_json(other)))
    try:
        with pytest.raises(ConfigError, match=r"layers\.w: saved .*3, 8, 8.* wanted .*2, 8, 8"):
            train(other, folder)
    finally:
        (folder / "config.json").write_text(kept)


def damage(step: Path, how: str) -> None:
    """Cut the files of a checkpoint's arrays short, or turn one bit in the middle of each."""
    for file in (step / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 1 << 4
        file.write_bytes(content[:middle] if how == "cut" else content)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, straight, capsys, how):
    shutil.copytree(straight[1], tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "6", how)
    state = train(toys.experiment(), tmp_path / "run")
    printed = capsys.readouterr().err
    assert "passed over" in printed and "checkpoints/6" in printed and "going on from step 3" in printed
    same(state, straight[0])
    assert len(list((tmp_path / "run" / "checkpoints").glob("damaged-6-*"))) == 1


def test_no_readable_checkpoint_is_an_error_that_lists_them(tmp_path, straight):
    shutil.copytree(straight[1], tmp_path / "run")
    for step in ("3", "6"):
        damage(tmp_path / "run" / "checkpoints" / step, "cut")
    with pytest.raises(CheckpointError, match="no checkpoint can be read(.|\n)*checkpoints/6(.|\n)*checkpoints/3"):
        train(toys.experiment(), tmp_path / "run")


def test_bytes_that_are_not_those_that_were_written_are_named(tmp_path, straight, capsys):
    """What no reader can see: the files are whole, one number in them is another."""
    state, trainer = straight[0], Trainer(toys.experiment(), tmp_path)
    w = state.params["layers.w"]
    other = state.params | {"layers.w": w.replace(w[...].at[1, 2, 3].multiply(1 + 2**-20))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "checksums", lambda _: checksums(state.flat()))
        writer = checkpoints.Checkpoints(tmp_path / "checkpoints")
        writer.finish(dataclasses.replace(state, params=other), 16, 1)
    with pytest.raises(CheckpointError, match=r"the bytes of params/layers\.w are not those"):
        writer.arrays("params/", 1)
    with pytest.raises(CheckpointError, match=r"the bytes of params/layers\.w are not those"):
        writer.restore(trainer.target)
    writer.close()


def test_a_description_that_was_changed_is_found(tmp_path, straight):
    shutil.copytree(straight[1] / "checkpoints", tmp_path / "c")
    file = tmp_path / "c" / "6" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"position": 96', '"position": 97'))
    reader = checkpoints.Checkpoints(tmp_path / "c")
    with jax.set_mesh((trainer := Trainer(toys.experiment(), tmp_path)).mesh):
        found = reader.restore(trainer.target)
    assert found and found[1] == 48
    reader.close()


def test_checksums_see_every_bit_and_place_and_no_mesh():
    rng = np.random.default_rng(0)
    arrays = {"f": rng.normal(size=(8, 6)).astype(np.float32), "h": rng.normal(size=(16,)).astype(jnp.bfloat16)}
    arrays |= {"i": np.arange(5), "b": np.arange(7) % 2 == 0, "s": np.float32(2)}
    arrays = {k: jnp.asarray(v) for k, v in arrays.items()}
    whole = checksums(arrays)
    for bit in range(32):
        bits = np.asarray(arrays["f"]).view(np.uint32).copy()
        bits[3, 4] ^= np.uint32(1 << bit)
        assert checksums({"f": jnp.asarray(bits.view(np.float32))})["f"] != whole["f"]
    assert checksums({"f": arrays["f"][::-1]})["f"] != whole["f"]
    mesh = MeshConfig(2, 2, 2).build()
    split = {k: P("fsdp", "tensor") if k == "f" else P("data") if k == "h" else P() for k in arrays}
    with jax.set_mesh(mesh):
        assert checksums({k: jax.device_put(v, NamedSharding(mesh, split[k])) for k, v in arrays.items()}) == whole


class Storage:
    """Fails the first writes of a run as a full disk would: no file may grow beyond a few bytes while they last."""

    def __init__(self, monkeypatch, failures):
        self.failures, self.tries, begin = failures, [], ocp.CheckpointManager.save

        def save(manager, step, **arguments):
            self.tries.append(step)
            small = len(self.tries) <= self.failures
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if small else self.limit, resource.RLIM_INFINITY))
            return begin(manager, step, **arguments)

        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        monkeypatch.setattr(ocp.CheckpointManager, "save", save)


@pytest.fixture
def storage(monkeypatch):
    made = []
    yield lambda failures: made.append(Storage(monkeypatch, failures)) or made[-1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (made[-1].limit, resource.RLIM_INFINITY))


WIDE = {"model": toys.Identity(width=64), "data": toys.Numbers(width=64)}


def test_a_write_that_failed_is_tried_again(tmp_path, storage, capsys):
    failing = storage(2)
    state = train(toys.experiment(**WIDE, save_every=2, steps=8, save_backoff=0.0), tmp_path)
    printed = capsys.readouterr().err
    assert "step 2 could not be written" in printed and "try 1 of 3" in printed and "try 2 of 3" in printed, printed
    assert failing.tries[0] == 2 and len(failing.tries) >= 4 and failing.tries[-1] == 8
    reader = checkpoints.Checkpoints(tmp_path / "checkpoints")
    assert 2 not in reader.steps() and 8 in reader.steps()
    np.testing.assert_array_equal(reader.arrays("params/")["layers.w"], state.params["layers.w"][...])
    reader.close()


def test_storage_that_always_fails_ends_in_an_error_and_harms_nothing(tmp_path, storage, capsys):
    constant = Optimizer(schedule="constant")
    experiment = toys.experiment(**WIDE, save_every=2, steps=2, save_retries=2, save_backoff=0.01, optimizer=constant)
    train(experiment, tmp_path)
    failing = storage(100)
    longer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=4))
    with pytest.raises(CheckpointError, match=r"could not be written.*the last good one is .*checkpoints/2\. "):
        train(longer, tmp_path)
    assert len(failing.tries) == 3 and "try 2 of 2" in capsys.readouterr().err
    reader = checkpoints.Checkpoints(tmp_path / "checkpoints")
    assert reader.steps() == [2] and reader.arrays("params/")
    reader.close()


def test_metrics_survive_a_line_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    writer = records.Records(tmp_path, 1)
    writer.write(2, {"loss": float("nan")})
    writer.close()
    assert records.read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]


def test_held_out_data_that_are_missing_are_missed_before_the_first_step(tmp_path):
    """And not when the first evaluation is due, after hours."""
    data = Unsplit()
    with pytest.raises(DataError, match="Folder has no splits"):
        train(toys.experiment(data=data, evaluate_every=4), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and not curve(tmp_path / "run")
    train(toys.experiment(data=data), tmp_path / "never")  # evaluates nothing


def test_batch_that_the_mesh_cannot_split_is_named(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 6"):
        Trainer(toys.experiment(data=toys.Numbers(6), mesh=MeshConfig(8)), tmp_path)


def test_rebuild_is_the_inverse_of_named(tmp_path):
    model = toys.Identity().init(jax.random.key(0))
    again = rebuild(model, named(model))
    assert isinstance(again.layers.w, nnx.Param)
    chex.assert_trees_all_equal(again, model)


def test_resolved_config_is_written(straight):
    config = json.loads((straight[1] / "config.json").read_text())
    assert config["train"]["steps"] == 6 and config["model"]["type"].endswith("Identity")
