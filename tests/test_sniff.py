"""Files are named by their first bytes, and what is not known is not guessed."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from PIL import Image
from safetensors.numpy import save

from t2i_jax.core.sniff import HEAD, sniff, sniff_file


def image(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def saved(function, *args):
    buffer = io.BytesIO()
    function(buffer, *args)
    return buffer.getvalue()


KINDS = {
    "an empty file": lambda: b"",
    "a gzip file": lambda: gzip.compress(b"x"),
    "a bzip2 file": lambda: bz2.compress(b"x"),
    "an xz file": lambda: lzma.compress(b"x"),
    "a tar file": tar,
    "a zip file": lambda: archive("a.jpg"),
    "a PyTorch file": lambda: archive("archive/data.pkl", "archive/version"),
    "a NumPy archive (.npz)": lambda: saved(np.savez, np.ones(3)),
    "a NumPy array file": lambda: saved(np.save, np.ones(3)),
    "a Python pickle (an old PyTorch file?)": lambda: pickle.dumps([1]),
    "a safetensors file": lambda: save({"a": np.ones(3, np.float32)}),
    "a msgpack file (a checkpoint of Flax?)": lambda: msgpack_serialize({"params": {"w": np.ones(3)}}),
    "a PNG image": lambda: image("PNG"),
    "a JPEG image": lambda: image("JPEG"),
    "a WebP image": lambda: image("WEBP"),
    "a GIF image": lambda: image("GIF"),
    "a BMP image": lambda: image("BMP"),
    "a TIFF image": lambda: image("TIFF"),
    "a HEIC image": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a web page": lambda: b"\xef\xbb\xbf\n<!DOCTYPE html><html>404</html>",
    "an XML document": lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "an SVG drawing": lambda: b'<?xml version="1.0"?><svg></svg>',
    "a JSON file": lambda: b'{"weight_map": {}}',
    "a text file": lambda: b"Not found\n",
    "a file of NUL bytes": lambda: bytes(512),
    "": lambda: bytes(range(128, 256)),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name, tmp_path):
    data = KINDS[name]()
    assert sniff(data[:HEAD]) == name
    (tmp_path / "file").write_bytes(data)
    assert sniff_file(tmp_path / "file") == name


def test_pointers_say_how_to_fetch_the_file():
    assert "git lfs pull" in sniff(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    assert "git annex get" in sniff(b"/annex/objects/MD5E-s12--aa.tar\n")


def test_any_bytes_are_looked_at_without_an_error():
    rng = np.random.default_rng(0)
    for n in range(400):
        assert isinstance(sniff(rng.bytes(n % 40)), str)


def test_text_of_other_encodings_is_no_checkpoint():
    assert not any("msgpack" in sniff(text.encode("shift-jis")) for text in ("ぁい", "いぁ", "。"))
