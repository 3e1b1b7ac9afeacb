"""Re-Imagen: a UNet that attends to retrieved images with their captions, and guidance with regard to either."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from t2i_jax.cli import main
from t2i_jax.core.config import to_json
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.fields import Checked
from t2i_jax.core.params import abstract, named, rebuild
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.models.diffusion import Diffusion, _sample
from t2i_jax.networks.condition import CrossAttnFeatures
from t2i_jax.networks.neighbours import NeighbourMaps
from t2i_jax.networks.unet import UNet
from t2i_jax.nn.layers import ModelState
from t2i_jax.noise.processes import Discrete, Flow
from t2i_jax.pipeline import Pipeline
from t2i_jax.sampler import _sample as draw
from t2i_jax.sampling.guidance import guided_by
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.text.cut import LimitedEncoder
from t2i_jax.text.retrieval import NeighbourPairs
from t2i_jax.training.experiment import load_experiment
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.families import fresh

WORDS, WIDTH = 3, 9
NETWORK = with_fields(
    UNet(),
    size=(4, 4),
    width=8,
    multipliers=(1,),
    blocks=1,
    attention=(),
    middle_attention=False,
    groups=4,
    heads=2,
    context=WIDTH,
    condition=CrossAttnFeatures(WIDTH, WORDS, trained_null=False, zero_null=True),
    learn_variance=False,
    neighbours=NeighbourMaps(2),
)
FAMILY = Diffusion(NETWORK, Discrete("cosine"), "x0", solver="ddim", sampling=DiffusionSampler(4))


class Table(nnx.Module):
    def __init__(self):
        self.rows = ModelState(jnp.eye(WIDTH)[:, ::-1], axes=(None, None))


@dataclasses.dataclass(frozen=True)
class Words(Checked, LimitedEncoder):
    """A vector for each word, by its first letter: captions with the same letters are equal."""

    room = WORDS
    feature_shape = (WORDS, WIDTH)

    def __call__(self, captions):
        rows = [ids[:WORDS] + [0] * (WORDS - len(ids)) for ids in self.tokens(captions)]
        ids = np.asarray(rows, np.int32).reshape(-1, WORDS)
        return ids, ids > 0

    def tokens(self, captions):
        return [[1 + (ord(word[0]) - ord("a")) % (WIDTH - 1) for word in caption.split()] for caption in captions]

    def load(self):
        return Table()

    def features(self, model, ids, mask):
        return model.rows[ids]


def moved(model):
    """Weights away from their zeros, which would hide what is behind them."""
    shift = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return jax.tree.map(shift, model)


def batch_of(b=4, seed=0, k=2):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
    return {
        "image": draw(b, 4, 4, 3),
        "features": draw(b, WORDS, WIDTH),
        "neighbour_image": draw(b, k, 4, 4, 3),
        "neighbour_features": draw(b, k, WORDS, WIDTH),
    }


@jax.jit
def predicted(model, batch, t, drop):
    return model(batch["image"], t, model.read(batch, drop))


def test_what_is_dropped_is_not_there_and_neighbours_have_no_order():
    model = moved(fresh(FAMILY))
    one = {name: np.repeat(x[:1], 5, 0) for name, x in batch_of().items()}
    for name in ("neighbour_image", "neighbour_features"):
        one[name][1] = one[name][1, ::-1]  # in the other order
        one[name][3, 1] = 7.0  # where it is not read
    one["neighbour_mask"] = np.asarray([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]], bool)
    t, kept = jnp.full(5, 300), jnp.zeros(5, bool)
    out = predicted(model, one, t, kept)
    np.testing.assert_allclose(out[0], out[1], atol=1e-5)
    np.testing.assert_allclose(out[2], out[3], atol=1e-5)
    assert all(np.abs(out[i] - out[j]).max() > 1e-3 for i, j in ((0, 2), (0, 4), (2, 4)))
    plain = dataclasses.replace(FAMILY, network=dataclasses.replace(NETWORK, neighbours=None))
    values = {k: v for k, v in named(model).items() if not k.startswith("neighbours.")}
    without = predicted(rebuild(abstract(plain), values), one, t, kept)
    np.testing.assert_allclose(out[4], without[4], atol=1e-5)


def test_training_drops_captions_and_neighbours_independently():
    drops = dataclasses.replace(NETWORK, neighbours=NeighbourMaps(2, dropout=0.5))
    family = dataclasses.replace(FAMILY, network=with_fields(drops, condition_dropout=0.5))
    seen = []

    class Spy:
        def read(self, batch, drop):
            seen.append((~batch["neighbour_mask"].any(1), drop))
            raise StopIteration

    for train_ in (True, False):
        with pytest.raises(StopIteration):
            family.loss(Spy(), jax.tree.map(jnp.asarray, batch_of(2000)), jax.random.key(0), train_)
    neighbours, captions = map(np.asarray, seen[0])
    shares = [(neighbours & captions).mean(), neighbours.mean(), captions.mean()]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.5], atol=0.05)
    assert not any(np.any(x) for x in seen[1])


def test_guidance_takes_turns_as_written_out_by_hand():
    """Of six steps at a share of 1/3 the third and the sixth guide with regard to neighbours (eqs. 6 to 8)."""
    model, batch, keys = moved(fresh(FAMILY)), batch_of(5), jax.random.split(jax.random.key(1), 5)
    condition = {k: v for k, v in batch.items() if k != "image"}
    options = DiffusionSampler(6, guidance=2.0, neighbour_guidance=5.0, neighbour_share=1 / 3)
    made = FAMILY.sample(model, condition, keys, options)
    path = FAMILY.process.timesteps(6)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    x = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 3)))(fold(fold(keys, 0), 0))
    none = np.zeros((5, 2), bool)
    for i in range(6):
        t = jnp.full(5, path.t[i])
        at = lambda drop, mask, x=x, t=t: predicted(model, condition | {"image": x, "neighbour_mask": mask}, t, drop)
        both = at(jnp.zeros(5, bool), ~none)
        if i in (2, 5):
            x0 = 5 * both - 4 * at(jnp.zeros(5, bool), none)
        else:
            x0 = 2 * both - at(jnp.ones(5, bool), ~none)
        eps = (x - path.alpha[i] * x0) / path.sigma[i]
        x = path.alpha[i + 1] * x0 + path.sigma[i + 1] * eps
    np.testing.assert_allclose(made, x, rtol=1e-3, atol=1e-3)
    compiled = _sample._cache_size()
    others = [dataclasses.replace(options, **fields) for fields in ({"neighbour_share": 1.0}, {"steps": 7})]
    others.append(dataclasses.replace(options, neighbour_guidance=1.0))
    for other in others:
        assert np.abs(FAMILY.sample(model, condition, keys, other) - made).max() > 1e-3
    assert _sample._cache_size() == compiled


def test_scales_of_one_need_no_other_branch():
    plain = DiffusionSampler(guidance=1.0)
    assert guided_by(FAMILY, plain) is None
    assert guided_by(FAMILY, dataclasses.replace(plain, neighbour_guidance=1.0)) is False
    other = dataclasses.replace(FAMILY, network=dataclasses.replace(NETWORK, neighbours=None))
    assert guided_by(other, plain) is False
    with pytest.raises(ValueError, match="reads no neighbours"):
        other.check(DiffusionSampler(neighbour_guidance=1.0))
    for never in (
        with_fields(NETWORK, condition_dropout=0.0),
        dataclasses.replace(NETWORK, neighbours=NeighbourMaps(2, 0.0)),
    ):
        assert not dataclasses.replace(FAMILY, network=never).capabilities.unconditional


def test_what_cannot_read_neighbours_says_so():
    with pytest.raises(ConfigError, match="Discrete process"):
        dataclasses.replace(FAMILY, process=Flow(), predicts="velocity")
    with pytest.raises(ConfigError, match="without extra_inputs"):
        dataclasses.replace(NETWORK, extra_inputs=("low_res",))


def test_it_learns_what_neighbours_alone_say():
    """Images are flat, and their colour is that of their neighbours; captions say nothing."""
    optimizer = optax.adam(6e-3)

    def example(key):
        colour = jax.random.uniform(key, (8, 1, 1, 3), minval=-1, maxval=1)
        flat, text = jnp.broadcast_to(colour, (8, 4, 4, 3)), jnp.zeros((8, WORDS, WIDTH))
        pairs = {"neighbour_image": jnp.stack([flat, flat], 1), "neighbour_features": jnp.stack([text, text], 1)}
        return {"image": flat, "features": text, **pairs}

    @jax.jit
    def learned(params):
        def step(carry, key):
            params, state = carry
            keys = jax.random.split(key)
            loss = lambda p: FAMILY.loss(rebuild(abstract(FAMILY), p), example(keys[0]), keys[1]).loss
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 150)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    model, batch = rebuild(abstract(FAMILY), learned(named(fresh(FAMILY)))), example(jax.random.key(1))
    noise, t, kept = jax.random.normal(jax.random.key(2), (8, 4, 4, 3)), jnp.full(8, 999), jnp.zeros(8, bool)

    def error(mask):
        asked = batch | {"image": noise, "neighbour_mask": jnp.full((8, 2), mask)}
        return float(jnp.abs(predicted(model, asked, t, kept) - batch["image"]).mean())

    assert error(True) < 0.5 * error(False)


# ------------------------------------------------------------------------------------------------------- the database

NAMES = ("apple", "apple", "apple", "bird", "bird", "cat", "dog", "dog")


SETTINGS = {"steps": 2, "save_every": 1, "optimizer": Optimizer(schedule="constant", warmup=0)}


def experiment_of(tmp_path, own=True):
    """Eight pictures, several of the same caption, and a model that retrieves from them."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    captions = [[name] for name in NAMES]
    for folder, images in {"data": pictures, "dark": pictures // 8}.items():
        both = [
            {"key": f"{split}{n}", "image": x, "captions": c, "split": split}
            for split in ("train", "val")
            for n, (x, c) in enumerate(zip(images, captions, strict=True))
        ]
        write_records(tmp_path / folder, both)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=4, batch_size=4)
    text = NeighbourPairs(Words(), str(tmp_path / "pairs"), image_size=4, own=own)
    experiment = dataclasses.replace(toys.experiment(FAMILY, data, MeshConfig(1, 1, 1), **SETTINGS), text=text)
    (tmp_path / "config.json").write_text(json.dumps(to_json(experiment)))
    return load_experiment(tmp_path / "config.json"), pictures


def index(tmp_path, name, *more):
    main(
        ["data", "neighbours", str(tmp_path / "config.json"), "--of", "captions", "--out", str(tmp_path / name), *more]
    )


def test_a_record_is_no_neighbour_of_itself(tmp_path):
    experiment, pictures = experiment_of(tmp_path)
    index(tmp_path, "pairs", "--pairs")
    trainer = Trainer(experiment, tmp_path / "run")
    stream, several = trainer.batches(0), 0
    for _ in range(6):
        batch = next(stream)
        ready = jax.device_get(jax.jit(trainer.prepare)(trainer.frozen, batch, jax.random.key(0)))
        shown = np.round((ready["neighbour_image"] + 1) * 127.5).astype(np.uint8)
        for record, image, own in zip(ready["record"], np.asarray(batch["image"]), shown, strict=True):
            np.testing.assert_array_equal(image, pictures[record])
            found = [next(n for n in range(8) if (pictures[n] == x).all()) for x in own]
            assert record not in found and len(set(found)) == 2
            same = [n for n in range(8) if n != record and NAMES[n] == NAMES[record]][:2]
            assert found[: len(same)] == same  # captions that are equal come first, in the order of the records
            several += len(same)
        assert ready["neighbour_mask"].all() and ready["neighbour_features"].shape == (4, 2, WORDS, WIDTH)
    assert several
    held_out = jax.device_get(next(trainer.batches(0, "val")))
    assert (held_out["record"] == -1).all()
    stream.close()
    empty = jnp.zeros((1, WORDS, WIDTH)), jnp.zeros((1, WORDS), bool)
    none = experiment.text.neighbours_of(trainer.frozen["text"], *empty)
    assert not none["neighbour_mask"].any()  # an empty caption has none


def test_a_database_is_split_over_devices_and_finds_the_same(tmp_path):
    text = experiment_of(tmp_path)[0].text
    index(tmp_path, "pairs", "--pairs")
    model, (ids, mask) = text.load(), text([*NAMES])
    asked = text.features(model, ids, mask), jnp.asarray(mask), jnp.arange(8)
    alone = jax.jit(text.neighbours_of)(model, *asked)
    mesh = MeshConfig(2, 2, 2).build()
    with jax.set_mesh(mesh):
        split = jax.device_put(model, shardings(model, mesh))
        run = jax.jit(text.neighbours_of).lower(split, *asked).compile()
        found = run(split, *asked)
    assert {s.data.shape[0] for s in split.images[...].addressable_shards} == {len(model.images[...]) // 8}
    assert not re.search(r"u8\[256,[^=]*all-gather", run.as_text())  # no device has all images
    for name, x in alone.items():
        np.testing.assert_array_equal(x, found[name])


def test_databases_that_do_not_fit_are_refused(tmp_path):
    experiment, _ = experiment_of(tmp_path)
    text, train_ = experiment.text, experiment.data.examples("train")
    index(tmp_path, "pairs")
    with pytest.raises(ConfigError, match=r"embeddings alone.*--pairs"):
        text.load()
    index(tmp_path, "pairs", "--pairs")  # those of an index that is there
    table = text.load()
    text.check_records(table, train_)
    with pytest.raises(ConfigError, match=r"4x4 pixels.*--data.image_size=8"):
        dataclasses.replace(text, image_size=8).load()
    with pytest.raises(ConfigError, match="not of the training records"):
        text.check_records(table, [train_[n] for n in range(7)])
    others = [{"captions": [name]} for name in reversed(NAMES)]  # as many, in another order
    with pytest.raises(ConfigError, match=r"not of the training records.*record 0 has the caption 'dog' in the data"):
        text.check_records(table, others)
    dataclasses.replace(text, own=False).check_records(table, others)
    with pytest.raises(SystemExit):  # the images of other data, for embeddings that are there
        for part in (tmp_path / "pairs").glob("pairs-*"):
            part.unlink()
        index(tmp_path, "pairs", "--pairs", f"--data.source.path={tmp_path / 'dark'}")
    assert not list((tmp_path / "pairs").glob("pairs-*"))
    np.save(tmp_path / "rows.npy", np.eye(9, dtype=np.float32))
    with pytest.raises(ConfigError, match="embeddings alone"):
        dataclasses.replace(text, database=str(tmp_path / "rows.npy")).load()


def test_it_trains_goes_on_and_draws_by_another_database(tmp_path):
    experiment, _ = experiment_of(tmp_path)
    index(tmp_path, "pairs", "--pairs")
    index(tmp_path, "other", "--pairs", f"--data.source.path={tmp_path / 'dark'}")
    whole = train(experiment, tmp_path / "run").params
    train(dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=1)), tmp_path / "parts")
    parts = train(experiment, tmp_path / "parts", accept_changes=True).params
    assert all((np.asarray(whole[k][...]) == np.asarray(parts[k][...])).all() for k in whole)
    pipe = Pipeline.load(tmp_path / "run")
    rough = dataclasses.replace(pipe, model=moved(pipe.model))  # two steps teach it nothing
    mine, compiled = rough("dog", seeds=[0]), draw._cache_size()
    again, swapped = (rough.with_database(tmp_path / name) for name in ("pairs", "other"))
    np.testing.assert_array_equal(again("dog", seeds=[0]), mine)
    assert (swapped("dog", seeds=[0]) != mine).any() and draw._cache_size() == compiled
    main(["sample", str(tmp_path / "run"), "dog", "--out", str(tmp_path / "drawn"), "--neighbour-share", "1",
          "--database", str(tmp_path / "other")])  # fmt: skip
    main(["release", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    assert str(tmp_path / "model") in load_artifact(tmp_path / "model").text.database
    np.testing.assert_array_equal(
        Pipeline.load(tmp_path / "model")("dog", seeds=[0]), Pipeline.load(tmp_path / "run")("dog", seeds=[0])
    )
