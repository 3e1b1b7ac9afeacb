"""Checkpoints of Flax: what it wrote is read, and a damaged file ends in one line."""

import tracemalloc

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from t2i_jax import convert
from t2i_jax.interop.msgpackfile import read_msgpack
from t2i_jax.interop.tensorfile import content
from tests.published.parity import SMALL, Oracle

TREE = {
    "params": {
        "Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "bias": np.zeros(0, np.float16)},
        "half": jnp.asarray([[1.5, -2.0]], jnp.bfloat16),
        "scale": np.float32(3),
    },
    "step": 7,
    "opt_state": {"0": {"count": np.asarray(3), "mu": None}},
}


def written(tree, path):
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def test_arrays_of_nested_dictionaries_have_their_joined_names(tmp_path, monkeypatch):
    flat = content(written(TREE, tmp_path / "checkpoint"))
    assert isinstance(flat, dict) and flat["step"] == 7
    assert flat["params/half"].dtype == jnp.bfloat16
    for name, wanted in {
        "params/Conv_0/kernel": TREE["params"]["Conv_0"]["kernel"],
        "params/Conv_0/bias": np.zeros(0, np.float16),
        "params/half": np.asarray([[1.5, -2.0]]),
        "params/scale": np.float32(3),
        "opt_state/0/count": np.asarray(3),
    }.items():
        np.testing.assert_array_equal(flat[name], wanted)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 8)
    chunked = read_msgpack(written({"w": np.arange(12.0).reshape(3, 4)}, tmp_path / "chunked"))
    np.testing.assert_array_equal(chunked["w"], np.arange(12.0).reshape(3, 4))


def test_a_file_of_flax_converts_as_its_tensors_do(tmp_path):
    tensors = Oracle(SMALL / "maskgit").tensors
    tree = {}
    for name, array in tensors.items():
        *keys, last = name.split("/")
        inside = tree
        for key in keys:
            inside = inside.setdefault(key, {})
        inside[last] = array
    read = convert.read(written(tree, tmp_path / "maskgit_checkpoint"), "maskgit")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="28 words"):
        convert.convert("maskgit", read)  # 1024 codes are more than it has words


def array(shape, kind, data):
    return msgpack.ExtType(1, msgpack.packb((shape, kind, data)))


FAULTS = {
    "more numbers than bytes": ({"w": array([9], "float32", bytes(8))}, "shape .9."),
    "a negative side": ({"w": array([-1], "float32", bytes(4))}, "shape"),
    "objects": ({"w": array([1], "object", bytes(8))}, "kind 'object'"),
    "a dtype of several fields": ({"w": array([1], "f4,f4", bytes(8))}, "kind 'f4,f4'"),
    "another extension": ({"w": msgpack.ExtType(9, b"")}, "kind 9"),
    "no triple": ({"w": msgpack.ExtType(1, msgpack.packb(3))}, "damaged"),
    "a list": ([1, 2], "holds a list"),
    "a number as a name": ({"a": {3: 1}}, "damaged"),
    "two leaves of one name": ({"a/b": 1, "a": {"b": 2}}, "'a/b' is there twice"),
    "chunks that are none": ({"w": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}}, "chunks"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_flax_would_not_write_is_one_line(name, tmp_path):
    tree, said = FAULTS[name]
    (tmp_path / "odd").write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=said) as error:
        read_msgpack(tmp_path / "odd")
    assert str(tmp_path / "odd") in str(error.value) and "\n" not in str(error.value)


def test_a_cut_or_altered_file_is_one_line(tmp_path):
    whole, rng = flax.serialization.msgpack_serialize(TREE), np.random.default_rng(0)
    path = tmp_path / "cut"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut"):
            read_msgpack(path)
    for _ in range(300):
        altered = bytearray(whole)
        altered[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(altered)
        try:
            read_msgpack(path)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\xa1a", b"\x81\xa1a", b"\x91"])
def test_a_small_file_takes_little_memory(head, tmp_path):
    """Counts of items that are not there, and dictionaries in dictionaries."""
    path = tmp_path / "bomb"
    path.write_bytes(b"\x81\xa1a" + head * 100_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        read_msgpack(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
