"""Slices of TPUs, whose hosts hold rows of a batch that lie apart: each loads its own, and all is as on one device."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.core import config
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.sharding import MESH_AXES, MeshConfig, in_memory_of, rows_of
from t2i_jax.data.records import write_records
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.previews import Previews
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training import records
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import slice_command, tpu_layouts
from tests.fixtures.processes import outputs, started

LAYOUTS = tpu_layouts.layouts()


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a slice that is not here."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU"


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_process_loads_what_its_devices_hold(name, rows=3):
    """With `rows` of a batch for each part of it, and every device is given its own part."""
    shape = tuple(int(n) for n in name.split()[-1].split(","))
    processes = np.reshape(LAYOUTS[name], shape)
    chips = np.array([Chip(i, p) for i, p in enumerate(LAYOUTS[name])]).reshape(shape)
    mesh = Mesh(chips, MESH_AXES, (AxisType.Auto,) * 3)
    size = shape[0] * shape[1] * rows
    parts = np.arange(size).reshape(shape[0], shape[1], rows)  # what the devices of (data, fsdp) hold
    for process in range(processes.max() + 1):
        loaded = np.array(rows_of(mesh, size, process))
        where = np.argwhere((processes == process).any(-1))
        wanted = np.concatenate([parts[d, f] for d, f in where])
        np.testing.assert_array_equal(loaded, np.sort(wanted))  # all of it, and nothing twice
        for d, f in where:
            part = slice(parts[d, f, 0], parts[d, f, -1] + 1)
            np.testing.assert_array_equal(loaded[in_memory_of(loaded.tolist(), (part,), size)], parts[d, f])


def test_layouts_are_those_of_the_topologies():
    pytest.importorskip("libtpu")
    for name, layout in tpu_layouts.asked(["v5e:4x8", "v5p:4x4x4", "2 v5p:2x2x2"]):
        assert LAYOUTS[name] == layout, name
    for name in ("v5e:4x8", "v5p:4x4x4", "2 v5p:2x2x2"):  # `encode` lays a mesh of the devices of each process
        devices = tpu_layouts.devices_of(name)
        for process in {device.process_index for device in devices}:
            own = [device for device in devices if device.process_index == process]
            assert set(MeshConfig(1, -1).build(own).devices.flat) == set(own)


def test_most_slices_have_hosts_whose_rows_are_apart():
    """What the tests above and below are about: one interval of rows would not do."""
    apart = [name for name, layout in LAYOUTS.items() if layout != sorted(layout)]
    assert len(apart) > len(LAYOUTS) / 2 and "v5e:4x4 16,1,1" in apart


def test_a_mesh_that_leaves_processes_without_devices_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Chip(i, i // 4) for i in range(8)])
    with pytest.raises(ConfigError, match="4 of 8 devices leave 1 processes without one"):
        MeshConfig(2, 2).build()


# --- all of it, on devices of the CPU that lie as those of a slice ----------------------------------------------------

CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.optimizer import Optimizer
experiment = Experiment(
    with_fields(AR(16, (4, 4)), width=32, depth={depth}, heads=2, condition=ClassEmbedder(4)),
    Data(ArrayRecord("{folder}/data"), image_size=8, batch_size=32, fields=("label", "{reads}")),
    Train(steps={steps}, optimizer=Optimizer(learning_rate=1e-3, warmup=4, schedule="constant"), ema=0.9, log_every=1,
          save_every=20, evaluate_every={often}, evaluate_batches=2, preview_every={often}, previews=4),
    MeshConfig(*{mesh}),
    codec="{codec}",
)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Images, codes and a codec, as it is born."""
    folder = tmp_path_factory.mktemp("slices")
    rng = np.random.default_rng(0)
    rows = [
        {"label": i % 4, "captions": [f"c{i}"], "key": str(i), "split": "val" if i < 40 else "train"}
        for i in range(136)
    ]
    for row in rows:
        row["image"] = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        row["codes"] = rng.integers(0, 16, (4, 4)).astype(np.uint16)
    write_records(folder / "data", rows)
    parts = AutoencoderConfig(8, (1, 2), blocks=1, latent=4, attention=(), middle_attention=False, groups=4)
    codec = VQGAN(parts, QuantizerConfig(codes=16, dim=4), perceptual=0.0)
    save_artifact(Artifact(codec, codec.init(jax.random.key(0))), folder / "codec", "# A codec\n")
    return folder


def configured(room, name, mesh, whole=True, steps=20):
    """The file of a config: of images with a frozen codec, evaluation and previews, or of codes and nothing more."""
    more = {"reads": "image", "codec": room / "codec", "often": 10, "depth": 2}
    more = more if whole else {"reads": "codes", "codec": "", "often": 0, "depth": 1}
    file = room / f"{name}.py"
    file.write_text(CONFIG.format(folder=room, mesh=mesh, steps=steps, **more))
    return file


def on_slice(layout, *arguments, processes=4, devices=4):
    """A command in processes of so many devices each, laid as a slice."""
    return outputs(started(["-m", "tests.fixtures.slice_command", layout, *arguments], processes, devices))


def straight(room, name, **options):
    """The run of one device."""
    file = configured(room, name, (1, 1, 1), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "start", slice_command.started)
        train(config.load(file), room / name, Previews())
    return room / name


def curve(run):
    """What was measured at each step, by name."""
    lines = records.read(run / "metrics.jsonl")
    return {(line["step"], k): line[k] for line in lines for k in ("loss", "val/loss", "gradient_norm") if k in line}


def same(run, one):
    """The losses are those of one device, and so are the gradients of the first step."""
    found, wanted = curve(run), curve(one)
    assert found.keys() == wanted.keys()
    for at, value in wanted.items():
        np.testing.assert_allclose(found[at], value, rtol=1e-5 if "loss" in at[1] else 1e-4, err_msg=str(at))
    with np.load(run / "gradients.npz") as found, np.load(one / "gradients.npz") as wanted:
        assert set(found) == set(wanted)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_a_slice_trains_as_one_device_does(room):
    """The short form of the tests below: the devices of two processes hold rows that are not neighbours."""
    one = straight(room, "short-one", whole=False, steps=3)
    file = configured(room, "short", (2, 2, 1), whole=False, steps=3)
    on_slice("0 1 1 0", "train", file, "--run", room / "short", processes=2, devices=2)
    same(room / "short", one)


@pytest.fixture(scope="module")
def one(room):
    return straight(room, "one")


@pytest.fixture(scope="module")
def run(room, one):
    """Runs on a slice of 16 chips, by mesh."""
    found = {}

    def get(mesh):
        if mesh not in found:
            name = "x".join(map(str, mesh))
            file, found[mesh] = configured(room, name, mesh), room / f"run{name}"
            on_slice(f"v5e:4x4 {','.join(map(str, mesh))}", "train", file, "--run", found[mesh])
        return found[mesh]

    return get


def sheet(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(16, 1, 1), (4, 4, 1), (2, 4, 2)])
def test_training_evaluation_and_previews_are_those_of_one_device(run, one, mesh):
    same(run(mesh), one)
    for step in (10, 20):  # a token may fall otherwise where probabilities differ in their last digits
        found, wanted = (sheet(path / "samples" / f"{step:07d}.png") for path in (run(mesh), one))
        assert found.shape == wanted.shape and (np.abs(found - wanted) > 1).mean() < 0.02


@pytest.mark.slow
def test_other_layouts_and_process_counts_go_on(room, run, one):
    """What 4 processes of one slice began with a mesh, 2 of another go on with, and 1 ends."""
    begun = run((16, 1, 1))
    shutil.copytree(begun, room / "moved")
    for steps, layout, mesh, processes in ((23, "v5p:2x2x2 8,1,1", (8, 1, 1), 2), (25, "", (2, 2, 1), 1)):
        file = configured(room, f"moved{steps}", mesh, steps=steps)
        said = on_slice(layout, "train", file, "--run", room / "moved", processes=processes)
        assert f"going on from step {20 if steps == 23 else 23}" in said[0]
    longer = straight(room, "longer", steps=25)
    found, wanted = curve(room / "moved"), curve(longer)
    for step in range(1, 26):
        np.testing.assert_allclose(found[step, "loss"], wanted[step, "loss"], rtol=1e-5)


@pytest.mark.slow
def test_codes_are_those_of_one_process(room):
    for name, layout, mesh, processes in (("codes", "v5e:4x4 4,4,1", (4, 4, 1), 4), ("codes-one", "", (1, 1, 1), 1)):
        file = configured(room, f"encode-{name}", mesh)
        arguments = ["encode", file, "--splits", "train", "--batch-size", "8", "--block", "16", "--out", room / name]
        on_slice(layout, *arguments, processes=processes)
    found, wanted = (ArrayRecord(str(room / name)).open() for name in ("codes", "codes-one"))
    assert len(found) == len(wanted) == 96
    for i in range(96):
        assert found[i]["key"] == wanted[i]["key"]
        np.testing.assert_array_equal(found[i]["codes"], wanted[i]["codes"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(16, 1, 1), (2, 4, 2)])
def test_images_are_those_of_one_device(room, one, mesh):
    sizes = ",".join(f"{name}={n}" for name, n in zip(MESH_AXES, mesh, strict=True))
    out = {name: room / f"images-{name}-{mesh[0]}" for name in ("slice", "one")}
    arguments = ["sample", one, "1", "3", "--count", "5"]
    on_slice(f"v5e:4x4 {','.join(map(str, mesh))}", *arguments, "--out", out["slice"], "--mesh", sizes)
    on_slice("", *arguments, "--out", out["one"], "--mesh", "data=1", processes=1)
    found, wanted = ([sheet(file) for file in sorted(path.glob("0*.png"))] for path in out.values())
    assert len(wanted) == 10
    np.testing.assert_allclose(found, wanted, atol=1)
