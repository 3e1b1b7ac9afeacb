"""Reading PyTorch files without PyTorch: equal to torch.load, and deaf to what a pickle would like to run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest

from t2i_jax.interop.torchfile import StandIn, TorchFileError, read_torch, tensors_below

torch = pytest.importorskip("torch")


class Harmful:
    def __reduce__(self):
        return os.system, ("echo harm",)


def tensors():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return OrderedDict(
        float=base,
        transposed=base.T,
        window=base[1:3, ::2],
        broadcast=torch.arange(3.0).expand(5, 3),
        half=torch.randn(3).half(),
        bf16=torch.randn(2, 2).bfloat16(),
        long=torch.arange(5),
        bool=torch.tensor([True, False]),
        scalar=torch.tensor(7.0),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2)),
        nested={"list": [torch.ones(2), 3, "four"], "none": None},
    )


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_equals_torch(tmp_path, modern):
    torch.save(tensors(), tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
    ours = read_torch(tmp_path / "a.pth")
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(ours) == list(theirs)
    assert ours["nested"]["list"][1:] == [3, "four"] and ours["nested"]["none"] is None
    for name in set(ours) - {"nested"}:
        assert ours[name].shape == tuple(theirs[name].shape), name
        want = theirs[name].detach()
        want = want.float().numpy() if name == "bf16" else want.numpy()
        np.testing.assert_array_equal(ours[name].astype(want.dtype), want, err_msg=name)
    assert ours["bf16"].dtype.name == "bfloat16" and ours["half"].dtype == np.float16 and ours["long"].dtype == np.int64


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_modules_state(tmp_path, modern):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "n.pth", _use_new_zipfile_serialization=modern)
    ours = read_torch(tmp_path / "n.pth")
    assert ours["epoch"] == 3
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(ours["state_dict"][name], value.numpy())


class Settled(torch.nn.Module):
    """A module with what a file of a whole module may hold besides its weights."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(OrderedDict(conv=torch.nn.Conv2d(3, 4, 3), norm=torch.nn.BatchNorm2d(4)))
        self.scale = torch.nn.Parameter(torch.randn(2).double())
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.device, self.make, self.loose = torch.device("cpu"), partial(torch.nn.Linear, 3), torch.ones(1)
        self.sizes = {"heads": range(3)}


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_a_module_saved_whole_is_its_state_dict(tmp_path, modern):
    net = Settled()
    torch.save({"net": net}, tmp_path / "n.pkl", _use_new_zipfile_serialization=modern)
    found = dict(tensors_below(read_torch(tmp_path / "n.pkl")["net"]))
    assert found.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(found[name], value.numpy())
        assert found[name].dtype == value.numpy().dtype


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_code_is_never_run(tmp_path, capfd, modern):
    saved = {"w": torch.ones(2), "callback": Harmful()}
    torch.save(saved, tmp_path / "h.pth", _use_new_zipfile_serialization=modern)
    loaded = read_torch(tmp_path / "h.pth")
    assert isinstance(loaded["callback"], StandIn) and loaded["callback"].name in ("posix.system", "nt.system")
    np.testing.assert_array_equal(loaded["w"], np.ones(2))
    assert "harm" not in capfd.readouterr().out


def test_strides_beyond_the_storage_are_refused(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    name = next(n for n in members if n.endswith("data.pkl"))
    assert members[name].count(b"K\x04\x85") == 1  # the size (4,)
    members[name] = members[name].replace(b"K\x04\x85", b"K\x63\x85")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for n, data in members.items():
            archive.writestr(n, data)
    with pytest.raises(TorchFileError, match="beyond its storage"):
        read_torch(tmp_path / "b.pth")


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_damaged_files_are_named(tmp_path, modern):
    torch.save({"w": torch.randn(1000)}, tmp_path / "a.pth", _use_new_zipfile_serialization=modern)
    data = (tmp_path / "a.pth").read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 30):
        (tmp_path / "cut.pth").write_bytes(data[:keep])
        with pytest.raises(TorchFileError, match=r"cut\.pth"):
            read_torch(tmp_path / "cut.pth")
    (tmp_path / "p.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(TorchFileError, match="not a PyTorch file"):
        read_torch(tmp_path / "p.pth")
