"""CLIP as judge of candidates, and models that learn from pictures and draw for captions."""

import jax
import numpy as np
import pytest

from t2i_jax.cli import main
from t2i_jax.core.family import with_fields
from t2i_jax.core.image_files import read_png_text, save_png
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.encode import encode_splits
from t2i_jax.evaluation.rerank import Reranker, keep_best
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import PooledFeatures
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.text.clip import ClipEmbedding
from t2i_jax.training.experiment import make_prepare
from t2i_jax.training.loop import train
from tests.fixtures import toys
from tests.fixtures.clip_files import random_clip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A random CLIP in a folder as Hugging Face lays it out."""
    return ClipEmbedding(random_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def judge(text):
    return Reranker(text, batch_size=4)


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 10, 12, 3)).astype(np.uint8)


PROMPTS = ["a cat", "dog", "x y"]


def test_scores_are_cosines_and_the_order_goes_down(text, judge):
    images = pictures(3, 5)
    order, scores = judge(PROMPTS, images)
    assert order.shape == scores.shape == (3, 5)
    assert (np.diff(np.take_along_axis(scores, order, 1)) <= 0).all()
    model = text.load()
    read = jax.jit(text.features)(model, *text(PROMPTS))[:, 0]
    seen = jax.jit(text.image_features)(model, images[1].astype(np.float32) / 127.5 - 1)[:, 0]
    np.testing.assert_allclose(scores[1], seen @ read[1], atol=1e-5)


def test_a_score_depends_on_its_own_pair_alone(text, judge):
    images = pictures(3, 5)
    _, scores = judge(PROMPTS, images)
    np.testing.assert_allclose(judge(PROMPTS[1:2], images[1:2, 3:])[1][0], scores[1, 3:], atol=1e-5)
    meshed = Reranker(text, MeshConfig(2, 2, 2), batch_size=3)
    np.testing.assert_allclose(meshed(PROMPTS, images)[1], scores, atol=1e-5)


def test_other_shapes_are_refused(judge):
    with pytest.raises(ValueError, match=r"n = 3 prompts, not uint8 \(2, 5"):
        judge(PROMPTS, pictures(2, 5))
    with pytest.raises(ValueError, match="not float32"):
        judge(PROMPTS, pictures(3, 5).astype(np.float32))


def test_the_best_are_kept_and_tell_their_score(tmp_path, judge):
    images, prompts = pictures(2, 3), PROMPTS[:2]
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for n, path in enumerate(paths):
        save_png(images.reshape(6, 10, 12, 3)[n], path, [prompts[n // 3]], {"seed": str(n)})
    out = tmp_path / "best"
    out.mkdir()
    keep_best(paths, prompts, 2, out, judge)
    order, scores = judge(prompts, images)
    for n in range(4):
        about = read_png_text(out / f"{n:05d}.png")
        place = order[n // 2, n % 2]
        assert about["seed"] == str(n // 2 * 3 + place) and about["Description"] == prompts[n // 2]
        assert float(about["score"]) == pytest.approx(scores[n // 2, place], abs=1e-4)
    assert (out / "grid.png").exists() and not (out / "00004.png").exists()


# ------------------------------------------------------------------------------------- learning without language


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Pictures without captions, and the codec as a released model."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(16)]
    records = [{"image": x, "captions": ["a cat"], "key": str(n), "split": "train"} for n, x in enumerate(rows)]
    write_records(path / "data", records)
    save_artifact(Artifact(toys.Squares(), {}), path / "codec", "# Squares\n")
    return path


def experiment(store, text, **more):
    family = with_fields(
        AR(), vocabulary=8, grid=(2, 2), width=16, depth=1, heads=2, condition=PooledFeatures(12), dropout=0.0
    )
    data = Data(ArrayRecord(str(store / "data")), image_size=8, batch_size=8)
    made = toys.experiment(family, data, MeshConfig(1, 1, 1), steps=3)
    return with_fields(made, codec=str(store / "codec"), text=text, **more)


def test_training_sees_pictures(store, text):
    e = experiment(store, text)
    images = next(e.data.batches())["image"]
    model = text.load()
    batch = jax.jit(make_prepare(toys.Squares(), text))(
        {"text": model, "codec": {}}, {"image": images}, jax.random.key(0)
    )
    assert set(batch) == {"codes", "features"} and batch["features"].shape == (8, 1, 12)
    expected = jax.jit(text.image_features)(model, images / np.float32(127.5) - 1)
    np.testing.assert_allclose(batch["features"], expected, atol=1e-6)


@pytest.mark.slow
def test_learned_from_pictures_drawn_for_captions_chosen_by_clip(tmp_path, store, text):
    train(experiment(store, text), tmp_path / "run")
    main(["sample", str(tmp_path / "run"), "a cat", "--out", str(tmp_path / "out"), "--rerank", text.folder,
          "--candidates", "4", "--count", "2"])  # fmt: skip
    assert len(list((tmp_path / "out/candidates").glob("0*.png"))) == 4
    names = ["00000.png", "00001.png"]
    assert sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == names
    assert float(read_png_text(tmp_path / "out/00000.png")["score"]) >= float(
        read_png_text(tmp_path / "out/00001.png")["score"]
    )


def test_embeddings_of_pictures_are_stored_with_the_codes(tmp_path, store, text):
    encode_splits(experiment(store, text), tmp_path / "encoded", ["train"], 8)
    data = Data(ArrayRecord(str(tmp_path / "encoded")), image_size=8, batch_size=8, fields=("codes", "features"))
    batch = next(data.batches())
    assert batch["features"].shape == (8, 1, 12) and batch["codes"].shape == (8, 2, 2)
    np.testing.assert_allclose(np.linalg.norm(batch["features"], axis=-1), 1, atol=1e-5)
