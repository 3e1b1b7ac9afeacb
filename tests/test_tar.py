"""Tar files as they come: every member is part of a sample, or it is said that it is not."""

import contextlib
import dataclasses
import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_jax.core import tar_scan
from t2i_jax.data import Data, DataError, TarShards
from tests.fixtures.tars import expected, image, plain, samples, write


@pytest.mark.parametrize(
    "key", ["{:05d}", "./{:05d}", "a/b/{:05d}", "v1.5_{}", "a.b.c{}", "café {}", "x" * 150 + "/{}"]
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_keys(tmp_path, key, kind):
    source = write(tmp_path / "a.tar", plain(key=key), format=kind)
    assert samples(source) == expected(key=key)
    assert source.open().key(1) == f"{tmp_path / 'a.tar'}:{key.format(1)}"


def test_a_name_that_is_no_text_has_a_key(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    source = write(tmp_path / "a.tar", [(f"{name}.png", image(1))], format=tarfile.GNU_FORMAT)
    assert source.open()[0]["key"] == "a.tar:caf\ufffd"


def test_fields_of_several_dots_belong_to_their_sample(tmp_path):
    members = [("0.jpg", image(7, "BMP")), ("0.seg.png", image(99)), ("0.txt", b"a dog"), ("1.a.png", image(3))]
    assert samples(write(tmp_path / "a.tar", members)) == [("0", 7, ["a dog"]), ("1.a", 3, [])]


@pytest.mark.parametrize("ending", ["PNG", "Jpg", "gif", "bmp", "webp", "tiff", "jfif"])
def test_endings_of_images(tmp_path, ending):
    kind = {"JPG": "BMP", "JFIF": "BMP", "TIFF": "TIFF"}.get(ending.upper(), ending.upper())
    source = write(tmp_path / "a.tar", [(f"0.{ending}", image(5, kind)), ("0.TXT", b"a dog")])
    ((_, value, captions),) = samples(source)
    assert abs(value - 5) < 3 and captions == ["a dog"]


def test_members_in_any_order(tmp_path):
    by_kind = sorted(plain(), key=lambda m: m[0][-3:])
    assert sorted(samples(write(tmp_path / "a.tar", by_kind))) == expected()


def test_double_keys_are_two_samples(tmp_path, caplog):
    again = [("00000.png", image(77)), ("00000.txt", b"another")]
    for members in ([*plain(), *again], [*again, *plain()], [*again[:1], *plain(), *again[1:]]):
        found = samples(write(tmp_path / "a.tar", members))
        assert sorted(found) == sorted([*expected(), ("00000", 77, ["another"])])
        assert "names that come twice begin another sample: 1 .png (00000.png)" in caplog.text
        caplog.clear()


def test_a_text_belongs_to_the_image_that_it_follows(tmp_path):
    members = [("0.png", image(1)), *plain(), ("0.png", image(2)), ("0.txt", b"of the second")]
    found = samples(write(tmp_path / "a.tar", members))
    assert ("0", 1, []) in found and ("0", 2, ["of the second"]) in found


def test_a_second_image_of_a_sample_is_named(tmp_path, caplog):
    members = [m for i in range(4) for m in ((f"{i}.png", image(i)), (f"{i}.bmp", image(50 + i, "BMP")))]
    assert [v for _, v, _ in samples(write(tmp_path / "a.tar", members))] == [0, 1, 2, 3]
    assert "are not read: 4 .bmp (0.bmp, 1.bmp, 2.bmp, ...)" in caplog.text


@pytest.mark.parametrize(
    "mode, message",
    [("w:gz", "a gzip file; unpack it"), ("w:bz2", "a bzip2 file; unpack it"), ("w:xz", "an xz file; unpack it")],
)
def test_compressed_tars_say_so(tmp_path, mode, message):
    source = write(tmp_path / "a.tar", plain(), mode)
    with pytest.raises(DataError, match=rf"a\.tar: no tar file: it is {message}"):
        source.open()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>" * 100, "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(1000), "a zip file; unpack it"),
        (b"AccessDenied\n", "a text file"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, data, message, caplog):
    write(tmp_path / "0.tar", plain())
    (tmp_path / "1.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"1\.tar: no tar file: it is (.|\n)*{message}"):
        TarShards(str(tmp_path)).open()
    assert len(TarShards(str(tmp_path), truncated="skip").open()) == 4
    assert "1.tar: no tar file" in caplog.text


def test_a_tar_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=r"no sample with an image.*they hold 2 \.npy \(0\.npy, 1\.npy\)"):
        write(tmp_path / "a.tar", [("0.npy", b"x"), ("1.npy", b"x")]).open()


def test_a_tar_of_texts_says_so(tmp_path):
    with pytest.raises(DataError, match=r"no sample with an image.*they hold 2 \.txt \(0\.txt, 1\.txt\)"):
        write(tmp_path / "a.tar", [("0.txt", b"x"), ("1.txt", b"x")]).open()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_members_that_are_links_are_named(tmp_path, caplog, kind):
    write(tmp_path / "a.tar", plain())
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("9.png")
        info.type, info.linkname = kind, "00000.png"
        tar.addfile(info)
    assert samples(TarShards(str(tmp_path / "a.tar"))) == expected()
    assert "members that are links are not read: 1 .png (9.png)" in caplog.text


@settings(max_examples=30, deadline=None)
@given(member=st.integers(4, 11), at=st.integers(0, 147) | st.integers(156, 511), skip=st.booleans())
def test_a_damaged_header_does_not_end_a_tar(tmp_path_factory, member, at, skip):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write(path, plain())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[member].offset + at
    data = bytearray(path.read_bytes())
    data[place] ^= 0x15
    path.write_bytes(data)
    if skip:
        assert samples(TarShards(str(path), truncated="skip")) == expected()[: (member - 1) // 3]
    else:
        with pytest.raises(DataError, match=r"a\.tar: the tar file is cut short or damaged after \d samples"):
            TarShards(str(path)).open()


def test_tars_that_were_joined(tmp_path, caplog):
    write(tmp_path / "a.tar", plain())
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    assert samples(TarShards(str(tmp_path / "a.tar"))) == expected()
    assert "after the end mark" in caplog.text


NAMES = st.sampled_from(
    ["{}.png", "{}.txt", "a/{}.json", "x" * 120 + "/{}.png", "y" * 90 + "/{}.png", "caf\u00e9{}.png"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    st.lists(
        st.tuples(NAMES, st.integers(0, 1500), st.sampled_from([0, 1.5, 2**34]), st.sampled_from(b"0\0275")), max_size=8
    ),
    st.none() | st.tuples(st.integers(0, 10**6), st.integers(0, 255)),
)
def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path_factory, format, members, damage):
    """What is found is what `tarfile` alone finds: formats, extended headers, long names, links, folders, damage."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i, (name, size, time, kind) in enumerate(members):
            info = tarfile.TarInfo(name.format(i))
            plain_kind = kind in b"0\0"
            info.size, info.mtime, info.type = size if plain_kind else 0, time, bytes([kind])
            info.linkname = "" if plain_kind else "0.png"
            with contextlib.suppress(ValueError):  # what this format has no place for
                tar.addfile(info, io.BytesIO(bytes(size)))
    if damage:
        data = bytearray(path.read_bytes())
        data[damage[0] % len(data)] = damage[1]
        path.write_bytes(data)
    quick = tar_scan.scan(path, {".png"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_scan, "_plain_members", nothing)
        slow = tar_scan.scan(path, {".png"})
    for name in tar_scan.COLUMNS:
        np.testing.assert_array_equal(quick.columns[name], slow.columns[name])
    assert dataclasses.replace(quick, columns={}) == dataclasses.replace(slow, columns={})


def nothing(*_):
    """As a tar whose first header is not plain."""
    yield from ()
    return 0


def test_plain_headers_are_read_without_tarfile(tmp_path, monkeypatch):
    """Also those with a time of day, as webdataset writes them."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in plain():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.25
            tar.addfile(info, io.BytesIO(data))
    assert samples(TarShards(str(path))) == expected()
    read, seen = tarfile.TarFile.next, []
    monkeypatch.setattr(tarfile.TarFile, "next", lambda tar: seen.append(read(tar)) or seen[-1])
    assert tar_scan.scan(path, {".png"}).keys == 4 and set(seen) == {None}  # the end


# --- members that nobody asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"caption": "a dog \\ud83d"}', b"[" * 100_000]
)
def test_json_that_is_not_asked_for(tmp_path, content):
    members = [(n, content if n.endswith("json") else d) for n, d in plain()]
    path = tmp_path / "a.tar"
    assert samples(write(path, members)) == expected()
    caption = write(path, members).open().__class__([path], "caption", (), False)[0]["captions"]
    assert caption == ["a dog \ufffd"] if b"dog" in content else caption.fault or caption.missing
    if b"dog" not in content:
        with pytest.raises(DataError, match=r"\.json member is no JSON|is no JSON object"):
            TarShards(str(path), fields=("n",)).open()[0]


@pytest.mark.parametrize("content", [b"poodle", b"", b"1.5", b"null", b"\xff", b"9" * 5000])
def test_labels_that_are_no_numbers(tmp_path, content):
    members = [*plain(), *((f"{i:05d}.cls", b" 3\n" if i else content) for i in range(4))]
    source = write(tmp_path / "a.tar", members)
    assert samples(source) == expected() and source.open()[1]["label"] == 3
    data = Data(source, image_size=8, batch_size=4)
    assert set(next(data.batches())["label"]) == {3}  # the first is replaced
    with pytest.raises(DataError, match=r"00000 \('label' is a whole number, not str"):
        next(Data(source, image_size=8, batch_size=4, broken_count=0, broken_share=0.0).batches())


def test_missing_texts_name_the_fields_of_the_json(tmp_path):
    source = write(tmp_path / "a.tar", [m for m in plain() if not m[0].endswith("txt")])
    text = lambda captions: (np.zeros((len(captions), 1), np.int32), np.ones((len(captions), 1), bool))
    with pytest.raises(
        DataError, match=r"no \.txt member; TarShards\.caption can name (.|\n)* of caption, n(.|\n)*4 of"
    ):
        next(Data(source, image_size=8, batch_size=2).batches(text))
    with pytest.raises(DataError, match=r"\.json member has no 'text'; it has caption, n"):
        next(Data(TarShards(source.path, caption="text"), image_size=8, batch_size=2).batches(text))
    (batch,) = [next(Data(TarShards(source.path, caption="caption"), image_size=8, batch_size=2).batches(text))]
    assert batch["text"].shape == (2, 1)


@pytest.mark.parametrize("data, fault", [(b"caf\xe9", "byte 3"), ("a dog".encode("utf-16-le"), "UTF-16")])
def test_texts_in_other_encodings(tmp_path, data, fault):
    source = write(tmp_path / "a.tar", [("0.png", image(1)), ("0.txt", data)])
    assert fault in source.open()[0]["captions"].fault


def test_a_sample_beyond_the_last_is_an_index_error(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.tar", plain(2, key=f"{k}{{}}") if k != 1 else [("0.png", image(9))])
    reader = TarShards(str(tmp_path)).open()
    assert [r["key"] for r in reader] == ["0.tar:00", "0.tar:01", "1.tar:0", "2.tar:20", "2.tar:21"]
    assert reader[-1]["key"] == "2.tar:21"
    for i in (5, -6):
        with pytest.raises(IndexError):
            reader[i]


def test_a_tar_that_shrinks_while_it_is_read_is_one_fault(tmp_path):
    reader = write(tmp_path / "a.tar", plain()).open()
    os.truncate(tmp_path / "a.tar", 3000)
    with pytest.raises(DataError, match="ends .* bytes too early"):
        reader[3]
    assert "a.tar" in reader.key(3)
