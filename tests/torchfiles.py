"""PyTorch files written without PyTorch: the few kinds of pickle that `torch.save` makes of dictionaries of tensors."""

import struct
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.uint8): "ByteStorage",
}
BYTES = {np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn", np.dtype(ml_dtypes.float8_e5m2): "float8_e5m2"}


class Object:
    """An instance of a class of another program, with fields."""

    def __init__(self, module, name, **fields):
        self.of, self.fields = f"{module}\n{name}\n", fields


def save_torch(content, path):
    """Write dictionaries, lists, numbers, words, arrays and `Object`s as `torch.save` does, in its zip format."""
    blobs = []
    pickled = b"\x80\x02" + emitted(content, blobs) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for n, blob in enumerate(blobs):
            archive.writestr(f"archive/data/{n}", blob)


def emitted(x, blobs):
    """The opcodes that push a value; storages go to `blobs`."""
    put = lambda value: emitted(value, blobs)
    if isinstance(x, np.ndarray):
        blobs.append(np.ascontiguousarray(x).tobytes())
        strides = tuple(s // x.itemsize for s in np.ascontiguousarray(x).strides) if x.ndim else ()
        kind = STORAGES.get(x.dtype, "UntypedStorage")
        count = x.size if x.dtype in STORAGES else x.nbytes
        module = "torch" if x.dtype in STORAGES else "torch.storage"
        storage = b"(" + put("storage") + f"c{module}\n{kind}\n".encode() + put(str(len(blobs) - 1)) + put("cpu")
        storage += put(count) + b"tQ"
        rest = put(0) + put(x.shape) + put(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
        if x.dtype in STORAGES:
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
        dtype = f"ctorch\n{BYTES[x.dtype]}\n".encode()
        return b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + rest + dtype + b"tR"
    if isinstance(x, Object):
        return f"c{x.of}".encode() + b")\x81" + put(x.fields) + b"b"
    if isinstance(x, dict):
        return b"}(" + b"".join(put(k) + put(v) for k, v in x.items()) + b"u"
    if isinstance(x, list):
        return b"](" + b"".join(map(put, x)) + b"e"
    if isinstance(x, tuple):
        return b"(" + b"".join(map(put, x)) + b"t"
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    if x is None or isinstance(x, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[x]
    return b"J" + struct.pack("<i", x) if isinstance(x, int) else b"G" + struct.pack(">d", x)
