"""A fault of one record stays one record: named, counted, replaced or left out, and limited."""

import dataclasses
import io
import itertools
import logging
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_jax.core.errors import ConfigError
from t2i_jax.core.specs import FieldSpec, check_batch
from t2i_jax.data import ArrayRecord, Data, DataError, Mixture, write_records
from t2i_jax.data.examples import Tally

IMAGE = FieldSpec((8, 8, 3), "uint8")
LABEL = FieldSpec((), "int32", 0, 9)
TEXT = {"text": FieldSpec((4,), "int32", 0, 99), "text_mask": FieldSpec((4,), "bool")}


def picture(value, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def stored(path, count=20, **faults):
    """Records 0 ... count - 1 with labels i % 10; faults: fields of record 3 in place of the right ones."""
    rows = [{"image": picture(i), "captions": [f"c{i}"], "key": f"k{i}", "label": i % 10} for i in range(count)]
    rows[3] |= faults
    write_records(path / "r", rows, shards=2)
    return Data(ArrayRecord(str(path / "r")), image_size=8, batch_size=10)


class Tokens:
    """Ids of a caption's bytes; some captions cannot be tokenised."""

    def __call__(self, captions):
        if any("bad" in c for c in captions):
            raise UnicodeEncodeError("utf-8", "bad", 0, 1, "surrogates not allowed")
        ids = np.array([[len(c), *c.encode()[:3].ljust(3)] for c in captions], np.int32) % 100
        return ids, ids > 0


def take(data, n=2, **options):
    stream = data.batches(**options)
    try:
        return list(itertools.islice(stream, n))
    finally:
        stream.close()


def values(batches):
    return sorted(np.concatenate([b["image"][:, 0, 0, 0] for b in batches]).tolist())


FAULTS = {
    "a label out of range": {"label": 10},
    "a negative label": {"label": -1},
    "a label beyond 32 bits": {"label": 2**32 + 1},
    "a label that is a word": {"label": "poodle"},
    "a label that is a float": {"label": 3.0},
    "a label that is a truth value": {"label": True},
    "a label that is null": {"label": None},
    "a label that is a list": {"label": [3]},
    "no caption": {"captions": []},
    "a blank caption": {"captions": [" \0"]},
    "a caption that is a number": {"captions": [7]},
    "a caption that cannot be tokenised": {"captions": ["bad"]},
    "a cut image": {"image": picture(3)[:50]},
    "an empty image": {"image": b""},
    "an image that is a word": {"image": "3.png"},
    "an image that is null": {"image": None},
    "an image array of another kind": {"image": np.zeros((3, 8, 8), np.uint8)},
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("workers", [0])
def test_a_fault_is_one_broken_record(tmp_path, caplog, name, workers):
    data = stored(tmp_path, **FAULTS[name])
    spec = {"image": IMAGE, "label": LABEL, **TEXT}
    batches = take(data, text=Tokens(), spec=spec)
    assert values(batches) == sorted([*(set(range(20)) - {3}), 4])  # the next one in its place
    for batch in batches:
        check_batch(spec, batch)
    (message,) = [m for m in caplog.messages if "broken record" in m]
    assert "k3 in " in message and ".arrayrecord:1 (" in message and "BytesIO" not in message
    with pytest.raises(DataError, match=r"1 of 10 examples met a broken record.*k3 in .*\.arrayrecord:1"):
        take(dataclasses.replace(data, broken_count=0), text=Tokens(), spec=spec)


def test_a_fault_is_one_broken_record_in_workers(tmp_path):
    data = stored(tmp_path, label="poodle", captions=["bad"])
    spec = {"image": IMAGE, "label": LABEL, **TEXT}
    alone = take(data, text=Tokens(), spec=spec)
    for a, b in zip(alone, take(dataclasses.replace(data, workers=1), text=Tokens(), spec=spec), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_model_does_not_take_is_not_looked_at(tmp_path, caplog, name):
    (field,) = FAULTS[name]
    spec = {"image": IMAGE, "label": LABEL, **TEXT}
    for lost in {"label": ["label"], "captions": [*TEXT], "image": ["image"]}[field]:
        del spec[lost]
    batches = take(stored(tmp_path, **FAULTS[name]), text=Tokens(), spec=spec)
    assert [b.keys() for b in batches] == [spec.keys()] * 2 and "broken record" not in caplog.text


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"image": FieldSpec((16, 16, 3), "uint8")}, r"'image' has shape 8x8x3; the model takes 16x16x3"),
        ({"label": FieldSpec((), "int32", 0, 0)}, r"'label' holds \d; the model takes 0 to 0"),
        ({"codes": FieldSpec((4, 4), "int32", 0, 9)}, r"there is no 'codes', which the model takes"),
        ({"image": IMAGE, **TEXT, "text": FieldSpec((9,), "int32")}, r"'text' has shape 4; the model takes 9"),
        ({"image": IMAGE, **TEXT, "text": FieldSpec((4,), "int32", 0, 1)}, r"'text' holds \d+; the model takes 0 to 1"),
    ],
)
def test_data_of_another_kind_than_the_model_takes_end_a_run_at_once(tmp_path, spec, message):
    write_records(tmp_path / "r", [{"image": picture(i), "captions": ["c"], "label": 1 + i % 9} for i in range(300)])
    data = Data(ArrayRecord(str(tmp_path / "r")), image_size=8, batch_size=2)
    with pytest.raises(DataError, match=rf"none of 100 records can be used(.|\n)*\.arrayrecord:\d+ \({message}"):
        take(data, text=Tokens(), spec=spec)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_codes_of_any_whole_numbers(tmp_path, dtype):
    write_records(tmp_path / "r", [{"codes": np.full((2, 2), i, dtype)} for i in range(8)])
    data = Data(ArrayRecord(str(tmp_path / "r")), batch_size=4)
    (batch,) = take(data, 1, spec={"codes": FieldSpec((2, 2), "int32", 0, 7)})
    assert batch["codes"].dtype == np.int32
    with pytest.raises(DataError, match="takes 0 to 3"):
        take(dataclasses.replace(data, broken_count=0), 2, spec={"codes": FieldSpec((2, 2), "int32", 0, 3)})


def test_a_tokenizer_that_cannot_be_used_is_no_fault_of_records(tmp_path):
    def missing(captions):
        raise FileNotFoundError("there is no vocabulary v.model")

    with pytest.raises(FileNotFoundError, match=r"v\.model"):
        take(stored(tmp_path), text=missing)


def test_records_without_captions_can_be_taken(tmp_path, caplog):
    data = dataclasses.replace(stored(tmp_path, captions=[]), empty_captions=True)
    batches = take(data, text=Tokens())
    assert values(batches) == list(range(20)) and "broken" not in caplog.text
    assert sorted(np.concatenate([b["text"][:, 0] for b in batches]))[0] == 0
    assert len(list(data.examples(captions=True))) == 20


def test_a_record_is_replaced_by_one_of_its_own_source(tmp_path):
    """Also the last one of a source; where all of a source are broken, no other stands in for it."""
    for name, first in (("a", 0), ("b", 100)):
        rows = [{"image": picture(first + i)} for i in range(10)]
        rows[9]["image"] = b"no picture"
        write_records(tmp_path / name, rows)
    write_records(tmp_path / "c", [{"image": b"no picture"}] * 3)
    parts = [ArrayRecord(str(tmp_path / name)) for name in "abc"]
    for weights in (None, (1, 1)):
        data = Data(Mixture((parts[0], parts[1]), weights), image_size=8, batch_size=20)
        assert values(take(data, 1)) == [0, 0, *range(1, 9), 100, 100, *range(101, 109)]
    with pytest.raises(DataError, match="none of 3 records can be used"):
        take(Data(Mixture((parts[0], parts[2]), (1, 1)), image_size=8, batch_size=20))


# --- small images -----------------------------------------------------------------------------------------------------


def test_a_source_of_any_size_costs_the_same():
    class Long:
        def __len__(self):
            return 10**10

        def __getitem__(self, i):
            return {"label": i % 1000}

        def key(self, i):
            return str(i)

        def notes(self, captions):
            return []

        def open(self):
            return self

    start = time.perf_counter()
    batch = next(Data(Long(), batch_size=64).batches())  # pyright: ignore[reportArgumentType]
    assert len(set(batch["label"].tolist())) > 30 and time.perf_counter() - start < 5


def test_small_images_are_left_out_and_are_not_broken(tmp_path, caplog):
    rows = [{"image": picture(i, (20, 9 if i % 4 else 7)), "key": f"k{i}"} for i in range(20)]
    write_records(tmp_path / "r", rows)
    data = Data(ArrayRecord(str(tmp_path / "r")), image_size=8, batch_size=10, smallest_side=9, broken_count=0)
    assert values(take(data)) == sorted(i if i % 4 else i + 1 for i in range(20))
    assert len([m for m in caplog.messages if "smallest_side = 9" in m]) == 1 and "broken" not in caplog.text
    examples = data.examples()
    assert [r["key"] for r in examples] == [f"k{i}" for i in range(20) if i % 4]
    assert examples.summary() == "of 20 records are left out: 5 as under Data.smallest_side = 9"
    with pytest.raises(DataError, match=r"none of 20 records can be used \(0 broken, 20 too small\)"):
        take(dataclasses.replace(data, smallest_side=10))


# --- one by one -------------------------------------------------------------------------------------------------------


def test_examples_are_counted_and_limited(tmp_path, caplog):
    data = stored(tmp_path, image=b"no picture")
    examples = data.examples()
    assert [r["key"] for r in examples.block(0, 20, threads=2)] == [f"k{i}" for i in range(20) if i != 3]
    assert examples.summary() == "of 20 records are left out: 1 as broken"
    (message,) = [m for m in caplog.messages if "left out" in m]
    assert "k3 in " in message and ".arrayrecord:1 (no image: it is a text file)" in message
    with pytest.raises(DataError, match=r"k3 in .*arrayrecord:1 \(no image"):
        examples[3]
    with pytest.raises(DataError, match=r"1 of 4 records are broken, more than Data\.broken_share"):
        list(dataclasses.replace(data, broken_count=0).examples())


def test_evenly_spaced_records_are_those_that_can_be_read(tmp_path):
    examples = stored(tmp_path, image=b"no picture").examples()
    assert [r["key"] for r in examples.spaced(20)] == [f"k{i}" for i in range(20) if i != 3]
    assert [r["key"] for r in examples.spaced(3)] == ["k0", "k10", "k19"]
    assert examples.spaced(0) == [] and len(examples.spaced(100)) == 19
    only = stored(tmp_path).examples()
    assert [r["key"] for r in only.spaced(5)] == ["k0", "k5", "k10", "k14", "k19"]


def test_missing_captions_of_examples_are_told_or_left_out(tmp_path, caplog):
    data = stored(tmp_path, captions=[])
    assert len(list(data.examples())) == 20
    assert "there are records without a caption, the first: k3" in caplog.text
    assert len(list(data.examples(captions=True))) == 19
    tokenised = list(data.examples(text=Tokens()))
    assert len(tokenised) == 19 and tokenised[0]["tokens"][0].shape == (1, 4)


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=3), max_size=50), st.integers(0, 5), st.floats(0, 1))
@settings(deadline=None)
def test_counts_make_sense(faults, count, share):
    """What is broken is never more than what was seen, and the limit is passed where the message says so."""
    tally = Tally("records are broken", share, count, lambda: ())
    try:
        for several in faults:
            tally.add([several], 0)
    except DataError as error:
        assert str(error).startswith(f"{tally.broken} of {tally.seen} records are broken")
        assert tally.broken > count and tally.broken > share * tally.seen
    else:
        broken = sum(map(bool, faults))
        assert tally.broken == broken <= tally.seen == len(faults)
        assert broken <= max(count, share * len(faults))


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("batch_size", -4),
        ("image_size", 0),
        ("smallest_crop", 0.0),
        ("smallest_crop", 1.5),
        ("smallest_crop", float("nan")),
        ("crop", "left"),
        ("caption", "all"),
        ("workers", -1),
        ("threads", -1),
        ("prefetch", -1),
        ("broken_share", -0.1),
        ("broken_share", float("nan")),
        ("broken_count", -1),
        ("smallest_side", -1),
        ("seed", -1),
        ("fields", ("imag",)),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=rf"Data\.{name} "):
        Data(ArrayRecord("x"), **{name: value})


@pytest.mark.parametrize("threads, prefetch, workers", [(0, 0, 0), (0, 4, 0), (2, 0, 0), (0, 0, 1)])
def test_no_threads_and_nothing_ahead_make_the_same_batches(tmp_path, threads, prefetch, workers):
    data = stored(tmp_path)
    other = dataclasses.replace(data, threads=threads, prefetch=prefetch, workers=workers)
    assert values(take(data)) == values(take(other))


def test_the_data_can_be_described(tmp_path):
    write_records(tmp_path / "r", [{"codes": np.zeros(2), "split": s} for s in ("train", "train", "val")])
    data = Data(ArrayRecord(str(tmp_path / "r")))
    described = data.describe(("train", "val"))
    assert {split: one["records"] for split, one in described.items()} == {"train": 2, "val": 1}
    assert data.describe() == {"train": described["train"]}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"splits": 3}', "<html></html>", '{"splits": {"train": {}}}'])
def test_a_damaged_index_is_named(tmp_path, text):
    stored(tmp_path)
    (tmp_path / "r" / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json: this is no index of a data set"):
        ArrayRecord(str(tmp_path / "r")).open()


@pytest.mark.parametrize("cut", [0, 100, 70_000, -20])
def test_a_damaged_file_of_records_is_named(tmp_path, cut):
    stored(tmp_path)
    file = tmp_path / "r" / "train-00001-of-00002.arrayrecord"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.arrayrecord: this is no whole ArrayRecord file"):
        ArrayRecord(str(tmp_path / "r")).open()


def test_readers_can_be_pickled(tmp_path):
    reader = stored(tmp_path).source.open()
    assert pickle.loads(pickle.dumps(reader))[5]["key"] == reader[5]["key"] == "k5"


def test_a_vocabulary_leaves_out_what_is_no_caption(tmp_path, capsys, caplog):
    from t2i_jax.cli import main

    rows = [{"image": b"no picture", "captions": [f"a red square {i}" if i else 7], "key": f"k{i}"} for i in range(9)]
    write_records(tmp_path / "r", rows)
    (tmp_path / "c.py").write_text(
        "from t2i_jax.data import ArrayRecord, Data\nfrom t2i_jax.models.ar import AR\n"
        "from t2i_jax.core.family import with_fields\n"
        "from t2i_jax.networks.condition import ClassEmbedder\nfrom t2i_jax.training.experiment import Experiment\n"
        f"experiment = Experiment(with_fields(AR(16, (4, 4)), width=16, depth=1, heads=2, condition=ClassEmbedder(4)), "
        f"Data(ArrayRecord({str(tmp_path / 'r')!r})))\n"
    )
    run = lambda size: main(
        ["data", "vocab", str(tmp_path / "c.py"), "--out", str(tmp_path / "v.model"), f"--size={size}"]
    )
    with caplog.at_level(logging.WARNING):
        run(5000)
    printed = capsys.readouterr().err
    assert "k0 in " in caplog.text and "of 9 records are left out: 1 as broken" in printed
    from t2i_jax.text.sentencepiece import SentencePiece

    size = SentencePiece(str(tmp_path / "v.model")).pieces
    assert f"vocabulary of {size} pieces, as the captions do not give 5000, from 8 captions" in printed
    for bad in (-1, 0, 100, 265, 2**40):
        with pytest.raises(SystemExit) as stop:
            run(bad)
        says = f"no vocabulary of size {bad} from 8 captions" if 0 < bad < 2**31 else f"--size {bad}: 1 to"
        assert stop.value.code == 2 and says in capsys.readouterr().err
