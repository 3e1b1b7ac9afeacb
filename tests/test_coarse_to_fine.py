"""Coarse codes, direct and iterative super-resolution: what sees what, what is drawn, and with which probability."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t2i_jax.convert import convert, read, restore
from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.encode import encode_splits
from t2i_jax.models.ar import AR
from t2i_jax.models.coarse_to_fine import CoarseToFine
from t2i_jax.models.stream import StreamText
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.local import LocalTransformer, neighbours
from t2i_jax.pipeline import Pipeline
from t2i_jax.presets import preset
from t2i_jax.sampling.options import CoarseToFineSampler, StreamSampler
from t2i_jax.sampling.tokens import sample_in_clusters
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.loop import train
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES, batch_for, fresh

CONFIG = FAMILIES["coarse-to-fine"]
BATCH = batch_for(CONFIG, 2)
CONDITION = {k: BATCH[k] for k in ("text", "text_mask")}
KEYS = jax.random.split(jax.random.key(3), 2)


@pytest.mark.parametrize(("grid", "other", "window"), [((6, 6), (6, 6), (5, 3)), ((6, 9), (2, 3), (3, 3))])
def test_a_window_lies_around_the_same_place_of_the_image(grid, other, window):
    rows, seen = neighbours(grid, other, window)
    for r, c in np.ndindex(grid):
        wanted = {
            (i, j)
            for i, j in np.ndindex(other)
            if abs(i - r * other[0] // grid[0]) <= window[0] // 2 and abs(j - c * other[1] // grid[1]) <= window[1] // 2
        }
        found = [(rows[r, k // other[1]], k % other[1]) for k in np.flatnonzero(seen[r, c])]
        assert set(found) == wanted and len(found) == len(wanted)


def moved(network, *changes):
    """Which fine tokens' logits (h, w) change with each of other arguments, for one layer."""
    model = getattr(fresh(CONFIG), network)
    arguments = {
        "text": BATCH["text"],
        "real": np.ones_like(BATCH["text_mask"]),
        "coarse": BATCH["low_codes"],
        "fine": BATCH["codes"],
        "hidden": np.zeros((2, 4, 4), bool),
    }
    run = jax.jit(lambda **arguments: model.logits(model(**arguments)))
    plain = run(**arguments)
    differ = lambda other: np.asarray(jnp.abs(other - plain).max((0, 2)) > 1e-6).reshape(4, 4)
    return [differ(run(**arguments | change(arguments))) for change in changes]


def test_fine_tokens_see_their_window_and_either_coarse_tokens_or_text():
    def at(name, place):
        def change(arguments):
            array = np.array(arguments[name])
            array[(slice(None), *place)] = (array[(slice(None), *place)] + 1) % 16
            return {name: array}

        return change

    row, column = np.indices((4, 4))
    fine, coarse, text, late = moved(
        "direct", at("fine", (1, 2)), at("coarse", (0, 1)), at("text", (0,)), at("text", (5,))
    )
    np.testing.assert_array_equal(fine, (np.abs(row - 1) <= 2) & (np.abs(column - 2) <= 1))
    assert coarse.all()  # a window of 3 x 3 of 2 x 2, and coarse tokens see each other
    assert not text.any() and not late.any()  # one layer: text reaches coarse tokens, which fine ones saw before
    fine, coarse, text, late = moved(
        "refiner", at("fine", (1, 2)), at("coarse", (0, 1)), at("text", (0,)), at("text", (3,))
    )
    np.testing.assert_array_equal(fine, (row == 1) & (column == 2))  # a window of 1 x 1
    assert not coarse.any() and text.all() and not late.any()


def test_padding_is_not_read_and_an_image_is_its_own():
    other = np.where(CONDITION["text_mask"], CONDITION["text"], 7)
    made = CONFIG.sample(fresh(CONFIG), CONDITION, KEYS)
    np.testing.assert_array_equal(CONFIG.sample(fresh(CONFIG), CONDITION | {"text": other}, KEYS), made)
    turned = CONFIG.sample(fresh(CONFIG), {k: v[::-1] for k, v in CONDITION.items()}, KEYS[::-1])
    np.testing.assert_array_equal(turned[::-1], made)
    empty = {**CONDITION, "text_mask": np.zeros_like(CONDITION["text_mask"])}
    assert np.isfinite(np.asarray(CONFIG.sample(fresh(CONFIG), empty, KEYS))).all()


def test_all_options_share_a_program_and_rounds_draw_their_part_again(traces):
    model = fresh(CONFIG)
    draw = lambda **options: np.asarray(
        CONFIG.sample(model, CONDITION, KEYS, dataclasses.replace(CONFIG.sampling, **options))
    )
    direct, compiled = draw(refinements=0), traces["_sample"]
    one, two = draw(refinements=1), draw(refinements=2)
    draw(greedy=True, temperature=0.5, text_weight=2.0, top_clusters=0, direct_top_clusters=1, refine_temperature=0.1)
    assert traces["_sample"] == compiled
    kept = CONFIG.rounds[None]
    assert (direct != one)[np.broadcast_to(kept >= 1, one.shape)].any() and (one != two).any()
    np.testing.assert_array_equal(direct[:, CONFIG.rounds < 1], one[:, CONFIG.rounds < 1])
    np.testing.assert_array_equal(one[:, CONFIG.rounds < 2], two[:, CONFIG.rounds < 2])


def test_codes_are_drawn_by_cluster_and_then_by_themselves():
    rng = np.random.default_rng(0)
    logits, clusters, n = rng.normal(size=(7,)).astype(np.float32) * 2, jnp.asarray([0, 1, 2, 0, 1, 2, 2]), 40000
    options = StreamSampler(temperature=0.8, top_clusters=2, cluster_temperature=0.5).arrays()
    uniform = jnp.asarray(rng.uniform(size=(2, n)), jnp.float32)
    drawn = sample_in_clusters(jnp.tile(logits, (n, 1)), options, uniform, clusters, 3)
    p = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    of = np.array([p[np.asarray(clusters) == c].sum() for c in range(3)])
    of[of.argmin()] = 0
    inside = np.exp(logits / 0.4)
    for c in range(3):
        mine = np.asarray(clusters) == c
        inside[mine] *= of[c] / of.sum() / inside[mine].sum()
    np.testing.assert_allclose(np.bincount(np.asarray(drawn), minlength=7) / n, inside, atol=0.01)
    mixed = dataclasses.replace(options, top_clusters=jnp.asarray([0, 2] * (n // 2)))
    some = sample_in_clusters(jnp.tile(logits, (n, 1)), mixed, uniform, clusters, 3)
    np.testing.assert_array_equal(some[1::2], drawn[1::2])
    assert (np.bincount(np.asarray(some[::2]), minlength=7) > 0).sum() > (inside > 0).sum()


@dataclasses.dataclass(frozen=True)
class Words:
    """Lengths of the words of a caption as ids."""

    spec = TextSpec()

    def __call__(self, captions):
        rows = [[len(word) for word in caption.split()] for caption in captions]
        ids = np.asarray([(row + [0] * 6)[:6] for row in rows], np.int32)
        return ids, ids > 0


@pytest.mark.slow
def test_it_is_trained_from_images_and_captions_and_draws_large_images(tmp_path):
    """Its coarse codes are computed in training, or stored by `t2i encode` beside the others."""
    rng = np.random.default_rng(0)
    image = lambda: np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), np.uint8), 4, 0), 4, 1)
    write_records(tmp_path / "data", [{"image": image(), "captions": [f"{'a' * n} b"]} for n in range(1, 9)])
    save_artifact(Artifact(toys.Squares(), {}), tmp_path / "codec", "# Squares\n")
    model = with_fields(CONFIG, vocabulary=8)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=16, batch_size=8)
    settings = Train(2, evaluate_every=0, preview_every=0, save_every=2)
    experiment = Experiment(model, data, settings, codec=str(tmp_path / "codec"), text=Words())
    train(experiment, tmp_path / "run")
    pipeline = Pipeline.load(tmp_path / "run", MeshConfig(1))
    assert pipeline.family == model
    assert pipeline("a bb", seeds=[0, 1], refinements=1).shape == (2, 16, 16, 3)
    encode_splits(dataclasses.replace(experiment, mesh=MeshConfig(1)), tmp_path / "codes", ["train"], 8)
    stored = ArrayRecord(str(tmp_path / "codes")).open()
    for n in range(8):
        codes, coarse = (np.asarray(stored[n][k], int) for k in ("codes", "low_codes"))
        assert codes.shape == (4, 4) and coarse.shape == (2, 2)
        assert coarse.min() >= 0 and coarse.max() < 8


def test_released_sizes():
    count = lambda config: sum(x.size for x in jax.tree.leaves(jax.eval_shape(config.init, jax.random.key(0)))) / 1e9
    whole = preset("cogview2")
    assert isinstance(whole, CoarseToFine) and whole.length == 3600
    assert 5.8 < count(whole.coarse) < 6.2
    # Each of the others is as large, and direct super-resolution has the matrices of attention twice.
    assert count(whole) == pytest.approx(3 * count(whole.coarse) + 48 * 4 * 3072**2 / 1e9, rel=0.01)
    np.testing.assert_array_equal(whole.rounds[6:12, 54:], whole.pattern)


def test_three_files_and_the_clusters_come_back_as_they_were(tmp_path):
    """With rows of tables that no token uses."""
    config = dataclasses.replace(CONFIG, coarse=with_fields(CONFIG.coarse, places=(8, 5)))
    local = dict(hidden=19, places=13)
    config = dataclasses.replace(
        config,
        direct=with_fields(CONFIG.direct, **local, coarse_place=8, text=5),
        refiner=with_fields(CONFIG.refiner, **local),
    )
    model = jax.jit(config.init)(jax.random.key(1))
    tensors = restore("cogview2", config, model)
    hints = dict(heads=2, coarse_grid=(2, 2), codes=16, image_place=8, start_of_image=35, text_length=6)
    hints |= dict(direct_text=5, refiner_text=3)
    for part, stem in {"coglm.": "coglm", "dsr.": "cogview2-dsr", "itersr.": "itersr"}.items():
        own = {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        save_file(own, tmp_path / f"{stem}.safetensors")
    labels = tmp_path / "cluster_label.npy"
    np.save(labels, tensors["cluster_label"].astype(np.int64))
    found, again = convert("cogview2", read(tmp_path, "cogview2"), labels=str(labels), **hints)
    assert isinstance(found, CoarseToFine) and found.clusters == 4 and found.coarse.places == (8, 5)
    back = restore("cogview2", found, again)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)
    for wrong, says in (("coglm.safetensors", "a file .npy"), ("none.npy", "a file .npy")):
        with pytest.raises(ConfigError, match=says):
            convert("cogview2", tensors, labels=str(tmp_path / wrong), **hints)
    without = {k: v for k, v in tensors.items() if k != "cluster_label"}
    plain, _ = convert("cogview2", without, **hints)
    assert isinstance(plain, CoarseToFine) and not plain.clusters
    plain.check(plain.options())
    alone = {k.removeprefix("coglm."): v for k, v in without.items() if k.startswith("coglm.")}
    first, _ = convert("coglm", alone, heads=2, grid=(2, 2), codes=16, image_place=8, start_of_image=35, text_length=6)
    assert first == plain.coarse


def test_what_cannot_be_says_why():
    with pytest.raises(ConfigError, match="reads no 'text'"):
        CoarseToFine(AR(conditioning=dataclasses.replace(AR().conditioning, what=ClassEmbedder(3))))
    with pytest.raises(ConfigError, match="no multiple of the coarse"):
        dataclasses.replace(CONFIG, grid=(4, 5))
    with pytest.raises(ConfigError, match=r"direct\.sees"):
        dataclasses.replace(CONFIG, direct=CONFIG.refiner)
    with pytest.raises(ConfigError, match=r"coarse\.compute"):
        dataclasses.replace(CONFIG, coarse=with_fields(CONFIG.coarse, dtype="bfloat16"))
    with pytest.raises(ConfigError, match="an odd number"):
        LocalTransformer(window=4)
    with pytest.raises(ConfigError, match="pattern"):
        dataclasses.replace(CONFIG, pattern=((0, 1), (1,)))
    with pytest.raises(ConfigError, match=r"StreamText\.end 20"):
        StreamText(20, end=20)
    with pytest.raises(ConfigError, match="2 rounds"):
        CONFIG.check(CoarseToFineSampler(refinements=3))
    assert [CONFIG.loop_trips(CoarseToFineSampler(refinements=n)) for n in (0, 2)] == [0, 2]
    for options in ({"top_clusters": 2}, {"direct_top_clusters": 2}):
        with pytest.raises(ConfigError, match="in no clusters"):
            plain = dataclasses.replace(CONFIG, clusters=0, coarse=with_fields(CONFIG.coarse, clusters=0))
            plain.check(CoarseToFineSampler(refinements=1, **options))
