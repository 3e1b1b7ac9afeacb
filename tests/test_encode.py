"""Codes computed once: those computed in training, in the order of the records, however the work was cut."""

import dataclasses
import signal
import time

import jax
import numpy as np
import pytest

from t2i_jax import encode
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core.conditions import TextSpec
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig, put_on_mesh
from t2i_jax.data import ArrayRecord, Data, DataError, write_records
from t2i_jax.encode import encode_splits
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training import trainer
from t2i_jax.training.experiment import Experiment
from t2i_jax.training.trainer import Trainer
from tests.fixtures.processes import outputs, started

PARTS = AutoencoderConfig(8, (1, 2), blocks=1, latent=4, attention=(), middle_attention=False, groups=4)
CODEC = VQGAN(PARTS, QuantizerConfig(codes=16, dim=4), perceptual=0.0)
FAMILY = with_fields(
    AR(), vocabulary=16, grid=(4, 4), width=16, depth=1, heads=2, condition=ClassEmbedder(4), dropout=0.0
)

CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.training.experiment import Experiment
experiment = Experiment(with_fields(AR(16, (4, 4)), width=16, depth=1, heads=2, condition=ClassEmbedder(4)),
                        Data(ArrayRecord("{0}/data"), image_size=8, batch_size=8), codec="{0}/codec")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Pictures, and a codec as a released model."""
    path = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    image = lambda: rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    rows = [{"image": image(), "captions": [f"c{i}"], "key": f"k{i}", "label": i % 4} for i in range(40)]
    rows[5]["image"] = b"no picture"
    write_records(path / "data", rows, shards=3)
    save_artifact(Artifact(CODEC, CODEC.init(jax.random.key(0))), path / "codec", "# A codec\n")
    (path / "config.py").write_text(CONFIG.format(path))
    return path


@pytest.fixture(scope="module")
def experiment(store):
    data = Data(ArrayRecord(str(store / "data")), image_size=8, batch_size=8)
    return Experiment(FAMILY, data, mesh=MeshConfig(1, 1, 1), codec=str(store / "codec"))


@pytest.fixture(scope="module")
def whole(store, experiment):
    index = encode_splits(experiment, store / "whole", ["train"], 8)
    assert index["splits"]["train"] == {"count": 39, "shards": 1, "order": "blocks"}
    return records(store / "whole")


def records(path):
    reader = ArrayRecord(str(path)).open()
    return [reader[i] for i in range(len(reader))]


def same(a, b):
    assert [r["key"] for r in a] == [r["key"] for r in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x["codes"], y["codes"])
        assert x["captions"] == y["captions"] and x["label"] == y["label"]


def test_records_keep_their_order_and_broken_ones_are_left_out(whole):
    assert [r["key"] for r in whole] == [f"k{i}" for i in range(40) if i != 5]
    assert whole[0]["codes"].shape == (4, 4) and whole[0]["codes"].dtype == np.uint16 and "image" not in whole[0]


def test_work_that_was_cut_off_goes_on(store, experiment, whole, monkeypatch):
    """The third file is not written; what was before it is not computed again."""
    out, write, made = store / "cut", encode.write_file, []

    def failing(path, rows):
        made.append(path.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return write(path, rows)

    monkeypatch.setattr(encode, "write_file", failing)
    with pytest.raises(KeyboardInterrupt):
        encode_splits(experiment, out, ["train"], 8, block=10)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"cut\.partial holds unfinished work(.|\n)*block: 10 -> 20"):
        encode_splits(experiment, out, ["train"], 8, block=20)
    encode_splits(experiment, out, ["train"], 8, block=10)
    assert [name.split("-")[1] for name in made] == ["00000", "00001", "00002", "00002", "00003"]
    assert not out.with_name("cut.partial").exists()
    same(records(out), whole)


def test_a_trainer_loads_a_codec_on_the_host(experiment, tmp_path, monkeypatch):
    """Not onto every device of its mesh, before it is given its shardings there."""
    loaded = []
    monkeypatch.setattr(
        trainer, "put_on_mesh", lambda tree, layout: loaded.extend(jax.tree.leaves(tree)) or put_on_mesh(tree, layout)
    )
    frozen = Trainer(dataclasses.replace(experiment, mesh=MeshConfig(2, 4)), tmp_path).frozen
    assert loaded and all(len(x.devices()) == 1 for x in loaded)
    assert all(len(x.devices()) == 8 for x in jax.tree.leaves(frozen))


def test_training_on_codes_is_training_on_pictures(store, experiment, whole, tmp_path):
    """The same examples in the same order, so the same losses. Pictures here are whole: no crop and no flip differs."""
    good = store / "good"
    write_records(good, [r for r in records(store / "data") if isinstance(r["image"], np.ndarray)])
    losses = {}
    for name, path in {"pictures": good, "codes": store / "whole"}.items():
        data = dataclasses.replace(experiment.data, source=ArrayRecord(str(path)))
        trainer = Trainer(dataclasses.replace(experiment, data=data), tmp_path / name)
        with jax.set_mesh(trainer.mesh):
            state, batches = trainer.start(), trainer.batches(0)
            losses[name] = []
            for _, batch in zip(range(3), batches, strict=False):
                assert ("image" in batch) == (name == "pictures")
                state, metrics = trainer.step(state, trainer.frozen, batch)
                losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["codes"], losses["pictures"], rtol=1e-6)


def start(store, out, count=1, block=1):
    """`t2i encode` in several processes, each with one device."""
    command = ["-m", "t2i_jax.cli", "encode", store / "config.py", "--out", out, "--splits", "train"]
    return started([*command, "--batch-size", "8", "--block", block], count, env={"T2I_HEARTBEAT": "10"})


@pytest.mark.slow
def test_processes_share_the_work_and_go_on_after_a_kill(store, whole):
    """Two processes, one of them killed; four end what they began. The result is that of one process."""
    partial = store / "shared.partial"
    first, second = start(store, store / "shared", 2, block=4)
    while first.poll() is None and not list(partial.glob("train-*")):
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    output = first.communicate(timeout=120)[0]
    assert first.returncode not in (0, 2), output
    done = {p.name: p.stat().st_mtime_ns for p in partial.glob("train-*")}
    assert done and not (store / "shared").exists()
    outputs(start(store, store / "shared", 4, block=4))
    assert all((store / "shared" / name).stat().st_mtime_ns == t for name, t in done.items())
    same(records(store / "shared"), whole)


# --- what cannot be stored --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A frozen text encoder whose features are the lengths of captions; some captions cannot be tokenised."""

    spec = TextSpec(features=True)
    feature_shape = 1, 1

    def __call__(self, captions):
        if any("bad" in c for c in captions):
            raise ValueError("this caption is bad")
        ids = np.array([[len(c)] for c in captions], np.int32)
        return ids, ids > 0

    def load(self):
        return {"scale": np.ones((), np.float32)}

    def features(self, model, ids, mask):
        return ids[..., None] * model["scale"]


@pytest.fixture
def captioned(tmp_path):
    """An experiment without a codec, whose records 1 to 4 cannot all be used."""
    rows = [
        {"image": np.full((8, 8, 3), i, np.uint8), "captions": [f"c{i}"] * (1 + i % 2), "key": f"k{i}"}
        for i in range(12)
    ]
    rows[1]["captions"], rows[2]["captions"], rows[3]["image"] = [], ["bad"], b"no picture"
    rows[4]["image"] = np.full((6, 8, 3), 4, np.uint8)
    write_records(tmp_path / "data", rows)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=8, batch_size=8, smallest_side=8)
    return Experiment(FAMILY, data, mesh=MeshConfig(1, 1, 1), text=Lengths())


@pytest.mark.parametrize("block", [100, 2, 1])
def test_what_is_left_out_is_named_and_counted(captioned, tmp_path, caplog, capsys, block):
    """Also where all records of a block are left out; images stay, as nothing stands for them."""
    index = encode_splits(captioned, tmp_path / "out", ["train"], 4, block=block)
    assert index["splits"]["train"]["count"] == 8
    stored = records(tmp_path / "out")
    assert [r["key"] for r in stored] == ["k0", *(f"k{i}" for i in range(5, 12))]
    for r in stored:
        i = int(r["key"][1:])
        np.testing.assert_array_equal(r["features"][:, 0, 0], [len(f"c{i}")] * (1 + i % 2))
        np.testing.assert_array_equal(r["image"], np.full((8, 8, 3), i))
        assert not {"tokens", "file"} & r.keys()
    for key, fault in {"k1": "the caption is blank|no caption", "k2": "this caption is bad", "k3": "no image"}.items():
        (message,) = [m for m in caplog.messages if f"{key} in " in m]
        assert any(word in message for word in fault.split("|")) and ".arrayrecord:" in message
    summary = "of 12 records are left out: 3 as broken, 1 as under Data.smallest_side = 8"
    assert f"train: {summary}" in caplog.text and "train: 8 of 12 records are stored" in capsys.readouterr().err


def test_too_many_broken_records_stop_the_work(captioned, tmp_path):
    few = dataclasses.replace(captioned, data=dataclasses.replace(captioned.data, broken_count=2))
    with pytest.raises(DataError, match=r"3 of 4 records are broken, more than Data\.broken_share(.|\n)*k3 in "):
        encode_splits(few, tmp_path / "out", ["train"], 4)
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_record_that_can_be_stored(captioned, tmp_path):
    none = dataclasses.replace(captioned, data=dataclasses.replace(captioned.data, smallest_side=9))
    with pytest.raises(DataError, match="the split 'train' has 12 records, and none that can be stored"):
        encode_splits(none, tmp_path / "out", ["train"], 4)
    assert not (tmp_path / "out").exists()


def test_captions_that_are_missing_can_be_taken(captioned, tmp_path):
    taken = dataclasses.replace(captioned, data=dataclasses.replace(captioned.data, empty_captions=True))
    encode_splits(taken, tmp_path / "out", ["train"], 4)
    second = records(tmp_path / "out")[1]
    assert second["key"] == "k1" and second["captions"] == [""] and second["features"].ravel().tolist() == [0]
