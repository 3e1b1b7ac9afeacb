"""Data as people have them are found to be what they are: each kind of source, and the captions of each."""

import json
from collections import Counter

import numpy as np
import pytest

from t2i_jax.data import ArrayRecord, Data, DataError, Folder, Mixture, Parquet, TarShards, write_records
from t2i_jax.data.found import caption_fields, find_source
from tests.fixtures import odd_pictures


class Words:
    """A tokenizer: the first number of a caption, and how many words it has."""

    def __call__(self, captions):
        numbers = [next(int(w) for w in c.replace(",", " ").split() if w.isdigit()) for c in captions]
        ids = np.stack([numbers, [len(c.split()) for c in captions]], 1).astype(np.int32)
        return ids, np.ones(ids.shape, bool)


def captions(source):
    reader = source.open()
    return [list(reader[i]["captions"]) for i in range(len(reader))]


MADE = {
    "txt": (lambda p: odd_pictures.plain(p), Folder),
    "jsonl": (lambda p: odd_pictures.imagefolder(p, "jsonl"), Folder),
    "csv": (lambda p: odd_pictures.imagefolder(p, "csv"), Folder),
    "tar": (lambda p: odd_pictures.tars(p), TarShards),
    "tar, json": (lambda p: odd_pictures.tars(p, caption="alt_text"), TarShards),
    "hub": (lambda p: odd_pictures.hub(p), Parquet),
}


@pytest.mark.parametrize("name", MADE)
def test_each_kind_is_found_with_its_captions(name, tmp_path):
    make, kind = MADE[name]
    found = find_source(str(make(tmp_path / "set")))
    assert isinstance(found.source, kind) and not found.classes
    assert sorted(c[0] for c in captions(found.source)) == sorted(f"a picture of {n}" for n in range(12))
    batch = next(Data(found.source, image_size=8, batch_size=12).batches(Words()))
    assert sorted(batch["text"][:, 0]) == list(range(12))


def test_nested_folders_are_searched_for_tars_and_parquet(tmp_path):
    odd_pictures.tars(tmp_path / "a" / "b" / "one", 4)
    odd_pictures.tars(tmp_path / "a" / "two", 6)
    odd_pictures.hub(tmp_path / "c", 5)
    found = find_source(str(tmp_path))
    assert isinstance(found.source, Mixture) and len(found.source.open()) == 4 + 6 + 5


def test_a_file_and_a_glob(tmp_path):
    odd_pictures.tars(tmp_path / "t")
    odd_pictures.hub(tmp_path / "h")
    for path in ("t/00000.tar", "t/*.tar", "h/data/train-*.parquet", "h/data/test-00000-of-00001.parquet"):
        assert len(find_source(str(tmp_path / path)).source.open()) == 12
    odd_pictures.imagefolder(tmp_path / "i")
    assert len(find_source(str(tmp_path / "i" / "metadata.jsonl")).source.open()) == 12


def test_data_sets_of_this_library(tmp_path):
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "captions": ["x"], "split": s} for s in ("train", "val")]
    write_records(tmp_path / "set", rows)
    assert find_source(str(tmp_path / "set")).source == ArrayRecord(str(tmp_path / "set"))
    write_records(tmp_path / "val", rows[1:])
    assert len(find_source(str(tmp_path / "val")).source.open()) == 1


@pytest.mark.parametrize("at", [".", "images"])
def test_classes_by_folder(at, tmp_path):
    odd_pictures.classes(tmp_path / at)
    found = find_source(str(tmp_path))
    assert found.classes == ("Birds of prey", "cats", "dogs")
    reader = found.source.open()
    for i in range(len(reader)):
        record = reader[i]
        assert record["key"].startswith(found.classes[record["label"]])


def test_classes_where_there_are_captions_are_found_if_wanted(tmp_path):
    for n, name in enumerate(("a", "b", "a", "b")):
        odd_pictures.plain(tmp_path / name / f"{n}", 2)
    assert not find_source(str(tmp_path)).classes
    assert find_source(str(tmp_path), captions=False).classes == ("a", "b")


def test_classes_of_tars_and_parquet(tmp_path):
    found = find_source(str(odd_pictures.hub(tmp_path / "h", labels=True)))
    assert found.classes == ("cat", "dog", "bird") and found.source.open()[4]["label"] == 1
    found = find_source(str(odd_pictures.tars(tmp_path / "t", caption="cls")))
    assert found.classes == ("0", "1", "2") and found.source.open()[4]["label"] == 1


def test_the_training_split_of_an_imagefolder(tmp_path):
    odd_pictures.classes(tmp_path / "train", 9)
    odd_pictures.classes(tmp_path / "test", 6)
    found = find_source(str(tmp_path))
    assert len(found.source.open()) == 9 and found.classes == ("Birds of prey", "cats", "dogs")


def test_three_kinds_of_captions_are_drawn_by_their_weights(tmp_path):
    odd_pictures.three_kinds(tmp_path)
    found = find_source(str(tmp_path))
    assert found.source == Folder(str(tmp_path), ("txt", "caption", "json:tags"), (1.0, 1.0, 1.0))
    assert captions(found.source)[0] == ["picture 0", "a long caption of the picture 0", "picture, 0"]
    source = Folder(str(tmp_path), ("caption", "txt"), (3.0, 1.0))
    data = Data(source, image_size=8, batch_size=100)
    batch = next(data.batches(Words()))
    share = Counter(batch["text"][:, 1].tolist())[7] / 100
    assert abs(share - 0.75) < 0.13
    first = next(Data(source, source, image_size=8, batch_size=12).batches(Words(), split="val"))
    assert set(first["text"][:, 1].tolist()) == {7}


def test_weights_of_kinds_with_several_captions(tmp_path):
    """A kind is as often drawn however many captions it has, and an image without it has the other one alone."""
    odd_pictures.plain(tmp_path, 2, "")
    (tmp_path / "00.txt").write_text("1\n1\n1\n1\n")
    (tmp_path / "00.caption").write_text("1 2 3")
    (tmp_path / "01.caption").write_text("2 2 3")
    data = Data(Folder(str(tmp_path), ("txt", "caption"), (1.0, 1.0)), image_size=8, batch_size=400)
    rows = next(data.batches(Words()))["text"]
    assert abs((rows[rows[:, 0] == 1][:, 1] == 1).mean() - 0.5) < 0.12
    assert set(rows[rows[:, 0] == 2][:, 1].tolist()) == {3}


def test_weights_stay_with_stored_features(tmp_path):
    features = np.arange(3, dtype=np.float32)[:, None, None]
    record = {"captions": ["a", "b", "c"], "caption_weights": [0.0, 1.0, 0.0], "features": features}
    write_records(tmp_path / "set", [record])
    batch = next(Data(ArrayRecord(str(tmp_path / "set")), batch_size=20).batches())
    assert set(batch["features"].ravel().tolist()) == {1.0}


def test_folder_names_as_captions(tmp_path):
    odd_pictures.classes(tmp_path)
    found = captions(Folder(str(tmp_path), ("folder:a photo of {}",)))
    assert found[0] == ["a photo of Birds of prey"]


@pytest.mark.parametrize(
    ("kinds", "weights", "message"),
    [
        ((), (), "is empty"),
        (("text",), (), "has 'text'; the kinds are 'txt'"),
        (("json",), (), "has 'json'"),
        (("txt", "caption"), (1.0,), "one above 0 is needed for each"),
        (("txt",), (0.0,), "one above 0"),
        (("metadata:text",), (), "there is no metadata.jsonl and no metadata.csv"),
    ],
)
def test_kinds_that_there_are_not(kinds, weights, message, tmp_path):
    odd_pictures.plain(tmp_path)
    with pytest.raises(DataError, match=message):
        Folder(str(tmp_path), kinds, weights).open()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"metadata.jsonl: line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object, but a list"),
        ("{}", "line 2 names"),
    ],
)
def test_a_row_that_is_none_is_named(row, message, tmp_path):
    odd_pictures.imagefolder(tmp_path)
    file = tmp_path / "metadata.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], row, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        find_source(str(tmp_path))


def test_a_broken_json_is_a_fault_of_its_picture(tmp_path):
    odd_pictures.three_kinds(tmp_path)
    (tmp_path / "part 0" / "deep" / "00.json").write_text("{")
    reader = Folder(str(tmp_path), ("json:tags",)).open()
    faults = [reader[i]["captions"].fault for i in range(len(reader))]
    assert "00.json is no JSON" in faults[0] and not any(faults[1:])


def test_names_of_captions():
    row = {
        "url": "http://a",
        "image_url": "x",
        "caption": "a",
        "alt_text": "b",
        "text_file": "c",
        "width": 3,
        "key": "k",
    }
    assert caption_fields([row]) == ["caption", "alt_text"]
    assert caption_fields([{"captions": ["a", "b"]}, {"captions": []}, {"tags": [1]}]) == ["captions"]


def test_what_is_no_data_says_what_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "photos.zip").write_bytes(b"PK\3\4")
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.parquet").write_bytes(b"x")
    for name, message in {
        "empty": "it is empty",
        "zip": "unpack photos.zip first",
        "a.mp4": "a folder, tar files",
        "p": "no whole parquet file",
        "nothing": "there is no such file or folder",
        "*.jpg": "there is no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            find_source(str(tmp_path / name))
    for name, message in {
        "": "is empty",
        "gs://bucket/x": "mount the bucket",
        "no_such_set": "no data set of tfds",
    }.items():
        with pytest.raises(DataError, match=message):
            find_source(name)


def test_json_next_to_pictures_with_whole_names(tmp_path):
    odd_pictures.plain(tmp_path, 3, "")
    for n in range(3):
        (tmp_path / f"{n:02}.png.json").write_text(json.dumps({"prompt": f"picture {n}", "url": "u"}))
    found = find_source(str(tmp_path))
    assert found.source.captions == ("json:prompt",)
    assert captions(found.source) == [[f"picture {n}"] for n in range(3)]


def test_several_fields_of_tars_and_columns_of_parquet(tmp_path):
    """Each is a kind of captions; a field that repeats the text is none of its own."""
    import io
    import tarfile

    import pyarrow as pa
    from pyarrow import parquet

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            about = {"caption": f"text {n}", "alt_text": f"alt {n}", "url": "u"}
            parts = {
                "jpg": odd_pictures.data_of(n, "JPEG"),
                "txt": f"text {n}".encode(),
                "json": json.dumps(about).encode(),
            }
            for end, data in parts.items():
                info = tarfile.TarInfo(f"{n}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = find_source(str(tmp_path / "a.tar"))
    assert found.source.caption == "txt+alt_text"
    assert captions(found.source)[1] == ["text 1", "alt 1"]
    rows = {"image": [odd_pictures.data_of(n) for n in range(3)], "text": [f"text {n}" for n in range(3)]}
    rows["long_caption"] = [None, "long 1", "long 2"]
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    found = find_source(str(tmp_path / "a.parquet"))
    assert captions(found.source) == [["text 0"], ["text 1", "long 1"], ["text 2", "long 2"]]
    weighted = Parquet(str(tmp_path / "a.parquet"), captions="text+long_caption", weights=(1.0, 3.0)).open()
    assert weighted[0]["caption_weights"] == [1.0] and weighted[1]["caption_weights"] == [1.0, 3.0]
    with pytest.raises(DataError, match="Parquet.weights are"):
        Parquet(str(tmp_path / "a.parquet"), captions="text", weights=(1.0, 3.0)).open()
