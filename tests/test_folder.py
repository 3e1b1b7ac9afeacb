"""A folder is walked once, what is no data is passed over, and what is not read is named."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data import ArrayRecord, Data, DataError, Folder, Mixture, Parquet, TarShards, write_records
from t2i_jax.data.files import Files, Recent, contents, kinds, walk


def picture(path, text="a dog", value=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def keys(path):
    reader = Folder(str(path)).open()
    return [reader[i]["key"] for i in range(len(reader))]


def test_what_programs_leave_is_no_data(tmp_path):
    for name in ("b/two.png", "a.png"):
        picture(tmp_path / name)
    for folder in (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", "b/.hidden"):
        picture(tmp_path / folder / "x.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    picture(tmp_path / ".old.png")
    assert keys(tmp_path) == ["a.png", "b/two.png"]


def test_data_that_changed_since_a_run_began_are_named_once(tmp_path, capsys):
    from t2i_jax.training.loop import remember_data

    def said():
        remember_data(Data(Folder(str(tmp_path / "set"))), tmp_path)
        return " ".join(capsys.readouterr().err.split())

    for i in range(12):
        picture(tmp_path / "set" / f"{i:02d}.png")
    assert said() == said() == ""
    picture(tmp_path / "set" / "50.png")
    assert "12 records then, 13 now" in said()
    assert said() == ""
    (tmp_path / "set" / "03.png").rename(tmp_path / "set" / "03b.png")
    assert "13 records then, 13 now" in said()
    assert said() == ""


@pytest.mark.parametrize("target", [".", "..", "b", "b/c", "/"])
def test_links_do_not_repeat_images(tmp_path, target):
    root = tmp_path / "root"
    for name in ("a.png", "b/two.png", "b/c/three.png"):
        picture(root / name)
    picture(tmp_path / "outside.png")
    for at in ("link", "b/again", "b/c/once more"):
        (root / at).symlink_to(root / target, target_is_directory=True)
    assert keys(root) == ["a.png", "b/c/three.png", "b/two.png"]


def test_linked_folders_are_data_once(tmp_path):
    picture(tmp_path / "other" / "x.png")
    picture(tmp_path / "root" / "a.png")
    for name in ("l1", "l2"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "other" / "back").symlink_to(tmp_path / "root", target_is_directory=True)
    assert keys(tmp_path / "root") == ["a.png", "l1/x.png"]
    assert sorted(walk(str(tmp_path / "root"))) == ["a.png", "a.txt", "l1/x.png", "l1/x.txt"]


@pytest.mark.parametrize("ending", ["jfif", "jp2", "tga", "ppm", "PNG", "JPEG", "tiff", "bmp", "gif", "webp"])
def test_every_kind_that_pillow_reads(tmp_path, ending):
    picture(tmp_path / f"a.{ending}", value=200)
    assert keys(tmp_path) == [f"a.{ending}"]
    (example,) = Data(Folder(str(tmp_path)), image_size=8).examples()
    assert abs(int(example["image"].mean()) - 200) < 3


def test_a_name_that_is_no_text_has_a_key(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    picture(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", name)
    os.rename(tmp_path / "x.txt", name[:-3] + b"txt")
    reader = Folder(str(tmp_path)).open()
    assert reader[0]["key"] == "caf\ufffd.png" and reader[0]["captions"] == ["a dog"]
    write_records(tmp_path / "stored", [reader[0]])
    assert ArrayRecord(str(tmp_path / "stored")).open()[0]["key"] == "caf\ufffd.png"


def test_captions_in_capitals_and_of_names_with_dots(tmp_path):
    picture(tmp_path / "a.b.png", "with dots")
    picture(tmp_path / "c.png", None)
    (tmp_path / "c.TXT").write_text("in capitals")
    reader = Folder(str(tmp_path)).open()
    assert [reader[i]["captions"] for i in range(2)] == [["with dots"], ["in capitals"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_captions_say_where_they_are_looked_for(tmp_path, workers):
    for i in range(30):
        picture(tmp_path / f"{i:02}.png", "a dog" if i < 8 else None)
        if i >= 8:
            (tmp_path / f"{i:02}.caption").write_text("a dog")
    (tmp_path / "metadata.jsonl").write_text("{}")
    text = lambda captions: (np.zeros((len(captions), 2), np.int32), np.ones((len(captions), 2), bool))
    data = Data(Folder(str(tmp_path)), image_size=8, batch_size=4, workers=workers, broken_count=3)
    message = (
        r"(\d+) of (\d+) examples met a broken record.*there is no .*\.txt\).*22 of 30 images have no caption file "
    )
    message += r"\(08\.png.*looked for in a \.txt file.*22 \.caption \(.*1 \.jsonl \(metadata\.jsonl\)"
    with pytest.raises(DataError, match=message) as caught:
        for _ in data.batches(Tokens() if workers else text):
            pass
    broken, seen = (int(n) for n in str(caught.value).split(" examples")[0].split(" of "))
    assert broken <= seen
    for i in range(8):
        (tmp_path / f"{i:02}.txt").unlink()
    with pytest.raises(DataError, match=r"none of 30 records can be used.*30 of 30 images have no caption file"):
        next(data.batches(Tokens()))


class Tokens:
    """A tokenizer that worker processes can have."""

    def __call__(self, captions):
        return np.zeros((len(captions), 2), np.int32), np.ones((len(captions), 2), bool)


def test_captions_are_not_missed_where_none_is_needed(tmp_path, caplog):
    picture(tmp_path / "a.png", None)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    data = Data(Folder(str(tmp_path)), image_size=8, batch_size=2)
    assert next(data.batches())["image"].shape == (2, 8, 8, 3)
    assert len(list(data.examples())) == 1 and "a.txt: byte 3" in caplog.text
    with pytest.raises(DataError, match=r"a\.txt: byte 3 \(0xe9\) is no UTF-8"):
        next(data.batches(Tokens()))


def test_files_of_other_kinds_are_named_once(tmp_path, caplog):
    picture(tmp_path / "a.png")
    for name in ("one.mp4", "two.mp4", "three.psd"):
        (tmp_path / name).write_bytes(b"x")
    for _ in range(3):
        list(Data(Folder(str(tmp_path)), image_size=8).examples())
    (message,) = [m for m in caplog.messages if "of other kinds" in m]
    assert "2 .mp4 (one.mp4, two.mp4), 1 .psd (three.psd)" in message


def test_what_lies_there_instead(tmp_path):
    with pytest.raises(DataError, match="it is empty"):
        Folder(str(tmp_path)).open()
    picture(tmp_path / "a.png")
    (tmp_path / "shards.tar.gz").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    assert contents(str(tmp_path)) == (
        "it holds 1 .png (a.png), 1 .txt (a.txt), 1 .tar.gz (shards.tar.gz), and folders: sub"
    )
    for source in (TarShards, Parquet):
        with pytest.raises(DataError, match=r"holds no \*\.\w+ file; it holds 1 \.png \(a\.png\)"):
            source(str(tmp_path)).open()
    with pytest.raises(DataError, match="this is a file; name the folder"):
        Folder(str(tmp_path / "a.png")).open()
    assert kinds(f"{n}.x{n}" for n in range(9)).endswith("and 3 more kinds")


def test_folders_with_brackets_and_capitals(tmp_path):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    with tarfile.open(folder / "A.TAR", "w") as tar:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        info = tarfile.TarInfo("0.png")
        info.size = buffer.tell()
        tar.addfile(info, io.BytesIO(buffer.getvalue()))
    assert len(TarShards(str(folder)).open()) == 1


# --- open files -------------------------------------------------------------------------------------------------------


def test_the_last_used_are_kept():
    made = []
    recent = Recent(lambda key: made.append(key) or key, 2)
    assert [recent[k] for k in "ababcab"] == list("ababcab") and made == list("abcab")


def test_readers_do_not_share_files_of_one_name():
    one, other = Files(list), Files(list)
    assert one["ab"] is one["ab"] and one["ab"] is not other["ab"]


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_few_files_are_open_at_a_time(tmp_path):
    """Several sources of many files together, and still as many as before."""
    count, buffer = 150, io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for k in range(count):
        with tarfile.open(tmp_path / f"{k:03}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{k}.png")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    write_records(tmp_path / "r", [{"image": buffer.getvalue(), "key": str(k)} for k in range(count)], shards=count)
    reader = Mixture((TarShards(str(tmp_path)), ArrayRecord(str(tmp_path / "r")))).open()
    before = open_files()
    assert [reader[i]["image"] for i in range(2 * count)] == [buffer.getvalue()] * (2 * count)
    assert open_files() - before <= 70
