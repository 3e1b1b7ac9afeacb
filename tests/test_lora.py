"""Adapters: what they train, what they leave, and that they are the same merged and apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t2i_jax.core.config import ConfigError
from t2i_jax.core.params import abstract, named
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.nn.layers import Conv, Fixed, Linear, LowRank, ModelState, matmul, param
from t2i_jax.nn.lora import LoRA, adapted, merged, with_masks
from t2i_jax.release import release
from t2i_jax.storage.adapters import FILE, read_adapter
from t2i_jax.storage.artifacts import Artifact, load_artifact, save_artifact
from t2i_jax.training import trainer as trainer_module
from t2i_jax.training.loop import train
from t2i_jax.training.start import read_start
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.families import ALL, FAMILIES, batch_for, fresh, losses_of
from tests.fixtures.runs import same, stop_after

KERNELS = LoRA(2, targets=(r"\.w$",))


def lora_for(name):
    """Adapters of linear layers, or of kernels where a model has nothing else."""
    try:
        LoRA(2).adapts(named(abstract(ALL[name])))
    except ConfigError:
        return KERNELS
    return LoRA(2)


@pytest.mark.parametrize("name", [name for name in ALL if name != "clusters"])
def test_every_family_can_be_adapted(name):
    config, lora = ALL[name], lora_for(name)
    shape = jax.eval_shape(lambda key: adapted(config.init(key), lora, key), jax.random.key(0))
    trained = [k for k, v in named(shape).items() if isinstance(v, nnx.Param)]
    assert trained and all(k.endswith((".a", ".b")) for k in trained)
    back = jax.eval_shape(merged, shape)
    plain = abstract(config)
    assert {k: (v.shape, type(v)) for k, v in named(back).items()} == {
        k: (v.shape, type(v)) for k, v in named(plain).items()
    }
    assert jax.tree.structure(back) == jax.tree.structure(plain)


def losses_at(config, model, train):
    """The losses of a config at a model, by objective."""
    each = lambda m, batch: losses_of(config, m, batch, jax.random.key(3), 0, train).items()
    return jax.jit(lambda m, batch: {k: o.loss for k, o in each(m, batch)})(model, batch_for(config))


def differs(name):
    """A model with adapters that change it, and the same merged."""
    model = adapted(fresh(ALL[name]), lora_for(name), jax.random.key(1))
    fill = lambda v: with_another_b(v) if isinstance(v, LowRank) else v
    model = jax.tree.map(fill, model, is_leaf=lambda v: isinstance(v, LowRank))
    return model, merged(model)


def with_another_b(v):
    copy = jax.tree.map(lambda x: x, v)
    copy.b = param(0.3 * jax.random.normal(jax.random.key(2), v.b.shape), *v.b.get_metadata()["axes"])
    return copy


CHEAP = ["ar", "stream", "masked-diffusion", "dit", "unet", "gan", "kl"]
EACH = [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in ALL if name != "clusters"]


@pytest.mark.parametrize("name", EACH)
def test_merged_is_unmerged(name):
    config, (apart, whole) = ALL[name], differs(name)
    a, b = losses_at(config, apart, False), losses_at(config, whole, False)
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHEAP[:4])
def test_fresh_adapters_change_nothing(name):
    config, model = ALL[name], fresh(ALL[name])
    a, b = (losses_at(config, m, True) for m in (adapted(model, lora_for(name), jax.random.key(1)), model))
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, merged(adapted(model, lora_for(name), jax.random.key(1))), model)


def test_a_product_is_the_merged_product():
    layer = Linear(6, 4, jax.random.key(0))
    w = LowRank(layer.w, 3, 0.5, 0.0, jax.random.key(1))
    w.b = param(jnp.ones((3, 4)), None, "mlp")
    x = jax.random.normal(jax.random.key(2), (5, 6))
    np.testing.assert_allclose(matmul(x, w), x @ w[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w[...], layer.w[...] + 0.5 * w.a[...].sum(1, keepdims=True), rtol=1e-6)


def test_a_kernel_has_one_b_for_all_pixels():
    layer = Conv(3, 5, jax.random.key(0))
    w = LowRank(layer.w, 2, 1.0, 0.0, jax.random.key(1))
    assert w.a.shape == (3, 3, 3, 2) and w.b.shape == (2, 5) and w[...].shape == layer.w.shape


def test_dropout_drops_other_inputs_each_step_and_none_when_merged():
    layer = Linear(64, 8, jax.random.key(0))
    module = adapted(layer, LoRA(4, dropout=0.5, targets=("^w$",)), jax.random.key(1))
    module.w.b = param(jnp.ones((4, 8)), None, "mlp")
    x = jnp.ones((3, 64))
    draws = jax.vmap(lambda key: with_masks(module, key)(x))(jax.random.split(jax.random.key(2), 400))
    assert jnp.std(draws, 0).min() > 0.1
    np.testing.assert_allclose(draws.mean(0), merged(module)(x), atol=0.15)
    np.testing.assert_allclose(module(x), merged(module)(x), rtol=1e-4, atol=1e-5)


def begun(tmp_path, **train_fields):
    """A run of adapters of a toy that was trained before."""
    if not (tmp_path / "base").exists():
        train(toys.experiment(steps=3, ema=0.5), tmp_path / "base")
    fields = {"steps": 4, "lora": LoRA(2), "start": str(tmp_path / "base")} | train_fields
    return toys.experiment(**fields)


def test_a_run_trains_adapters_alone(tmp_path):
    experiment = begun(tmp_path)
    state = train(experiment, tmp_path / "run")
    assert set(state.params) == {"layers.w.a", "layers.w.b"} and np.any(state.params["layers.w.b"][...])
    moments = [k for k in state.flat() if k.startswith("optimizer") and "layers" in k]
    assert moments and all(k.split("layers.w")[-1][:2] in (".a", ".b") for k in moments)
    base, model = load_artifact(tmp_path / "base").model, load_artifact(tmp_path / "run").model
    np.testing.assert_array_equal(model.layers.b[...], base.layers.b[...])
    a, b = state.ema["layers.w.a"][...], state.ema["layers.w.b"][...]
    np.testing.assert_allclose(model.layers.w[...], base.layers.w[...] + 4 * (a @ b), rtol=1e-5, atol=1e-6)
    trainer = Trainer(experiment, tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), trainer.model(state), model)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    experiment = begun(tmp_path, lora=LoRA(2, dropout=0.3))
    whole = train(experiment, tmp_path / "whole")
    stop_after(experiment, tmp_path / "parts", 2)
    same(train(experiment, tmp_path / "parts"), whole)


def test_a_run_on_a_mesh_is_that_of_one_device(tmp_path):
    one = train(begun(tmp_path), tmp_path / "one")
    several = train(dataclasses.replace(begun(tmp_path), mesh=MeshConfig(2, 2, 2)), tmp_path / "several")
    same(several, one, 1e-5)


def test_the_first_loss_is_that_of_the_model_that_it_adapts(tmp_path):
    base, adapter = begun(tmp_path, lora=LoRA()), begun(tmp_path)
    losses = []
    for n, experiment in enumerate((base, adapter)):
        trainer = Trainer(experiment, tmp_path / str(n))
        losses.append(trainer.evaluate(trainer.start(trainer.begin()))["val/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_is_trained_whole(tmp_path):
    state = train(begun(tmp_path, lora=LoRA(2, whole=("layers.b",))), tmp_path / "run")
    assert set(state.params) == {"layers.w.a", "layers.w.b", "layers.b"}
    base, model = load_artifact(tmp_path / "base").model, load_artifact(tmp_path / "run").model
    assert np.any(model.layers.b[...] != base.layers.b[...])
    np.testing.assert_array_equal(model.layers.b[...], state.ema["layers.b"][...])


def test_released_adapters_and_factors(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        train(begun(tmp_path, seed=seed), tmp_path / name)
        release(tmp_path / name, tmp_path / f"{name}_released")
    release(tmp_path / "one", tmp_path / "merged", merge=True)
    files = {path.name for path in (tmp_path / "one_released").iterdir()}
    assert files == {FILE, "config.json", "README.md"}
    base = load_artifact(tmp_path / "base").model.layers.w[...]
    added = {name: load_artifact(tmp_path / name).model.layers.w[...] - base for name in ("one", "two")}
    read = {name: read_adapter(tmp_path / f"{name}_released") for name in added}

    def loaded(**factors):
        lora = [(read[name], factor) for name, factor in factors.items()]
        return load_artifact(tmp_path / "base", lora=lora).model.layers.w[...]

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(loaded(one=0.0), base)
    close(loaded(one=1.0), base + added["one"])
    close(loaded(one=0.5, two=-1.0), base + 0.5 * added["one"] - added["two"])
    close(load_artifact(tmp_path / "merged").model.layers.w[...], base + added["one"])
    np.testing.assert_array_equal(read_adapter(tmp_path / "one").arrays["layers.w.b"], read["one"].arrays["layers.w.b"])


def test_adapters_are_added_on_a_mesh_as_on_the_host(tmp_path):
    train(begun(tmp_path), tmp_path / "run")
    lora, mesh = [(read_adapter(tmp_path / "run"), 0.5)], MeshConfig(2, 2, 2).build()
    for folder, more in (("base", {"lora": lora}), ("run", {})):
        host, there = (load_artifact(tmp_path / folder, mesh=m, **more).model for m in (None, mesh))
        assert len(there.layers.w[...].sharding.device_set) == 8 and not there.layers.w[...].is_fully_replicated
        np.testing.assert_allclose(there.layers.w[...], host.layers.w[...], rtol=1e-6)


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.lora adapts a model that is there: set train\.start"):
        toys.experiment(lora=LoRA(4))
    with pytest.raises(ConfigError, match="finds no matrix of this model; it has layers.w"):
        Trainer(begun(tmp_path, lora=LoRA(2, targets=("attention",))), tmp_path / "run")
    with pytest.raises(ConfigError, match="is no regular expression"):
        LoRA(targets=("(",))
    with pytest.raises(ConfigError, match="holds no adapters"):
        read_adapter(tmp_path / "base")
    with pytest.raises(ConfigError, match="--merge is for a run with train.lora"):
        release(tmp_path / "base", tmp_path / "out", merge=True)
    train(begun(tmp_path), tmp_path / "run")
    with pytest.raises(ConfigError, match="--scale is of a codec"):
        release(tmp_path / "run", tmp_path / "out", scale=True)
    release(tmp_path / "run", tmp_path / "released")
    with pytest.raises(ConfigError, match="holds adapters alone"):
        load_artifact(tmp_path / "released")
    save_artifact(Artifact(FAMILIES["ar"], fresh(FAMILIES["ar"])), tmp_path / "other", "a card")
    with pytest.raises(ConfigError, match="adapters are of another model: theirs has layers.w"):
        load_artifact(tmp_path / "other", lora=[(read_adapter(tmp_path / "released"), 1.0)])
    deeper = dataclasses.replace(begun(tmp_path), model=toys.Identity(depth=4))
    with pytest.raises(ConfigError, match=r"adapters do not train them: name them in train\.lora\.whole"):
        Trainer(deeper, tmp_path / "deeper")


def test_fixed_parameters_are_no_parameters():
    model = adapted(fresh(FAMILIES["dit"]), LoRA(2, targets=("attention",)), jax.random.key(0))
    kinds = {k: type(v) for k, v in named(model).items()}
    trained = {k for k, kind in kinds.items() if kind is nnx.Param}
    assert trained == {k for k in kinds if "attention" in k and k.endswith((".w.a", ".w.b"))}
    assert set(kinds.values()) == {nnx.Param, Fixed, ModelState}


def test_a_start_that_is_gone_or_has_changed_is_said(tmp_path, capsys, caplog):
    experiment = begun(tmp_path)
    train(experiment, tmp_path / "run")
    load_artifact(tmp_path / "run")
    assert "its adapters are of" not in caplog.text
    train(toys.experiment(steps=4, ema=0.5), tmp_path / "base")
    load_artifact(tmp_path / "run")
    said = f"its adapters are of step 3 of {tmp_path / 'base'}, which is at step 4 now"
    assert said in caplog.text
    train(dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=5)), tmp_path / "run")
    assert said in " ".join(capsys.readouterr().err.split())
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="run: holds adapters of .*base, its train.start, where there is no model"):
        load_artifact(tmp_path / "run")
    assert load_artifact(tmp_path / "moved", lora=[(read_adapter(tmp_path / "run"), 1.0)]).step == 4


def test_a_run_does_not_begin_with_itself(tmp_path):
    train(begun(tmp_path), tmp_path / "run")
    with pytest.raises(ConfigError, match="is the folder of this run"):
        train(begun(tmp_path, steps=5, start=str(tmp_path / "run")), tmp_path / "run", accept_changes=True)


def test_a_path_that_is_trained_whole_is_there(tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.whole: no parameter is 'layer', or under it; there are layers\.b"):
        Trainer(begun(tmp_path, lora=LoRA(2, whole=("layer",))), tmp_path / "run")


def test_weights_that_do_not_change_are_on_the_devices_once(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(trainer_module, "read_start", lambda *given: found.append(read_start(*given)) or found[-1])
    trainer = Trainer(begun(tmp_path, lora=LoRA(2, whole=("layers.b",))), tmp_path / "run")
    assert {k for k, v in found[0].values.items() if v.is_deleted()} == {"layers.w"}
    assert set(trainer.begun.values) == {"layers.b", "seen"}


def test_the_flops_of_a_step_leave_out_gradients_of_what_does_not_change(tmp_path):
    experiment = begun(tmp_path, lora=LoRA(1))
    whole = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, lora=LoRA()))
    counts = []
    for number, e in enumerate((whole, experiment)):
        trainer = Trainer(e, tmp_path / str(number))
        batches = trainer.batches(0)
        counts.append(trainer.flops(next(batches)))
        batches.close()
    width = e.model.width
    assert counts[1] / counts[0] == pytest.approx(2 / 3 * (1 + 2 / width), rel=0.2)
