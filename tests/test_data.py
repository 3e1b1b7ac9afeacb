"""The stream of batches is a pure function of the config and one integer, and bad data is counted or named."""

import dataclasses
import io
import itertools
import logging
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from pyarrow import parquet

from t2i_jax.data import ArrayRecord, Data, DataError, Folder, Mixture, Parquet, TarShards, Tfds, write_records
from t2i_jax.data.order import Order, shuffled
from t2i_jax.data.pipeline import restarted
from t2i_jax.data.records import may_become
from t2i_jax.data.transforms import may_flip, open_image, to_square


def lengths(captions):
    """A tokenizer: the length of a caption and its first letters."""
    ids = np.array([[len(c), *c.encode()[:4].ljust(4)] for c in captions], np.int32)
    return ids, ids > 0


def picture(i, size=(12, 10)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(i, kind="PNG", size=(12, 10)):
    buffer = io.BytesIO()
    Image.fromarray(picture(i, size)).save(buffer, kind)
    return buffer.getvalue()


def records(n, start=0, **more):
    for i in range(start, start + n):
        yield {"image": encoded(i), "captions": [f"c{i}", f"again {i}"], "key": f"k{i}", "label": i, **more}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    write_records(path, [*records(50), *records(7, 50, split="val")], shards=3)
    return str(path)


@pytest.fixture
def data(stored):
    return Data(ArrayRecord(stored), image_size=8, batch_size=8, crop="random", flip=True, seed=3)


def take(data, n, text=lengths, **options):
    stream = data.batches(text, **options)
    try:
        return list(itertools.islice(stream, n))
    finally:
        stream.close()


def joined(batches, name):
    return np.concatenate([b[name] for b in batches])


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_a_batch(data):
    (batch,) = take(data, 1)
    assert batch["image"].shape == (8, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    assert batch["text"].shape == (8, 5) and batch["text"].dtype == np.int32 and batch["text_mask"].dtype == bool
    assert take(data, 1, text=None)[0].keys() == {"image", "label"}


@pytest.mark.parametrize(
    "hosts", [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 7), (1, 2, 3, 4, 5, 6))]
)
def test_hosts_make_their_rows_of_the_same_batches(data, hosts):
    alone = take(data, 9)
    for rows in hosts:
        assert_same([{name: x[list(rows)] for name, x in batch.items()} for batch in alone], take(data, 9, rows=rows))


@pytest.mark.parametrize("position", [8, 24, 56])
def test_going_on_equals_a_straight_run(data, position):
    assert_same(take(data, 9)[position // 8 :], take(data, 9 - position // 8, position=position))


def test_any_position_is_a_place_in_one_stream(data):
    straight, moved = take(data, 9), take(data, 5, position=13, rows=range(4, 8))
    wanted = [13 + 8 * n + 4 + k for n in range(5) for k in range(4)]
    for name in straight[0]:
        np.testing.assert_array_equal(joined(straight, name)[wanted], joined(moved, name))


def test_workers_and_threads_change_nothing(data):
    alone = take(data, 6)
    assert_same(alone, take(dataclasses.replace(data, workers=2), 6))
    assert_same(alone, take(dataclasses.replace(data, threads=8, prefetch=1), 6))


def workers():
    return [p for p in multiprocessing.active_children() if "prefetch" in p.name]


def test_a_worker_that_is_killed_is_replaced(data, caplog):
    stream = dataclasses.replace(data, workers=1, prefetch=1).batches(lengths)
    got = [next(stream)]
    for worker in workers():
        worker.kill()
    got += itertools.islice(stream, 5)
    stream.close()
    assert_same(got, take(data, 6))
    assert "died and is restarted" in caplog.text and "exit code -9" in caplog.text
    assert not workers()


def test_workers_that_die_again_and_again_are_an_error():
    def stream(done):
        yield from range(done, 2)
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    given = restarted(stream)
    assert [next(given), next(given)] == [0, 1]
    with pytest.raises(DataError, match=r"died 3 times at batch 2(.|\n)*exit code -9(.|\n)*Data\.workers=0"):
        next(given)


@pytest.mark.parametrize("source", [ArrayRecord, Folder, TarShards, Parquet])
def test_data_in_an_object_store_have_to_be_mounted(source):
    with pytest.raises(DataError, match="gs://bucket/set: (.|\n)*mount the bucket"):
        source("gs://bucket/set").open()


def test_epochs_are_different_permutations(data):
    order = Order([50], None, 3)
    epochs = [[order[g] for g in range(50 * e, 50 * e + 50)] for e in range(4)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    labels = joined(take(data, 6), "label")
    np.testing.assert_array_equal(labels, [order[g] for g in range(48)])


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_shuffle_is_a_permutation(n):
    assert sorted(shuffled(i, n, 5) for i in range(n)) == list(range(n))


def test_shuffle_is_uniform():
    counts = np.zeros((6, 6))
    for seed in range(6000):
        counts[[shuffled(i, 6, seed) for i in range(6)], np.arange(6)] += 1
    assert abs(counts / 1000 - 1).max() < 0.13  # four standard deviations


def test_mixture_keeps_its_weights(tmp_path, stored):
    write_records(tmp_path / "small", records(5, 100))
    mixture = Mixture((ArrayRecord(stored), ArrayRecord(str(tmp_path / "small"))), (3, 1))
    data = Data(mixture, image_size=8, batch_size=10, seed=1)
    labels = joined(take(data, 20), "label")
    small = labels >= 100
    assert small.sum() == 50
    assert np.abs(np.cumsum(small) - np.arange(1, 201) / 4).max() <= 1  # evenly, not only in the end
    assert set(labels[small]) == set(range(100, 105))
    assert len(set(labels[~small][:50])) == 50  # a whole epoch of the large one before anything comes again
    assert_same(take(data, 12)[7:], take(data, 5, position=70))
    plain = Data(Mixture(mixture.sources), image_size=8, batch_size=11)
    assert sorted(joined(take(plain, 5), "label")) == [*range(50), *range(100, 105)]


def test_every_nth_record(stored):
    thin = Data(ArrayRecord(stored, every=4), image_size=8)
    whole = Data(ArrayRecord(stored), image_size=8)
    assert [r["key"] for r in thin.examples()] == [r["key"] for r in whole.examples()][::4]
    with pytest.raises(DataError, match="every is 0"):
        ArrayRecord(stored, every=0).open()


def test_mixture_errors(stored):
    with pytest.raises(DataError, match="2 sources and 1 weights"):
        Mixture((ArrayRecord(stored), ArrayRecord(stored)), (1.0,)).open()
    with pytest.raises(DataError, match="positive"):
        Mixture((ArrayRecord(stored),), (-1.0,)).open()


def test_splits(data, tmp_path):
    assert [r["key"] for r in data.examples("val")] == [r["key"] for r in records(7, 50)]
    example = data.examples("val")[2]
    assert example["image"].shape == (8, 8, 3) and len(example["captions"]) == 2
    (first,) = take(data, 1, split="val")
    np.testing.assert_array_equal(first["label"] >= 50, True)
    assert all(row[1] == ord("c") for row in first["text"])  # the first caption
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        data.examples("test")
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="held_out"):
        Data(Folder(str(tmp_path))).examples("val")
    assert len(Data(ArrayRecord("nowhere"), held_out=Folder(str(tmp_path))).examples("val")) == 1


def test_records_round_trip(tmp_path):
    record = {
        "image": b"\x00\xff",
        "captions": ["a “cat”", ""],
        "key": "x",
        "codes": np.arange(12, dtype=np.int32).reshape(3, 4),
        "features": np.ones((2, 3), np.float16),
        "text_mask": np.array([True, False]),
        "latents": np.zeros((0, 4), np.float32),
        "score": np.float32(0.5),
        "license": None,
    }
    index = write_records(tmp_path / "r", [record], about={"name": "mine"})
    assert index == {"name": "mine", "splits": {"train": {"count": 1, "shards": 1}}}
    back = ArrayRecord(str(tmp_path / "r")).open()[0]
    assert back.keys() == record.keys()
    for name, value in record.items():
        np.testing.assert_array_equal(back[name], value)
        assert getattr(back[name], "dtype", None) == getattr(value, "dtype", None) or name == "score"
    with pytest.raises(TypeError, match="'odd'"):
        write_records(tmp_path / "s", [{"odd": object()}])
    assert not (tmp_path / "s").exists() and [p.name for p in tmp_path.iterdir()] == ["r"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not be overwritten"):
        write_records(tmp_path / "mine", [record])


def test_precomputed_arrays_pass_through(tmp_path):
    """Codes as they are; of features, which have a row for each caption, one row."""
    rows = [
        {
            "codes": np.full((2, 2), i),
            "features": np.full((2, 3, 4), [[[10 * i]], [[10 * i + 1]]], np.float16),
            "text_mask": np.array([[True, False, False], [True, True, False]]),
        }
        for i in range(6)
    ]
    write_records(tmp_path / "r", rows)
    data = Data(ArrayRecord(str(tmp_path / "r")), batch_size=6)
    (batch,) = take(data, 1)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "codes": ((6, 2, 2), "int32"),
        "features": ((6, 3, 4), "float16"),
        "text_mask": ((6, 3), "bool"),
    }
    chosen = batch["features"][:, 0, 0] - 10 * batch["codes"][:, 0, 0]
    assert set(chosen) == {0, 1}
    np.testing.assert_array_equal(batch["text_mask"].sum(1), 1 + chosen)
    (first,) = take(dataclasses.replace(data, caption="first"), 1)
    np.testing.assert_array_equal(first["features"][:, 0, 0], 10 * first["codes"][:, 0, 0])


def test_swapped_captions_are_those_of_one_other_record(tmp_path):
    row = lambda i: {"codes": np.full((1,), i), "captions": ["x" * (1 + i)], "features": np.full((1, 1, 1), i)}
    write_records(tmp_path / "r", [row(i) for i in range(8)])
    data = Data(ArrayRecord(str(tmp_path / "r")), batch_size=8, fields=("codes",), swapped_captions=True)
    pairs = [
        {(int(code[0]), int(text[0])) for code, text in zip(batch["codes"], batch["text"], strict=True)}
        for batch in take(data, 3)
    ]
    assert pairs[0] == pairs[1] == pairs[2]
    assert sorted(text - 1 for _, text in pairs[0]) == list(range(8)) and all(c + 1 != t for c, t in pairs[0])
    (batch,) = take(dataclasses.replace(data, fields=("codes", "features")), 1, text=None)
    assert not np.any(batch["features"][:, 0, 0] == batch["codes"][:, 0])
    assert data.examples()[3]["captions"] == ["xxxx"]  # what is measured with has its own


def test_stored_features_that_are_not_wanted_leave_captions_to_the_tokenizer(tmp_path):
    row = {"codes": np.zeros((2, 2)), "features": np.zeros((1, 3, 4)), "text_mask": np.ones((1, 3), bool)}
    write_records(tmp_path / "r", [row | {"captions": ["a cat"]}] * 4)
    (batch,) = take(Data(ArrayRecord(str(tmp_path / "r")), batch_size=4, fields=("codes",)), 1)
    assert set(batch) == {"codes", "text", "text_mask"} and (batch["text"][:, 0] == len("a cat")).all()
    write_records(tmp_path / "odd", [{"codes": np.zeros((2, 2 + i), np.int32)} for i in range(2)])
    with pytest.raises(DataError, match="'codes'"):
        take(Data(ArrayRecord(str(tmp_path / "odd")), batch_size=2), 1, text=None)


# --- pictures and captions --------------------------------------------------------------------------------------------


def test_transparency_is_laid_on_white():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (np.asarray(open_image(clear)) == 255).all()
    half = np.zeros((4, 4, 4), np.uint8)
    half[..., 3] = 128
    assert abs(int(np.asarray(open_image(half))[0, 0, 0]) - 127) <= 1
    grey = Image.fromarray(np.full((4, 4), 257 * 100, np.uint16))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    assert (np.asarray(open_image(buffer.getvalue())) == 100).all()


def test_crops():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (to_square(open_image(wide), 10) == 200).all()
    square = picture(0, (8, 8))
    np.testing.assert_array_equal(to_square(open_image(square), 8), square)
    views = {to_square(open_image(picture(0)), 8, np.random.default_rng(s), 0.5).tobytes() for s in range(5)}
    assert len(views) == 5


def test_flip_spares_what_has_a_side(tmp_path):
    assert may_flip(["a cat"], ("left", "flag"))
    assert not may_flip(["a cat", "cat looking LEFT"], ("left", "flag")) and may_flip(["leftovers"], ("left",))
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None], (8, 8, 3))
    for captions, flips in (["a cat"], True), (["flag of Chad"], False):
        rows = [{"image": np.ascontiguousarray(ramp), "captions": captions} for _ in range(32)]
        write_records(tmp_path / "r", rows)
        (batch,) = take(Data(ArrayRecord(str(tmp_path / "r")), image_size=8, batch_size=32, flip=True), 1)
        mirrored = batch["image"][:, 0, 0, 0] == 7
        assert (5 < mirrored.sum() < 27) if flips else not mirrored.any()


def test_a_long_caption_and_an_empty_one(tmp_path):
    write_records(tmp_path / "r", [{"image": encoded(0), "captions": [c]} for c in ("x" * 10_000, "")])
    data = Data(ArrayRecord(str(tmp_path / "r")), batch_size=2, empty_captions=True)
    (batch,) = take(data, 1)
    assert sorted(batch["text"][:, 0]) == [0, 10_000]
    (batch,) = take(dataclasses.replace(data, empty_captions=False), 1)
    assert batch["text"][:, 0].tolist() == [10_000, 10_000]  # a blank caption is none


# --- broken records ---------------------------------------------------------------------------------------------------


def test_broken_records_are_replaced_and_counted(tmp_path, caplog):
    rows = list(records(100))
    rows[17]["image"] = rows[17]["image"][:60]
    rows[18]["image"] = b"no picture"
    rows[40]["captions"] = []
    write_records(tmp_path / "r", rows)
    data = Data(ArrayRecord(str(tmp_path / "r")), image_size=8, batch_size=20, broken_share=0.01, broken_count=10)
    with caplog.at_level(logging.WARNING):
        batches = take(data, 5)
    assert sorted(joined(batches, "label")) == sorted([*(set(range(100)) - {17, 18, 40}), 19, 19, 41])
    assert all(any(k in m for m in caplog.messages) for k in ("k17", "k18", "k40"))
    assert_same(batches[3:], take(data, 2, position=60))
    parts = [take(data, 5, rows=range(p, p + 10)) for p in (0, 10)]
    np.testing.assert_array_equal(batches[4]["image"], joined([p[4] for p in parts], "image"))
    with pytest.raises(DataError, match=r"broken_share = 0.01.*k(17|18|40)"):
        take(dataclasses.replace(data, broken_count=2), 5)


def test_nothing_but_broken_records(tmp_path):
    write_records(tmp_path / "r", [{"image": b"junk", "captions": ["x"], "key": "bad"} for _ in range(4)])
    with pytest.raises(DataError, match="bad"):
        take(Data(ArrayRecord(str(tmp_path / "r")), batch_size=2), 1)


def test_corrupt_jpeg_in_a_folder(tmp_path, caplog):
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i, "JPEG", (40, 40))[: 300 if i == 5 else None])
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n\nanother one\n")
    data = Data(Folder(str(tmp_path)), image_size=8, batch_size=30)
    assert take(data, 1)[0]["image"].shape == (30, 8, 8, 3)
    assert "5.jpg" in caplog.text
    assert len(list(data.examples())) == 29 and data.examples()[0]["captions"] == ["caption 0", "another one"]


# --- sources ----------------------------------------------------------------------------------------------------------


def write_tar(path, n, start=0):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + n):
            members = {
                "jpg": encoded(i, "JPEG"),
                "txt": f"caption {i}\n".encode(),
                "json": b'{"n": %d, "also": "b"}' % i,
            }
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_tar_shards(tmp_path, caplog):
    write_tar(tmp_path / "00000.tar", 10)
    write_tar(tmp_path / "00001.tar", 5, 10)
    source = TarShards(str(tmp_path), fields=("n",))
    for _ in range(2):  # scanned, then from the kept index
        reader = source.open()
        assert len(reader) == 15
        assert [reader[i]["n"] for i in range(15)] == list(range(15))
        assert reader[12]["captions"] == ["caption 12"] and reader[12]["key"] == "00001.tar:00012"
        assert reader[3]["image"] == encoded(3, "JPEG")
    assert TarShards(str(tmp_path / "*.tar"), caption="also").open()[3]["captions"] == ["b"]
    data = Data(source, image_size=8, batch_size=5, workers=1)
    assert_same(take(data, 3), take(dataclasses.replace(data, workers=0), 3))


@pytest.mark.parametrize("cut", [100, 700, 5000, -10240, "end mark"])
def test_truncated_tar(tmp_path, caplog, cut):
    path = tmp_path / "00000.tar"
    write_tar(path, 10)
    if cut == "end mark":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        cut = last.offset_data + tarfile.BLOCKSIZE
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"00000\.tar.*cut short"):
        TarShards(str(tmp_path)).open()
    if cut not in (100, 700):
        reader = TarShards(str(tmp_path), truncated="skip").open()
        assert 0 < len(reader) <= 10 and "00000.tar" in caplog.text
        assert all(reader[i]["image"] == encoded(i, "JPEG") for i in range(len(reader)))


def test_parquet(tmp_path):
    images = [encoded(i) for i in range(9)]
    plain = pyarrow.table({"image": images, "caption": [f"c{i}" for i in range(9)], "id": list(range(9))})
    parquet.write_table(plain, tmp_path / "a.parquet", row_group_size=2)
    hub = pyarrow.table(
        {"image": [{"bytes": b, "path": ""} for b in images], "caption": [["x", "y"]] * 9, "id": [7] * 9}
    )
    parquet.write_table(hub, tmp_path / "b.parquet", row_group_size=4)
    reader = Parquet(str(tmp_path), key="id", cache=2).open()
    assert len(reader) == 18
    assert [reader[i]["image"] for i in range(18)] == images * 2
    assert reader[4]["captions"] == ["c4"] and reader[4]["key"] == "4" and reader[11]["captions"] == ["x", "y"]
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'TEXT'; the columns are image, caption, id"):
        Parquet(str(tmp_path), captions="TEXT").open()
    data = Data(Parquet(str(tmp_path), cache=1), image_size=8, batch_size=9, threads=8)
    assert take(data, 3)[2]["image"].shape == (9, 8, 8, 3)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(DataError, match=r"a\.parquet"):
        Parquet(str(tmp_path)).open()


@pytest.mark.parametrize("source", [Folder, ArrayRecord, TarShards, Parquet])
def test_empty_and_missing_folders_are_named(tmp_path, source):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(DataError, match=str(path)):
            source(str(path)).open()


def test_a_missing_shard_is_named(tmp_path):
    write_records(tmp_path / "r", records(4), shards=2)
    (tmp_path / "r" / "train-00001-of-00002.arrayrecord").unlink()
    with pytest.raises(DataError, match="train-00001-of-00002"):
        ArrayRecord(str(tmp_path / "r")).open()


def test_rows_and_positions_that_there_are_not(data):
    for rows in ((), (0, 8), (-1, 0)):
        with pytest.raises(DataError, match="a batch has the rows 0 to 7"):
            take(data, 1, rows=rows)
    with pytest.raises(DataError, match="-1"):
        take(data, 1, position=-1)


def test_tfds(tmp_path):
    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Eight pictures."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["cat", "big_dog"]),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(8):
                texts = [{"text": f"one {i}"}, {"text": f"two {i}"}]
                yield i, {"image": io.BytesIO(encoded(i)), "label": i % 2, "captions": texts}

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (folder,) = tmp_path.glob("tiny/1.0.0")
    reader = Tfds(str(folder), captions="captions/text", label="label").open()
    found = sorted(tuple(reader[i]["captions"]) for i in range(len(reader)))
    assert found == [(f"one {i}", f"two {i}") for i in range(8)]
    named = Tfds(str(folder), split="train[:50%]", captions=None, label="label")
    assert {c for r in Data(named, image_size=8).examples() for c in r["captions"]} == {
        "a photo of a cat",
        "a photo of a big dog",
    }
    data = Data(dataclasses.replace(named, split="train"), image_size=8, batch_size=8)
    assert sorted(take(data, 1)[0]["label"]) == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match=r"Tfds\.captions is 'caption'; the features are captions, image, label"):
        Tfds(str(folder)).open()


@pytest.mark.parametrize("path", [".", "..", "/", "inner/.."])
def test_the_working_folder_is_not_put_in_place_whole(path, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="working folder"):
        may_become(Path(path))
    may_become(Path("inner"))
