"""Models that retrieve: the search, conditions of neighbours in training and sampling, RDM's files and its sampler."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from t2i_jax.cli import main
from t2i_jax.convert import convert, find, read, restore
from t2i_jax.convert.folders import text_side, to_folder
from t2i_jax.core.config import to_json
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.image_files import read_png_text
from t2i_jax.core.params import named
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.models.vq_diffusion import VQDiffusion
from t2i_jax.networks.condition import CrossAttnFeatures
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.search import EmbeddingTable, nearest
from t2i_jax.noise.discrete import Chain
from t2i_jax.noise.processes import EDM, Discrete, Flow
from t2i_jax.noise.schedule import Schedule
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampler import _sample
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.text.index import read_database
from t2i_jax.text.retrieval import Neighbours, retrieved
from t2i_jax.training.loop import train
from tests.fixtures import toys
from tests.fixtures.clip_files import random_clip
from tests.fixtures.families import FAMILIES, fresh
from tests.fixtures.published_files import abstract, random

RDM = FAMILIES["rdm"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipEmbedding(random_clip(tmp_path_factory.mktemp("clip")))


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)


def test_the_search_is_by_cosine_and_gives_what_is_stored():
    rng = np.random.default_rng(0)
    database, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (20, 3))
    database *= rng.uniform(0.1, 10, (20, 1)).astype(np.float32)
    cosines = queries @ (database / np.linalg.norm(database, axis=1, keepdims=True)).T
    order = np.argsort(-cosines, 1)
    rows, database, queries = database, EmbeddingTable(jnp.asarray(database)), jnp.asarray(queries)
    np.testing.assert_array_equal(nearest(database, queries, 5), order[:, :5])
    program = str(jax.make_jaxpr(lambda q: nearest(database, q, 5))(queries))
    assert "f32[3,1]" in program and "f32[256,1]" not in program  # lengths of queries alone are computed
    found = retrieved(database, queries, 3, skipped=1)
    np.testing.assert_allclose(found[:, 0], queries)
    np.testing.assert_allclose(found[:, 1:], rows[order[:, 1:4]])
    one = retrieved(database, queries, 2, first=False, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(one, axis=-1), np.ones((3, 2)), rtol=1e-5)


def test_databases_are_arrays_and_folders_of_them(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float16)
    np.save(tmp_path / "one.npy", rows)
    many = tmp_path / "parts"
    many.mkdir()
    for n in range(2):
        np.savez(many / f"{n}.npz", embedding=rows[n::2], img_id=np.arange(3))
    np.testing.assert_array_equal(read_database(tmp_path / "one.npy"), rows.astype(np.float32))
    np.testing.assert_array_equal(read_database(many), np.concatenate([rows[::2], rows[1::2]]))
    np.save(tmp_path / "flat.npy", rows[0])
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "other.npz", img_id=rows)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:50])
    cases = {"flat.npy": "floats", "text.npy": "no array", "other.npz": "embedding", "cut.npz": "no array"}
    for name, said in cases.items():
        with pytest.raises(ConfigError, match=said):
            read_database(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no .npz"):
        (tmp_path / "empty").mkdir()
        read_database(tmp_path / "empty")


def test_neighbours_of_images_and_of_captions(clip, tmp_path):
    rows = np.random.default_rng(1).normal(size=(9, 12)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    text = Neighbours(clip, str(tmp_path / "rows.npy"), neighbours=2)
    model, images = jax.tree.map(jnp.asarray, text.load()), jnp.asarray(pictures(3), jnp.float32) / 127.5 - 1
    ids, mask = map(jnp.asarray, text(["a cat", ""]))
    assert mask.tolist() == [[True], [False]] and text.feature_shape == (3, 12) and text.spec.image_features
    drawn = text.features(model, ids, mask)
    rows, raw = EmbeddingTable(jnp.asarray(rows)), model.clip.text.embed(ids)
    np.testing.assert_allclose(drawn, retrieved(rows, raw, 2), rtol=1e-5)
    own = clip.embed_images(model.clip, images)
    assert np.abs(np.linalg.norm(own, axis=-1) - 1).min() > 1e-3  # as the database, not normalised
    seen = text.image_features(model, images)
    np.testing.assert_allclose(seen, retrieved(rows, own, 3, first=False), rtol=1e-5)
    both = dataclasses.replace(text, own=True, skipped=1, normalise=True).image_features(model, images)
    np.testing.assert_allclose(both, retrieved(rows, own, 2, skipped=1, normalise=True), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"\(9, 12\).*10 rows are read"):
        dataclasses.replace(text, neighbours=9).load()
    side = text_side(f"neighbours:{clip.folder},database={tmp_path / 'rows.npy'},neighbours=2,activation=quick_gelu")
    assert side == dataclasses.replace(text, clip=dataclasses.replace(clip, activation="quick_gelu"))
    for words in ("", ",database=nowhere.npy"):
        with pytest.raises(ConfigError, match="database=FILE"):
            text_side(f"neighbours:{clip.folder}{words}")


def test_it_learns_from_images_and_draws_for_captions(clip, tmp_path, capsys):
    """From the command that makes the database to a released model that has it."""
    records = [{"key": str(n), "image": x, "split": "train"} for n, x in enumerate(pictures(8))]
    write_records(tmp_path / "data", records)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=4, batch_size=4)
    text = Neighbours(clip, str(tmp_path / "database"), neighbours=2, skipped=1)
    model = with_fields(RDM, condition=CrossAttnFeatures(12, 3, trained_null=False, zero_null=True), context=12)
    experiment = dataclasses.replace(toys.experiment(model, data, MeshConfig(1, 1, 1), steps=2), text=text)
    (tmp_path / "config.json").write_text(json.dumps(to_json(experiment)))
    main(["data", "neighbours", str(tmp_path / "config.json"), "--out", str(tmp_path / "database")])
    rows = read_database(tmp_path / "database")
    assert rows.shape == (8, 12) and np.abs(np.linalg.norm(rows, axis=1) - 1).min() > 1e-3
    train(experiment, tmp_path / "run")
    pipe = Pipeline.load(tmp_path / "run")
    images = pipe(["a cat", "a cat", "dog"], seeds=[0, 0, 0], steps=7)
    assert (images[0] == images[1]).all() and images.shape == (3, 4, 4, 3)
    # By another database, of dark images, it draws others, and the same by its own; nothing is compiled anew.
    dark = [{"key": str(n), "image": x // 8, "split": "train"} for n, x in enumerate(pictures(6))]
    write_records(tmp_path / "dark", dark)
    source = f"--data.source.path={tmp_path / 'dark'}"
    main(["data", "neighbours", str(tmp_path / "config.json"), "--out", str(tmp_path / "other"), source])
    # Two steps teach it nothing: weights that are moved read the condition.
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), pipe.model)
    rough = dataclasses.replace(pipe, model=moved)
    mine, compiled = rough("dog", seeds=[0], steps=7), _sample._cache_size()
    again, swapped = (rough.with_database(tmp_path / name) for name in ("database", "other"))
    np.testing.assert_array_equal(again("dog", seeds=[0], steps=7), mine)
    assert (swapped("dog", seeds=[0], steps=7) != mine).any() and _sample._cache_size() == compiled
    drawn = ["sample", str(tmp_path / "run"), "dog", "--steps", "7", "--out", str(tmp_path / "drawn")]
    main([*drawn, "--database", str(tmp_path / "other")])
    png = tmp_path / "drawn" / "00000.png"
    np.testing.assert_array_equal(
        np.asarray(Image.open(png)), pipe.with_database(tmp_path / "other")("dog", seeds=[0], steps=7)[0]
    )
    assert read_png_text(png)["database"] == str(tmp_path / "other")
    np.save(tmp_path / "narrow.npy", rows[:, :5])
    for other, said in {"narrow.npy": "12 numbers", "nowhere": "nowhere"}.items():
        with pytest.raises(SystemExit):
            main([*drawn, "--database", str(tmp_path / other)])
        assert said in capsys.readouterr().err
    main(["release", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    released = load_artifact(tmp_path / "model").text
    assert isinstance(released, Neighbours) and str(tmp_path / "model") in released.database
    assert str(tmp_path / "model") in released.clip.folder
    np.testing.assert_array_equal(Pipeline.load(tmp_path / "model")("dog", seeds=[0], steps=7)[0], images[2])


def test_knn_diffusion_is_made_of_the_same_parts():
    """A VQ-Diffusion whose condition is an embedding and its neighbours; dropped rows read zeros."""
    read = CrossAttnFeatures(12, 3, trained_null=False, zero_null=True)
    family = with_fields(VQDiffusion(), chain=Chain(16, 10), grid=(2, 2), width=16, depth=1, heads=2, condition=read)
    model, features = fresh(family), jnp.ones((2, 3, 12))
    tokens = model.condition({"features": features}, jnp.asarray([False, True]))[0]
    np.testing.assert_array_equal(tokens[1], np.zeros((3, 12)))
    np.testing.assert_array_equal(tokens[0], features[0])
    assert "null_features" not in family.condition_spec()
    with pytest.raises(ValueError, match="one kind of unconditional"):
        CrossAttnFeatures(12, 3, zero_null=True)


# ------------------------------------------------------------------------------------------------------- its sampler


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (3, 3), (5, 5), (7, 8), (50, 50), (1000, 999)])
def test_stops_are_those_of_latent_diffusion(steps, count):
    process = Discrete("scaled_linear", ends=(0.0015, 0.0195))
    abar = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    times = np.arange(0, 1000, 1000 // steps) + 1
    times = times[times < 1000]  # the original runs off the end
    path = jax.jit(lambda n: process.timesteps(n, spacing="leading"))(steps)
    assert int(path.steps) == count == len(times)
    np.testing.assert_array_equal(np.asarray(path.t)[:count], times[::-1])
    ends = np.append(abar[times][::-1], abar[0])
    np.testing.assert_allclose(np.asarray(path.alpha)[: count + 1], np.sqrt(ends), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(path.sigma)[: count + 1], np.sqrt(1 - ends), rtol=1e-5)
    forward = 1 - ends[:-1] / ends[1:]
    np.testing.assert_allclose(np.exp(path.high)[:count], forward, rtol=1e-4)
    assert RDM.loop_trips(DiffusionSampler(steps=steps, spacing="leading")) == count


def test_all_numbers_of_steps_share_a_program_and_known_pixels_stay():
    model, keys = fresh(RDM), jax.random.split(jax.random.key(0), 2)
    condition = {"features": jnp.ones((2, 3, 5))}
    traced = []

    @jax.jit
    def sample(options):
        traced.append(options)
        return RDM.sample(model, condition, keys, options)

    made = [sample(DiffusionSampler(steps=n, spacing="leading", guidance=g).arrays()) for n, g in ((3, 2.0), (7, 5.0))]
    assert len(traced) == 1 and np.isfinite(made).all() and not np.allclose(*made)
    known, keep = jnp.full((2, 4, 4, 3), 0.5), jnp.arange(16).reshape(1, 4, 4).repeat(2, 0) < 6
    few, small = DiffusionSampler(steps=3, spacing="leading"), FAMILIES["dit"]
    held = small.sample(fresh(small), {"label": jnp.zeros(2, jnp.int32)}, keys, few, known=known, keep=keep)
    np.testing.assert_allclose(np.asarray(held)[np.asarray(keep)], 0.5, atol=1e-6)


@pytest.mark.parametrize("process", [Flow(), EDM()])
def test_other_processes_have_no_such_stops(process):
    with pytest.raises(ValueError, match="one of discrete steps"):
        process.timesteps(3, spacing="leading")
    with pytest.raises(ValueError, match="one of discrete steps"):
        FAMILIES["edm"].check(DiffusionSampler(spacing="leading"))


def test_ends_of_schedules():
    for name, ends in {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "quadratic": (1e-4, 0.02)}.items():
        for steps in (1000, 50):
            again = Schedule.named(name, steps, ends=ends).betas
            np.testing.assert_allclose(again, Schedule.named(name, steps).betas, rtol=1e-12)
    for fields, said in (
        ({"ends": (0.1, 0.01)}, "rising"),
        ({"ends": (0.0, 0.1)}, "above 0"),
        ({"schedule": "cosine", "ends": (0.001, 0.1)}, "has none"),
    ):
        with pytest.raises(ConfigError, match=said):
            Discrete(**fields)


# --------------------------------------------------------------------------------------------------------- its files

NETWORK = UNet(
    (8, 8),
    4,
    32,
    (1, 2),
    blocks=1,
    attention=(2,),
    head_dim=16,
    transformers=1,
    context=12,
    pool="none",
    scale_shift=False,
    resample="conv",
    learn_variance=False,
)
READ = CrossAttnFeatures(12, 4, trained_null=False, zero_null=True)


def test_a_checkpoint_gives_its_averaged_weights(tmp_path):
    config = dataclasses.replace(
        RDM,
        network=with_fields(NETWORK, condition=READ),
        process=Discrete("scaled_linear", ends=(0.0015, 0.0195)),
        sampling=DiffusionSampler(100, guidance=2.0, spacing="leading"),
    )
    tensors = random("rdm", config)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"first_stage_model.encoder.conv_in.weight": np.zeros((4, 3, 3, 3), np.float32)}
    save_file(whole, tmp_path / "plain.ckpt")
    flat = {f"model_ema.diffusion_model{name.replace('.', '')}": 2 * tensor for name, tensor in tensors.items()}
    save_file(whole | flat | {"model_ema.decay": np.ones(1, np.float32)}, tmp_path / "averaged.ckpt")
    for name, factor in {"plain": 1, "averaged": 2}.items():
        found = read(tmp_path / f"{name}.ckpt", "rdm")
        assert found.keys() == tensors.keys()
        again, model = convert("rdm", found, size=8, head_dim=16)
        assert again == config
        back = restore("rdm", again, model)
        assert all((back[k] == factor * tensors[k]).all() for k in tensors)
    flat.popitem()  # averages that are not of this model
    save_file(whole | flat, tmp_path / "part.ckpt")
    assert (read(tmp_path / "part.ckpt", "rdm")["out.2.bias"] == tensors["out.2.bias"]).all()


@pytest.mark.parametrize(("context", "size", "length", "guidance"), [(512, 64, 4, 2.0), (768, 48, 11, 5.0)])
def test_released_sizes_are_recognised(context, size, length, guidance):
    network = with_fields(NETWORK, condition=dataclasses.replace(READ, dim=context), context=context, head_dim=32)
    shapes = restore("rdm", dataclasses.replace(RDM, network=network), abstract_zeros(network))
    config, _ = convert("rdm", {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in shapes.items()})
    assert config.network.size == (size, size) and config.condition.length == length
    assert config.sampling.guidance == guidance and config.solver == "ddim"
    assert find("rdm").title


def abstract_zeros(network):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(network))


def test_a_converted_model_has_its_neighbours_and_codec(clip, tmp_path):
    config = dataclasses.replace(RDM, network=with_fields(NETWORK, condition=READ))
    save_file(random("rdm", config), tmp_path / "model.safetensors")
    np.save(tmp_path / "rows.npy", np.random.default_rng(1).normal(size=(9, 12)).astype(np.float32))
    text = text_side(f"neighbours:{clip.folder},database={tmp_path / 'rows.npy'}")
    hints = {"size": 8, "head_dim": 16}
    artifact = to_folder("rdm", tmp_path / "model.safetensors", tmp_path / "model", hints, text=text)
    assert artifact.config.condition == READ and named(artifact.model).keys() == named(abstract(config)).keys()
    assert isinstance(load_artifact(tmp_path / "model").text, Neighbours)
    with pytest.raises(ConfigError, match="4 vectors"):
        to_folder(
            "rdm", tmp_path / "model.safetensors", tmp_path / "x", hints, text=dataclasses.replace(text, query=False)
        )
