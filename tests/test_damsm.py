"""DAMSM from training to use: as a text encoder, as an image encoder, by published files, in `t2i evaluate`."""

import io
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import t2i_jax as t2i
from t2i_jax.cli import main
from t2i_jax.convert import restore
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.params import named
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.evaluation.alignment import retrieve_captions
from t2i_jax.features.classifiers import PADDED, InceptionLayers
from t2i_jax.features.trunks import EfficientNetTrunk, PixelTrunk
from t2i_jax.models.damsm import DAMSM, EfficientNet, Inception, Pixels
from t2i_jax.networks.condition import SentenceAndWords
from t2i_jax.nn.resize import aligned_bilinear
from t2i_jax.storage.artifacts import Artifact, bundle_files, load_artifact, resolve_files, save_artifact
from t2i_jax.text.cut import unread
from t2i_jax.text.damsm import CaptionWords, DamsmText, load_image_encoder
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures import toys
from tests.fixtures.captions import dictionary
from tests.fixtures.commands import refused
from tests.fixtures.families import fresh
from tests.fixtures.torchfiles import save_torch

WORDS = ("<end>", "a", "red", "blue", "disc", "box", "_", "caf", "7")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
CONFIG = DAMSM(len(WORDS), 6, embed=8, dim=8, trunk=Pixels(4, 2))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return dictionary(tmp_path_factory.mktemp("words") / "captions.pickle", WORDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory, words):
    """A DAMSM trained for a few steps on images of one colour, and the folder of its run."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)

    def record(n, split):
        colour, shape = ("red", "blue")[n % 2], ("disc", "box")[n // 2 % 2]
        image = (np.array(COLOURS[colour]) * rng.uniform(0.7, 1, (8, 8, 1))).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        said = {"captions": [f"a {colour} {shape}"], "label": n % 4, "split": split, "key": f"{split}{n}"}
        return {"image": file.getvalue(), **said}

    write_records(folder / "data", [record(n, split) for split in ("train", "val", "test") for n in range(8)])
    train = Train(steps=3, optimizer=Optimizer("adam", 1e-2, warmup=0), evaluate_every=3, preview_every=0)
    data = Data(ArrayRecord(str(folder / "data")), image_size=8, batch_size=8)
    t2i.train(Experiment(CONFIG, data, train, text=CaptionWords(words, 6)), folder / "run")
    return folder / "run"


def test_captions_are_split_as_published(words):
    text = CaptionWords(words, 3)
    assert text.tokens(["A RED,disc!", "café _ box-7", "日本 unknown", "a\ufffd\ufffdred"]) == [
        [1, 2, 4],
        [7, 6, 5, 8],
        [],
        [1, 2],
    ]
    ids, mask = text(["a red", "", "a red disc box"])
    np.testing.assert_array_equal(ids, [[1, 2, 0], [0, 0, 0], [1, 2, 4]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [0, 0, 0], [1, 1, 1]])
    assert text.cut(["a red disc box"]) == [1] and "not read from 'box' on" in unread(text, ["a red disc box"])
    assert text.pieces == len(WORDS)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Evil(), "holds an object of .*print"),
        ({}, "but a dict"),
        ([[], [], {}, []], "it has list, list, dict, list"),
        ([[], [], {0: "a"}, {"a": 1}], "differ in the word 'a'"),
        ([[], [], {3: "a"}, {"a": 3}], "its 1 ids are not 0 to 0"),
    ],
)
def test_what_is_no_dictionary_is_said(content, said, tmp_path, capsys):
    (tmp_path / "captions.pickle").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=f"captions.pickle: .*{said}"):
        CaptionWords(str(tmp_path / "captions.pickle"))(["a"])
    assert not capsys.readouterr().out


def test_a_run_measures_what_it_matches(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in logged for name in line}
    for part in ("words", "sentence"):
        for what in ("/image_to_text", "/text_to_image", "_accuracy"):
            assert f"val/text/{part}{what}" in names


def test_its_text_encoder_gives_a_sentence_and_words(run):
    text, condition = DamsmText(str(run)), SentenceAndWords(8, 6)
    assert text.feature_shape == condition.batch_spec()["features"].shape
    encoder, (ids, mask) = text.load(), text(["a red disc", ""])
    features = jax.jit(text.features)(encoder, ids, mask)
    vectors, sentence = jax.jit(encoder.__call__)(ids, mask)
    np.testing.assert_allclose(features, jnp.concatenate([sentence[:, None], vectors], 1), atol=1e-6)
    assert features[0].any() and not features[1].any() and not features[0, 4:].any()
    tokens = condition.init(jax.random.key(0), 8)
    batch = {"features": features, "text_mask": mask}
    np.testing.assert_allclose(tokens.whole(batch, jnp.zeros(2, bool)), sentence, atol=1e-6)


def test_a_released_model_takes_its_weights_and_nothing_else_of_the_run(run, tmp_path):
    text = DamsmText(str(run))
    moved = bundle_files(text, tmp_path, whole=True)
    assert moved.path == "text"
    assert {p.name for p in (tmp_path / "text").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "vocabulary.pickle",
    }
    found = resolve_files(moved, tmp_path)
    ids, mask = found(["a red disc"])
    features = lambda text: jax.jit(text.features)(text.load(), ids, mask)
    np.testing.assert_array_equal(features(found), features(text))


def test_its_image_encoder_reads_images(run):
    encoder, artifact = load_image_encoder(run), load_artifact(run)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    regions, code = jax.jit(lambda m, x: m(x))(encoder, images)
    assert regions.shape == (2, 4, 8)
    features = CONFIG.frozen()(images)
    np.testing.assert_allclose(code, artifact.model.image(*features)[1], atol=1e-5)


def test_published_files_are_read_and_converted(words, tmp_path):
    model = fresh(DAMSM(len(WORDS), 6, embed=8, dim=8, cell="gru", trunk=None))
    tensors = restore("damsm", DAMSM(len(WORDS), cell="gru", trunk=None), model)
    path = tmp_path / "DAMSM" / "text_encoder200.pth"
    path.parent.mkdir()
    save_torch(tensors, path)
    dictionary(path.parent / "captions.pickle", WORDS)
    text = DamsmText(str(path), CaptionWords(words, 6))
    assert text.feature_shape == (7, 8)
    ids, mask = map(jnp.asarray, text(["a blue box"]))
    expected = model.text.features(ids, mask)
    np.testing.assert_allclose(text.features(text.load(), ids, mask), expected, atol=1e-6)
    main(["convert", "damsm", str(path.parent), "--out", str(tmp_path / "ours"), "--length", "6"])
    ours = DamsmText(str(tmp_path / "ours"))
    np.testing.assert_allclose(ours.features(ours.load(), *map(jnp.asarray, ours(["a blue box"]))), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="no tokenizer belongs to it"):
        DamsmText(str(path))(["a"])
    with pytest.raises(ConfigError, match="text encoder of a DAMSM alone"):
        load_image_encoder(path)
    with pytest.raises(ConfigError, match="text encoder alone is not trained"):
        load_artifact(tmp_path / "ours").config.objectives()
    more = dictionary(tmp_path / "more.pickle", (*WORDS, "x"))
    with pytest.raises(ConfigError, match="has 9 words, and its tokenizer 10 ids"):
        DamsmText(str(path), CaptionWords(more)).load()


def test_a_published_image_encoder_has_its_trunk_in_the_file(tmp_path):
    units = jax.eval_shape(lambda key: InceptionLayers(key, "torchvision"), jax.random.key(0))
    tensors = {"emb_features.weight": np.zeros((8, 768, 1, 1), np.float16)}
    tensors |= {
        "emb_cnn_code.weight": np.zeros((8, 2048), np.float16),
        "emb_cnn_code.bias": np.arange(8.0, dtype=np.float16),
    }
    for name, w in named(units).items():
        unit, _, part = name.rpartition(".")
        if part == "w":
            i, j, c, f = w.shape
            tensors[f"{unit}.conv.weight"] = np.zeros((f, c, i, j), np.float16)
            tensors |= {
                f"{unit}.bn.{n}": np.ones(f, np.float16) for n in ("weight", "bias", "running_mean", "running_var")
            }
    save_file(tensors, tmp_path / "image_encoder200.safetensors")
    encoder = load_image_encoder(tmp_path / "image_encoder200.safetensors")
    regions, code = jax.eval_shape(lambda m, x: m(x), encoder, jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32))
    assert regions.shape == (2, 289, 8) and code.shape == (2, 8)
    np.testing.assert_array_equal(encoder.heads.code.b[...], np.arange(8))
    text = DAMSM(len(WORDS), embed=8, dim=8, trunk=None)
    save_file(restore("damsm", text, fresh(text)), tmp_path / "text_encoder200.safetensors")
    main(["convert", "damsm", str(tmp_path), "--out", str(tmp_path / "ours"), "--align-corners=false"])
    ours = load_image_encoder(tmp_path / "ours")
    assert encoder.trunk.align_corners and not ours.trunk.align_corners
    np.testing.assert_array_equal(ours.heads.code.b[...], np.arange(8))
    with pytest.raises(ConfigError, match="Inception needs a file"):
        Inception().load()


class Ones:
    """An EfficientNet-Lite0 whose features are 1."""

    def maps(self, images, size):
        return jnp.ones((len(images), size // 16, size // 16, 112)), jnp.ones((len(images), 1280))


def test_a_trunk_may_give_colours_too():
    images = jnp.linspace(-1, 1, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)
    regions, whole = EfficientNetTrunk(Ones(), 64, PixelTrunk(16, 4))(images)
    assert (regions.shape[-1], whole.shape[-1]) == EfficientNet(64, pixels=16).widths == (112 + 48, 1280 + 768)
    np.testing.assert_array_equal(regions[..., :112], 1)
    np.testing.assert_allclose(whole[:, 1280:].mean(-1), images.mean((1, 2, 3)), atol=1e-5)
    with pytest.raises(ConfigError, match=r"EfficientNet\.pixels 10: a multiple of the 4 regions of a side"):
        EfficientNet(64, pixels=10)


def test_images_are_resized_corner_to_corner():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5, 2)), jnp.float32)
    y = aligned_bilinear(x, (5, 9))
    np.testing.assert_allclose(y[:, ::2, ::2], x, atol=1e-6)
    np.testing.assert_allclose(y[:, 1, 0], (x[:, 0, 0] + x[:, 1, 0]) / 2, atol=1e-6)
    np.testing.assert_allclose(aligned_bilinear(x, (1, 1))[:, 0, 0], x[:, 0, 0], atol=1e-6)


def test_poolings_of_torchvision_count_the_padding():
    pooled = PADDED(jnp.ones((1, 4, 5, 1)))
    np.testing.assert_allclose(pooled[0, [0, 0, 1], [0, 1, 1], 0], [4 / 9, 6 / 9, 1], rtol=1e-6)


def test_r_precision_is_among_other_classes():
    codes = np.eye(4)[[0, 1, 1]]
    sentences, classes = np.eye(4)[[0, 1, 2]], ["a", "b", "c"]
    found = retrieve_captions(codes, sentences, classes, sentences, classes)
    assert found.choices == 3 and found.top(1) == pytest.approx(2 / 3) and found.chance(1) == pytest.approx(1 / 3)
    assert retrieve_captions(codes, sentences, ["a", "b", "b"], sentences, ["a", "b", "b"]).choices == 2
    with pytest.raises(ValueError, match="all captions are of one class"):
        retrieve_captions(codes, sentences, "aaa", sentences, "aaa")


def test_evaluate_measures_it(run, tmp_path):
    main(["evaluate", str(run), "--out", str(tmp_path), "--count", "4", "--spaces", "pixels"])
    numbers = json.loads((tmp_path / "report.json").read_text())["numbers"]
    for name in ("new words", "new concepts"):  # four classes, so that three captions are of others
        assert numbers[f"{name}/matching/r_precision"]["chance"] < 0.5


def test_another_model_is_no_damsm(tmp_path, capsys):
    save_artifact(Artifact(toys.Squares(), {}), tmp_path / "codec", "# Squares\n")
    said = refused(
        capsys, "evaluate", tmp_path / "codec", "--data", "configs/glyphs_kl.py", "--matching", tmp_path / "codec"
    )
    assert "holds a Squares; a DAMSM or a CLIP" in said
