"""CLIP: its losses on known numbers, training, and a run wherever a released CLIP is read."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import t2i_jax as t2i
from t2i_jax.cli import main
from t2i_jax.convert import restore
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import named
from t2i_jax.core.types import Compute
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.evaluation.alignment import classify, retrieve_pairs
from t2i_jax.evaluation.embedders import load_embedder
from t2i_jax.evaluation.neighbours import build_index
from t2i_jax.evaluation.rerank import Reranker
from t2i_jax.models.clip import CLIP
from t2i_jax.networks.clip import CLIPTowers
from t2i_jax.nn.contrastive import Pairs, bounded, kinds_of, sigmoid_loss, softmax_loss
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Discrete
from t2i_jax.storage.artifacts import Artifact, assign, load_artifact, save_artifact
from t2i_jax.storage.moved import moved, moves
from t2i_jax.text.clip import ClipCaption, ClipEmbedding, ClipText, load
from t2i_jax.text.damsm import CaptionWords
from t2i_jax.text.retrieval import Neighbours
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures.captions import dictionary
from tests.fixtures.clip_files import TINY, random_clip
from tests.fixtures.commands import refused
from tests.fixtures.families import fresh

WORDS = ("<end>", "a", "red", "blue", "green", "disc", "box")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}
BLOCK = Transformer(16, 1, 2, norm="layer", activation="gelu", bias=True)
TOWERS = CLIPTowers(BLOCK, BLOCK, dim=16, vocabulary=len(WORDS), length=6, last=True, size=8, patch=4)


def pairs_of(known=(True,) * 6, kinds=None, seed=0):
    rows = np.random.default_rng(seed).normal(size=(2, 6, 5))
    images, texts = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32) for x in rows)
    return Pairs(images, texts, jnp.asarray(known), None if kinds is None else jnp.asarray(kinds))


def kept(pairs):
    """Which other pairs are negatives, one by one."""
    known, kinds = np.asarray(pairs.known), None if pairs.kinds is None else np.asarray(pairs.kinds)
    same = lambda i, j: kinds is not None and kinds[i] == kinds[j]
    return [[i != j and known[i] and known[j] and not same(i, j) for j in range(6)] for i in range(6)]


CASES = {
    "plain": pairs_of(),
    "an empty caption": pairs_of((True, True, False, True, True, True)),
    "equal captions": pairs_of(kinds=[0, 1, 0, 2, 3, 0]),
    "none": pairs_of((False,) * 6),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_papers(name):
    pairs = CASES[name]
    cosines = np.asarray(pairs.images @ pairs.texts.T, np.float64)
    negative, known = np.array(kept(pairs)), np.asarray(pairs.known)
    mean = lambda x: x[known].mean() if known.any() else 0.0

    def entropy(logits, negative):
        own = np.diagonal(logits)
        return mean(np.log(np.exp(own) + (np.exp(logits) * negative).sum(1)) - own)

    both = (entropy(7 * cosines, negative) + entropy(7 * cosines.T, negative.T)) / 2
    logits = 7 * cosines - 3
    each = np.log1p(np.exp(-np.diagonal(logits))) + (np.log1p(np.exp(logits)) * negative).sum(1)
    found = mean(np.diagonal(cosines) >= np.where(negative, cosines, -2).max(1))
    for chunk in (0, 2, 4):  # also one that does not divide the batch
        softmax = jax.jit(lambda p, chunk=chunk: softmax_loss(p, 7.0, chunk))(pairs)
        sigmoid = jax.jit(lambda p, chunk=chunk: sigmoid_loss(p, 7.0, -3.0, chunk))(pairs)
        np.testing.assert_allclose(softmax[0], both, rtol=1e-5)
        np.testing.assert_allclose(sigmoid[0], mean(each), rtol=1e-5)
        np.testing.assert_allclose((softmax[1], sigmoid[1]), found, rtol=1e-6)


@pytest.mark.parametrize("loss", [softmax_loss, lambda p, scale, chunk: sigmoid_loss(p, scale, -1.0, chunk)])
def test_chunks_have_the_gradient_of_the_whole(loss):
    pairs = CASES["equal captions"]
    slope = lambda chunk: jax.jit(
        jax.grad(lambda x, scale: loss(pairs._replace(images=x), scale, chunk)[0], argnums=(0, 1))
    )(pairs.images, jnp.float32(3.0))
    whole = slope(-1)
    assert jnp.abs(whole[0]).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope(2), whole)


def test_a_bounded_scale_comes_back():
    slope = lambda x, sign: float(jax.grad(lambda x: sign * bounded(x, 0.0, 2.0))(x))
    assert [slope(x, 1.0) for x in (-1.0, 0.0, 1.0, 2.0, 3.0)] == [0, 0, 1, 1, 1]  # a step down
    assert [slope(x, -1.0) for x in (-1.0, 0.0, 1.0, 2.0, 3.0)] == [-1, -1, -1, 0, 0]
    assert [float(bounded(x, 0.0, 2.0)) for x in (-1.0, 1.0, 3.0)] == [0, 1, 2]


def test_equal_captions_are_known_by_their_tokens():
    ids = jnp.asarray([[3, 4, 5], [3, 4, 6], [3, 4, 5], [4, 3, 5], [0, 3, 4], [3, 4, 0]])
    mask = jnp.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    kinds = kinds_of(ids, mask).tolist()
    assert kinds[0] == kinds[1] and len(set(kinds)) == 5


def test_what_follows_a_caption_is_not_read():
    config = CLIP(dataclasses.replace(TOWERS, text=dataclasses.replace(BLOCK, depth=2)))
    model, rng = fresh(config), np.random.default_rng(0)
    ids = rng.integers(0, 7, (3, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[6], [3], [1]])
    read = jax.jit(model.texts)
    other = np.where(mask, ids, (ids + 1) % 7).astype(np.int32)
    np.testing.assert_array_equal(read(ids, mask), read(other, mask))
    first = np.where(np.arange(6) > 0, ids, (ids + 1) % 7).astype(np.int32)
    assert (np.abs(read(first, mask) - read(ids, mask)).max(1) > 1e-3).all()


def test_ranks_of_pairs_and_classes():
    a = np.eye(4, dtype=np.float32)
    b = np.stack([a[0], a[2], a[1], a[3]])
    found = retrieve_pairs(a, b, ["w", "x", "y", "z"])
    assert found.ranks.tolist() == [1, 4, 4, 1] and found.top(1) == 0.5 and found.chance(1) == 0.25
    alike = retrieve_pairs(a, b, ["w", "x", "x", "z"])  # the other of the pair is no wrong answer
    assert alike.ranks.tolist() == [1, 3, 3, 1]
    np.testing.assert_allclose(alike.chance(1), (1 / 4 + 1 / 3) / 2)
    ranks = classify(
        a[[0, 2]], np.stack([a[0], a[1], a[1], a[2]]), [np.array([0, 1]), np.array([2, 3])], np.array([0, 1])
    )
    assert ranks.ranks.tolist() == [1, 1] and ranks.choices == 2


def test_settings_that_cannot_be_are_refused():
    for fields, said in (
        ({"towers": dataclasses.replace(TOWERS, dim=0)}, "a common space"),
        ({"towers": dataclasses.replace(TOWERS, size=9)}, "multiple of patch 4"),
        ({"towers": dataclasses.replace(TOWERS, times=10)}, "for images with `noise`"),
        ({"towers": dataclasses.replace(TOWERS, times=10), "noise": Discrete("cosine")}, "this Discrete has 1000"),
    ):
        with pytest.raises(ConfigError, match=said):
            CLIP(**fields)
    with pytest.raises(ConfigError, match="it reads clean images"):
        _ = CLIP(TOWERS).process
    assert not CLIP(TOWERS).capabilities.classifier and CLIP(TOWERS, noise=Discrete("cosine")).capabilities.classifier


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour, and a CLIP that was trained on them for a while."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)

    def record(n, split):
        colour, shape = list(COLOURS)[n % 3], ("disc", "box")[n % 2]
        image = np.full((8, 8, 3), 255)
        half = (slice(None, 4),) if shape == "disc" else (slice(None), slice(None, 4))
        image[half] = np.array(COLOURS[colour]) * rng.uniform(0.8, 1)
        file = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(file, "PNG")
        said = {"captions": [f"a {colour} {shape}"], "label": n % 6, "split": split, "key": f"{split}{n}"}
        return {"image": file.getvalue(), "label_text": f"{colour} {shape}", **said}

    write_records(folder / "data", [record(n, split) for split in ("train", "val", "test") for n in range(24)])
    words = dictionary(folder / "captions.pickle", WORDS)
    train = Train(steps=60, optimizer=Optimizer("adam", 5e-3, warmup=5), evaluate_every=60, preview_every=0)
    data = Data(ArrayRecord(str(folder / "data")), image_size=8, batch_size=24)
    t2i.train(Experiment(CLIP(TOWERS), data, train, text=CaptionWords(words, 6)), folder / "run")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return str(folder / "run")


def pictures(folder):
    """An image for each of CAPTIONS."""
    records = Data(ArrayRecord(str(folder / "data")), image_size=8).examples("test", True).spaced(24)
    shown = {r["captions"][0]: r["image"] for r in records}
    return np.stack([shown[caption] for caption in CAPTIONS])


CAPTIONS = ["a red disc", "a blue box", "a green disc", "a red box", "a blue disc", "a green box"]


def test_it_learned_its_pairs(run):
    logged = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in reversed(logged) if "val/accuracy" in line)
    assert found["val/accuracy"] == found["val/image_accuracy"] == 1.0


def test_it_is_evaluated_with_chance_beside(run, folder, tmp_path):
    main(["evaluate", run, "--out", str(tmp_path), "--count", "24"])
    numbers = json.loads((tmp_path / "report.json").read_text())["numbers"]
    for part in ("new words", "new concepts"):
        for way in ("image_to_text", "text_to_image"):
            one = numbers[f"{part}/{way}/r@1"]
            assert one["value"] == 1.0 and one["pairs"] == 24
            np.testing.assert_allclose(one["chance"], 1 / 21)  # each caption is there four times
            assert f"{part}/{way}/r@10" in numbers
        shot = numbers[f"{part}/zero_shot/top1"]
        assert shot["classes"] == 6 and shot["images"] == 24 and shot["value"] >= 0.5
        assert numbers[f"{part}/matching/r_precision"]["value"] == 1.0


def test_it_serves_as_a_released_one_does(run, folder, tmp_path):
    model, images = load_artifact(run).model, pictures(folder)
    signed = jnp.asarray(images, jnp.float32) / 127.5 - 1
    text = ClipEmbedding(run)
    towers, (ids, mask) = text.load(), text([*CAPTIONS, ""])
    assert text.feature_shape == (1, 16) and mask[:, 0].tolist() == [True] * 6 + [False]
    captions, seen = jax.jit(text.features)(towers, ids, mask)[:, 0], jax.jit(text.image_features)(towers, signed)[:, 0]
    own, real = CaptionWords(str(folder / "captions.pickle"), 6)(CAPTIONS)
    np.testing.assert_allclose(captions[:6], model.texts(jnp.asarray(own), jnp.asarray(real)), atol=1e-5)
    np.testing.assert_allclose(seen, model.images(signed), atol=1e-5)
    assert text.cut(["a red disc and a blue box"]) == [0]  # unknown words are dropped

    tokens = ClipText(run)
    tower, (ids, mask) = tokens.load(), tokens(CAPTIONS)
    features = jax.jit(tokens.features)(tower, ids, mask)
    assert features.shape[1:] == tokens.feature_shape == (6, 16) and mask.sum(1).tolist() == [3] * 6
    both = ClipCaption(run)
    found = jax.jit(both.features)(towers, *both(CAPTIONS))
    assert found.shape[1:] == both.feature_shape == (7, 16)
    np.testing.assert_allclose(found[:, 1:], features, atol=1e-5)
    unit = found[:, 0] / jnp.linalg.norm(found[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(unit, captions[:6], atol=1e-5)
    assert jax.jit(both.image_features)(towers, signed).shape == (6, 16)

    data = Data(ArrayRecord(str(folder / "data")), image_size=8)
    experiment = Experiment(CLIP(TOWERS), data, text=text)
    embedder = load_embedder("", text, "images", experiment.mesh.build(), 16)
    assert len(build_index(experiment, embedder, tmp_path / "all").rows) == 24
    near = Neighbours(text, str(tmp_path / "all"), 2)
    rows = jax.jit(near.features)(near.load(), *near(CAPTIONS))
    assert rows.shape == (6, 3, 16)
    cosine = jnp.einsum("bk,bsk->bs", unit, rows / jnp.linalg.norm(rows, axis=-1, keepdims=True))
    assert (cosine[:, 0] > 0.999).all() and (cosine[:, 1:] > 0).all()
    order, _ = Reranker(text, batch_size=4)([CAPTIONS[0]], images[None])
    assert order[0, 0] == 0


def test_a_released_one_may_be_moved(run, tmp_path):
    main(["release", run, "--out", str(tmp_path / "ours")])
    (tmp_path / "ours").rename(tmp_path / "there")
    for path in (run, str(tmp_path / "there")):
        assert ClipEmbedding(path)(CAPTIONS)[0].tolist() == ClipEmbedding(run)(CAPTIONS)[0].tolist()
    assert load(tmp_path / "there")[0] == TOWERS


def test_what_is_no_clip_of_clean_images_is_said(run, tmp_path, capsys):
    noised = CLIP(dataclasses.replace(TOWERS, times=1000), noise=Discrete("cosine"))
    save_artifact(Artifact(noised, fresh(noised)), tmp_path / "noised", "# CLIP\n")
    said = refused(capsys, "evaluate", run, "--matching", tmp_path / "noised")
    assert "holds a CLIP; a DAMSM or a CLIP of clean images is wanted" in said
    with pytest.raises(ConfigError, match="a CLIP of noised images; a CLIP of clean images"):
        ClipText(str(tmp_path / "noised")).load()
    with pytest.raises(ConfigError, match="no tokenizer belongs to it"):
        ClipText(str(tmp_path / "noised"))(["a"])
    with pytest.raises(ConfigError, match="those of its config"):
        ClipText(run, activation="gelu")(["a"])


# --------------------------------------------------------------------------------------------------- published files


def test_published_ones_are_trained_further_and_given_back(tmp_path):
    """Hugging Face's folder and OpenAI's names: to a model that is trained, serves as they do, and is written back."""
    (tmp_path / "hf").mkdir()
    random_clip(tmp_path / "hf")
    main(["convert", "clip_transformers", str(tmp_path / "hf"), "--out", str(tmp_path / "ours")])
    main(["convert", "clip_transformers", str(tmp_path / "ours"), "--back", "--out", str(tmp_path / "hf.safetensors")])
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "hf.safetensors")
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)
    main(["convert", "clip", str(tmp_path / "ours"), "--back", "--out", str(tmp_path / "openai.safetensors")])
    main(["convert", "clip", str(tmp_path / "openai.safetensors"), "--out", str(tmp_path / "again"), "--head-dim", "8"])
    artifact, again = load_artifact(tmp_path / "ours"), load_artifact(tmp_path / "again")
    block = dataclasses.replace(TINY.text, mlp=64)
    assert artifact.config.towers == dataclasses.replace(TINY, text=block, image=block)
    assert again.config.towers == dataclasses.replace(artifact.config.towers, end=None)
    for name, x in named(again.model).items():
        np.testing.assert_array_equal(x[...], named(artifact.model)[name][...])
    ours, theirs = ClipEmbedding(str(tmp_path / "ours")), ClipEmbedding(str(tmp_path / "hf"))
    captions = ["a cat", "cats and cats and cats", ""]
    features = [jax.jit(t.features)(t.load(), *t(captions)) for t in (ours, theirs)]
    np.testing.assert_allclose(*features, atol=1e-6)
    assert ours.cut(captions) == theirs.cut(captions)
    ids, mask = load_artifact(tmp_path / "ours").text(captions)
    images = np.zeros((3, 8, 8, 3), np.float32)
    batch = {"image": images, "text": jnp.asarray(ids), "text_mask": jnp.asarray(mask)}
    loss = jax.jit(lambda m, b: artifact.config.loss(m, b, jax.random.key(0)).loss)(artifact.model, batch)
    assert np.isfinite(loss)


def test_a_bias_makes_it_a_sigmoid_loss(tmp_path):
    config = CLIP(dataclasses.replace(TINY, end=None), "sigmoid", bias=-7.0)
    tensors = restore("clip", config, fresh(config))
    save_file(tensors, tmp_path / "siglip.safetensors")
    main(["convert", "clip", str(tmp_path / "siglip.safetensors"), "--out", str(tmp_path / "ours"), "--head-dim", "8"])
    artifact = load_artifact(tmp_path / "ours")
    assert artifact.config.loss_type == "sigmoid" and float(artifact.model.logit_bias[...]) == -7


def test_weights_under_older_names_are_read():
    """Those of `NoisedCLIP`, of which `test_old_runs` has a run."""
    model = jax.tree.map(np.asarray, fresh(CLIP(TOWERS)))
    old = {}
    for name, line in moved(model).items():
        parts = line.theirs(np.asarray(named(model)[name][...]))
        old |= {f"ema/{n}": x for n, x in zip(line.names, parts, strict=True) if n}
    found = moves(moved(model), old)
    assert found.keys() == {f"ema/{name}" for name in moved(model)}
    for name, move in found.items():
        now = named(model)[name.removeprefix("ema/")][...]
        assert move.shape(old).shape == now.shape
        np.testing.assert_array_equal(move.array(old), now)
    assert not moves(moved(model), {f"params/{k}": v for k, v in named(model).items()})


def test_a_narrow_dtype_changes_little():
    config, rng = CLIP(TOWERS), np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32),
        "text": rng.integers(0, 7, (4, 6)).astype(np.int32),
        "text_mask": np.arange(6) < np.array([[6], [3], [1], [2]]),
    }
    model = fresh(config)
    found = []
    for compute in (Compute(), Compute("bfloat16", remat="full")):
        one = config.with_compute(compute)
        weights = assign(one, {k: np.asarray(v[...]) for k, v in named(model).items()}, Path("a copy"))
        found.append(jax.jit(lambda m, b, one=one: one.loss(m, b, jax.random.key(0), False).loss)(weights, batch))
    np.testing.assert_allclose(*found, rtol=0.02)
    assert found[0] != found[1] and found[0].dtype == found[1].dtype == jnp.float32
