"""Columns as people write them: images and captions, or a line that names the file, the column or the row."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2i_jax.data import Data, DataError, Parquet


def image(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [image(i) for i in range(4)]
CAPTIONS = [f"a dog {i}" for i in range(4)]
LIST_OF_STRUCTS = [[{"text": c}] for c in CAPTIONS]


def struct(images, paths=(None,) * 4):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)], kind)


def write(folder, name="a", **columns):
    path = folder / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": IMAGES, "caption": CAPTIONS} | columns), path, row_group_size=2)
    return str(path)


def text(captions):
    return np.array([[len(c)] for c in captions], np.int32), np.ones((len(captions), 1), bool)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"image": struct(IMAGES)},
        {"image": pa.array(IMAGES, pa.large_binary()), "caption": pa.array(CAPTIONS, pa.large_string())},
        {"image": pa.array(IMAGES, pa.binary_view()), "caption": pa.array(CAPTIONS, pa.string_view())},
        {"caption": pa.array(CAPTIONS).dictionary_encode()},
        {"caption": [c.encode() for c in CAPTIONS]},
        {"caption": [[None, c] for c in CAPTIONS]},
        {"caption": ["\ufeff" + c + "\0" for c in CAPTIONS]},
    ],
)
def test_types_of_columns(tmp_path, columns):
    reader = Parquet(write(tmp_path, **columns)).open()
    assert [reader[i]["image"] for i in range(4)] == IMAGES
    assert [list(reader[i]["captions"]) for i in range(4)] == [[c] for c in CAPTIONS]
    assert [reader[i]["key"] for i in range(4)] == [f"a.parquet:{i}" for i in range(4)]


def test_rows_are_named_by_their_own_file(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "b", id=["x", "y", "z", "w"], caption=["", *CAPTIONS[1:]])
    reader = Parquet(str(tmp_path)).open()
    assert reader[5]["key"] == "b.parquet:1" and reader.key(5) == f"{tmp_path / 'b.parquet'}:1"
    data = Data(Parquet(str(tmp_path / "b.parquet"), key="id"), image_size=8, batch_size=4, broken_count=0)
    with pytest.raises(DataError, match=r"x in .*b\.parquet:0 \(the caption is blank\)"):
        next(data.batches(text))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image": [f"{i}.jpg" for i in range(4)]}, "column 'image' holds strings"),
        ({"image": [[b] for b in IMAGES]}, "column 'image' holds lists"),
        ({"image": [{"path": "a.jpg"}] * 4}, "column 'image' holds structs of path, without 'bytes'"),
        ({"image": [1, 2, 3, 4]}, "column 'image' holds int64"),
    ],
)
def test_columns_that_hold_no_images_are_refused_at_once(tmp_path, columns, message):
    with pytest.raises(DataError, match=rf"a\.parquet: the {message}"):
        Parquet(write(tmp_path, **columns)).open()


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image": struct([IMAGES[0], None, *IMAGES[2:]], ["a", "b.jpg", "c", "d"])}, r"null there; .*'b\.jpg'"),
        ({"image": [IMAGES[0], None, *IMAGES[2:]]}, "column 'image' is null there"),
        ({"caption": [CAPTIONS[0], None, *CAPTIONS[2:]]}, "column 'caption' is empty there"),
        ({"caption": [CAPTIONS[0], "", *CAPTIONS[2:]]}, "the caption is blank"),
        ({"caption": [[CAPTIONS[0]], [], *([c] for c in CAPTIONS[2:])]}, "column 'caption' is empty there"),
        ({"caption": [CAPTIONS[0].encode(), b"caf\xe9", *(c.encode() for c in CAPTIONS[2:])]}, "byte 3"),
        ({"label": [0, None, 1, 2]}, "there is no 'label'|'label' is null"),
    ],
)
def test_a_faulty_cell_is_one_broken_record(tmp_path, columns, message, caplog):
    from t2i_jax.core.specs import FieldSpec

    fields = tuple(columns.keys() & {"label"})
    data = Data(Parquet(write(tmp_path, **columns), fields=fields), image_size=8, batch_size=4)
    spec = {"image": FieldSpec((8, 8, 3), "uint8"), "text": FieldSpec((1,), "int32")}
    spec |= {"label": FieldSpec((), "int32", 0, 2)} if fields else {}
    batch = next(data.batches(text, spec=spec))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 2, 2, 3]
    (message_,) = [m for m in caplog.messages if "broken record" in m]
    import re

    assert re.search(rf"a\.parquet:1 \(.*({message})", message_)


@pytest.mark.parametrize(
    "captions", [[1.5, 2.5, 3.0, 4.0], [1, 2, 3, 4], LIST_OF_STRUCTS], ids=["floats", "ints", "structs"]
)
def test_captions_that_are_no_text_end_a_run_at_once(tmp_path, captions):
    data = Data(Parquet(write(tmp_path, caption=captions)), image_size=8, batch_size=4)
    with pytest.raises(DataError, match=r"none of 4 records can be used.*a\.parquet:\d \(a caption is a string, not"):
        next(data.batches(text))
    assert next(data.batches())["image"].shape == (4, 8, 8, 3)  # nobody asked for them


def test_a_column_of_captions_is_not_needed(tmp_path):
    path = write(tmp_path, label=[0, 1, 2, 3])
    reader = Parquet(path, captions=None, fields=("label",)).open()
    assert [reader[i]["label"] for i in range(4)] == [0, 1, 2, 3] and reader[0]["captions"] == []
    with pytest.raises(DataError, match=r"a\.parquet:\d \(Parquet\.captions is None"):
        next(Data(Parquet(path, captions=None), image_size=8, batch_size=4).batches(text))


def test_no_row_group_is_kept(tmp_path):
    with pytest.raises(DataError, match=r"Parquet\.cache is 0"):
        Parquet(write(tmp_path), cache=0).open()


def test_a_string_in_place_of_an_image_opens_no_file(tmp_path):
    (tmp_path / "b.png").write_bytes(IMAGES[0])
    path = write(tmp_path, image=[{"bytes": str(tmp_path / "b.png")}] * 4)
    with pytest.raises(DataError, match=r"a path is none"):
        next(Data(Parquet(path), image_size=8, batch_size=4).batches())


def test_the_copy_of_a_repository_of_the_hub(tmp_path):
    (tmp_path / "README.md").write_text("a data set")
    write(tmp_path / "data", "train-00000-of-00002")
    write(tmp_path / "data", "train-00001-of-00002")
    assert len(Parquet(str(tmp_path)).open()) == 8
    write(tmp_path / "data", "test-00000-of-00001")
    with pytest.raises(
        DataError, match=r'several splits; name the files of one: ".*/data/test-\*", ".*/data/train-\*"'
    ):
        Parquet(str(tmp_path)).open()
    assert len(Parquet(str(tmp_path / "data" / "train-*")).open()) == 8


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<html>404</html>", "a web page"),
        (b"PAR1 and no more", "no whole parquet file"),
    ],
)
def test_what_is_no_parquet_is_named(tmp_path, data, message):
    write(tmp_path, "a")
    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(DataError, match=rf"b\.parquet: (.|\n)*{message}"):
        Parquet(str(tmp_path)).open()
