"""Benchmarks: bounds by hand, the same numbers from the PyTorch loop, and every command in small."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax import bench
from t2i_jax.bench import check, data, drawing, measure
from t2i_jax.bench.sample import decode_bound
from t2i_jax.bench.train import FEW, on_mesh
from t2i_jax.core import flops, platform
from t2i_jax.core.config import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.heads import DiffusionHead, SoftmaxHead
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.nn.attention import attend
from t2i_jax.plan.chips import CHIPS, chip_of
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Limits of small arrays, in no time."""
    fast = lambda dtype="float32", size=0: dict.fromkeys(("flops", "read", "copy"), lambda: 1e9)
    for name in ("drawing", "train", "codec", "sample"):
        module = __import__(f"t2i_jax.bench.{name}", fromlist=[name])
        monkeypatch.setattr(module, "limits", fast)


def test_limits_are_work_over_time():
    for name, value in measure.limits(size=2**20).items():
        assert 1e6 < value() < 1e16, name


def test_turns_give_medians_and_spreads():
    taken = {"a": iter([1.0, 5.0, 2.0]), "b": iter([3.0, 3.0, 3.0])}
    found, spread = measure.interleaved({k: lambda v=v: next(v) for k, v in taken.items()}, 3)
    assert found == {"a": 2.0, "b": 3.0} and spread == {"a": 2.0, "b": 0.0}


def test_the_bound_of_decoding_by_hand():
    config = with_fields(
        AR(),
        vocabulary=10,
        grid=(1, 2),
        width=8,
        depth=3,
        heads=2,
        kv_heads=1,
        mlp=16,
        condition=ClassEmbedder(5),
    )
    matrices = 3 * (8 * 4 * (2 + 1 + 1 + 2) + 3 * 8 * 16) + 8 * 10
    cache = 4 * 3 * 2 * 4 * 4 * (2 + 3)  # rows, layers, keys and values, width of a head, bytes, places seen
    by_memory = decode_bound(config, 4, flops=1e30, bandwidth=1.0)
    assert by_memory == pytest.approx(2 * 4 * matrices + cache)
    assert decode_bound(config, 4, 1e30, 1.0, int8=True) == pytest.approx(2 * matrices + cache)
    assert decode_bound(config, 4, flops=1.0, bandwidth=1e30) == pytest.approx(2 * 2 * matrices * 4)


CONFIG = """
from t2i_jax.core.family import with_fields
from t2i_jax.codecs.autoencoder import AutoencoderConfig
from t2i_jax.codecs.quantize import QuantizerConfig
from t2i_jax.codecs.vqgan import VQGAN
from t2i_jax.models.masked import Masked
from t2i_jax.heads import SoftmaxHead
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import Folder
from t2i_jax.models.ar import AR
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.training.experiment import Experiment

data = Data(Folder("nowhere"), image_size=8, batch_size=8)
network = AutoencoderConfig(8, (1, 1), blocks=1, latent=8, attention=(), middle_attention=False, groups=4)
experiment = Experiment({}, data)
"""
MODELS = {
    "model": "with_fields(AR(13, (2, 3)), width=16, depth=2, heads=4, condition=ClassEmbedder(5))",
    "masked": "with_fields(Masked((2, 2), 1, SoftmaxHead(5)), width=8, depth=1, heads=2, buffer=1, size_buckets=1, "
    "condition=ClassEmbedder(5))",
    "codec": "VQGAN(network, QuantizerConfig(codes=16, dim=4), perceptual=0.0, adversarial=0.0)",
}


@pytest.mark.parametrize(
    "command, kind, fields",
    [
        (
            "sample --shape 1M --batch 1 --grid 2 --vocabulary 16 --repeats 1 --segments 1 --int8",
            "",
            ("tokens_per_second", "bound"),
        ),
        ("sample --batch 2", "masked", ("of_limit", "flops_per_image", "head_flops", "seconds_per_image")),
        pytest.param("train", "model", ("of_limit", "model_flops"), marks=pytest.mark.slow),
        ("plan", "model", ("planned", "of_planned", "counted_bytes")),
        ("codec --batch 2", "codec", ("of_limit", "flops_per_image")),
        ("data --side 32 --image-size 16 --images 8 --records 64 --repeats 1", "", ("per_core", "cores_a_chip")),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) and x else "",
)
def test_commands_print_a_table_and_write_json(command, kind, fields, tmp_path, capsys):
    name, *rest = command.split()
    if kind:
        (tmp_path / "config.py").write_text(CONFIG.format(MODELS[kind]))
        rest = [str(tmp_path / "config.py"), *rest, "--repeats", "1"] + ["--encoded"] * (name in ("train", "plan"))
    bench.main([name, *rest, "--out", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["what"] == name and written["jax"] == jax.__version__
    for result in written["results"]:
        for field in fields:
            value = result[field]
            assert all(v > 0 for v in (value.values() if isinstance(value, dict) else [value])), field
    assert str(written["results"][0]["name"]) in capsys.readouterr().out


@pytest.mark.slow
def test_the_train_step_of_several_processes_is_measured_together(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(MODELS["model"]))
    launcher = Path(__file__).parent.parent / "launch" / "loopback.sh"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = os.environ | {"PORT": str(free.getsockname()[1])}
    words = ["bench", "train", str(tmp_path / "config.py"), "--encoded", "--repeats", "1", "--mesh.fsdp", "4"]
    command = [launcher, "2", "2", sys.executable, "-m", "t2i_jax.cli", *words, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images / s") == 1 and "4 devices" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["devices"] == 4


def test_rows_of_a_batch_on_the_mesh_repeat():
    shapes = {"codes": jax.ShapeDtypeStruct((2 * FEW + 2, 4), jnp.int32)}
    experiment = SimpleNamespace(model=AR(7))
    mesh = MeshConfig(1).build(jax.devices()[:1])
    codes = np.asarray(on_mesh(experiment, shapes, mesh)["codes"])  # pyright: ignore[reportArgumentType]
    assert codes.shape == (2 * FEW + 2, 4) and codes.min() == 0 and codes.max() == 6
    np.testing.assert_array_equal(codes[FEW : 2 * FEW], codes[:FEW])
    assert len(np.unique(codes[:FEW], axis=0)) > 1


@pytest.mark.parametrize("head", [SoftmaxHead(7), DiffusionHead(3, width=16, depth=1, steps=20, respacing="5")])
def test_what_is_cut_is_the_head_and_nothing_of_the_network(head):
    family = with_fields(AnyOrder(), grid=(2, 3), head=head, width=8, depth=1, heads=2, condition=ClassEmbedder(5))
    model = jax.eval_shape(family.init, jax.random.key(0))
    condition, keys = {"label": jnp.arange(2)}, jax.random.split(jax.random.key(1), 2)
    count = lambda family: flops.count(lambda m: family.sample(m, condition, keys), model)
    rows, tokens = 2 * 2, 6
    if isinstance(head, SoftmaxHead):
        products = 8 * 7
    else:
        stacked = {id(x) for x in jax.tree.leaves(model.head.blocks)}  # vectors of theirs have two axes
        matrices = [x.shape for x in jax.tree.leaves(model.head) if x.ndim > 1 + (id(x) in stacked)]
        once = 8 * 16  # of z, which is the same at all steps
        products = once + 5 * (sum(int(np.prod(s)) for s in matrices) - once)
    assert count(family) - count(drawing.without_head(family)) == 2 * rows * tokens * products


@pytest.mark.parametrize("name", ["masked-bert", "masked-upsampler"])
def test_one_stack_is_measured_with_and_without_its_head(name):
    """A tied table, and the codes of a small image as a condition."""
    family = FAMILIES[name]
    model = jax.eval_shape(family.init, jax.random.key(0))
    condition = drawing.random_condition(dataclasses.replace(toys.experiment(), model=family), 2)
    keys, options = jax.random.split(jax.random.key(1), 2), family.options()

    def count(f):
        return flops.count(lambda m: f.sample(m, condition, keys, options), model, trips=f.loop_trips(options))

    assert 0 < count(drawing.without_head(family)) < count(family)


def checked(words: list[str], tmp_path: Path) -> dict[str, dict]:
    """The results of a check by name."""
    bench.main(["check", "--tiny", "--repeats", "1", "--train-batch", "4", *words, "--out", str(tmp_path / "c.json")])
    return {r["name"]: r for r in json.loads((tmp_path / "c.json").read_text())["results"]}


def test_a_check_has_goals_figures_and_verdicts(tmp_path, monkeypatch):
    errors = iter([0.001] * 4 + [0.02])
    monkeypatch.setattr(check, "kernel_error", lambda *_: next(errors))
    found = checked(["--batches", "1"], tmp_path)
    kernels = [r for name, r in found.items() if name.startswith("splash")]
    assert [r["passed"] for r in kernels] == [True] * 4 + [False]
    train, decode = found["train"], found["decode, batch 1"]
    # No data sheet of a CPU is known: nothing is claimed.
    assert (train["passed"], train["figure"], train["goal"]) == (None, None, 0.55) and train["model_flops"] > 0
    assert decode["passed"] is None and decode["goal"] == 0.6 and decode["seconds"] > 0
    assert {r["goal"] for r in kernels} == {0.01}


@pytest.mark.parametrize(("products", "memory", "seconds"), [(4.0, 1.0, 5.0), (1.0, 4.0, 10.0), (1.0, 0.5, 0.9)])
def test_a_check_of_decoding_looks_at_the_limit_that_binds(monkeypatch, products, memory, seconds):
    """A chip of which it is known how long products and traffic take, and a decoder that takes so many seconds."""
    monkeypatch.setattr(check, "bench_sample", lambda *_, **__: {"seconds": seconds})
    bound = lambda model, rows, flops, bandwidth: memory if flops == np.inf else products
    monkeypatch.setattr(check, "decode_bound", bound)
    chip = chip_of("NVIDIA H100 80GB HBM3")
    many, alone = (check.decode_check(check.TINY, batch, 1, chip) for batch in (8, 1))
    assert many["figure"] == max(products, memory) / seconds and many["passed"] == (many["figure"] >= 0.5)
    assert many["binds"] == ("bandwidth" if memory > products else "the peak in products")
    assert (
        alone["figure"] == memory / seconds
        and alone["binds"] == "bandwidth"
        and alone["passed"] == (alone["figure"] >= 0.6)
    )


def test_chips_are_known_by_the_names_of_their_devices():
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA GB200": "gb200",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
    }
    assert {kind: chip.name for kind in names if (chip := chip_of(kind))} == names and chip_of("cpu") is None
    assert {flops.peak(SimpleNamespace(device_kind=c.kind)) for c in CHIPS.values()} == {
        c.flops for c in CHIPS.values()
    }


def test_a_check_of_a_kernel_sees_what_is_wrong(monkeypatch):
    """Attention written out in bfloat16 stands in for a kernel; one that forgets its mask is seen."""
    for rule in check.rules(40).values():
        assert 0 < check.kernel_error("plain", rule, (2, 1, 16), 40) < 0.01
    monkeypatch.setattr(check, "attend", lambda q, k, v, *_, **__: attend(q, k, v, None, kind="plain"))
    assert check.kernel_error("plain", check.rules(40)["causal"], (2, 1, 16), 40) > 0.1


def test_a_check_ends_in_time_and_says_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "kernel_error", lambda *_: 0.0)
    found = checked(["--batches", "1", "--seconds", "1e-9"], tmp_path)
    assert {r["error"] for r in found.values() if not r["passed"]} == {"there was no time left for it"}


@pytest.mark.slow
def test_a_check_in_small_runs_its_kernels(tmp_path):
    found = checked(["--batches", "1", "2"], tmp_path)
    assert {r["passed"] for r in found.values()} == {True, None} and len(found) == 5 + 1 + 2


def test_what_is_of_a_shape_is_not_of_a_config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(MODELS["masked"]))
    with pytest.raises(ConfigError, match="--top-p is for --shape alone"):
        bench.main(["sample", str(tmp_path / "config.py"), "--top-p", "0.5"])
    (tmp_path / "config.py").write_text(CONFIG.format(MODELS["codec"]))
    with pytest.raises(ConfigError, match="a VQGAN does not sample images"):
        bench.main(["sample", str(tmp_path / "config.py")])


def test_a_missing_or_unknown_kind_lists_what_there_is(capsys):
    for arguments, status in (([], 2), (["speed"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == status and "sample" in capsys.readouterr().out


def test_what_a_chip_takes_is_half_of_its_peak():
    # 6 N T and attention on top; published arithmetic says 0.15 TFLOPs an image for this shape.
    assert data.need("llamagen-b", "h100") == pytest.approx(0.5 * 989e12 / 0.153e12, rel=0.08)


def test_flags_are_for_gpus_and_leave_what_is_set():
    assert platform.flags("cpu", True, "--xla_cpu_use_onednn=true") == "--xla_cpu_use_onednn=true"
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_autotune_level=4"
    for platforms, has in (("", True), ("cuda", False), ("gpu,cpu", False)):
        assert platform.flags(platforms, has, own) == own
        assert platform.flags(platforms, has, "") == "--xla_gpu_enable_latency_hiding_scheduler=true"


def test_without_chips_the_tpu_compiler_is_told_so_and_what_is_set_stays(monkeypatch):
    own = {"TPU_ACCELERATOR_TYPE": "v6e-8", "JAX_PLATFORMS": "tpu"}
    for chips, expected in ((False, platform.ALONE | own), (True, own)):
        monkeypatch.setattr(os, "environ", dict(own))
        monkeypatch.setattr(platform, "has_tpu", lambda chips=chips: chips)
        platform.prepare(join=False)
        assert os.environ == expected


def test_freed_memory_is_kept_for_the_next_step():
    """Pages that the system has to find for a block of 64 MB that is asked for again."""
    code = """if True:
        import resource, sys
        from t2i_jax.core import platform
        if "keep" in sys.argv and not platform.keep_memory():
            sys.exit("no glibc")
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(b"x") * 2**26
        before = faults()
        bytearray(b"x") * 2**26
        print(faults() - before)
    """
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if os.sysconf("SC_PAGE_SIZE") != 4096 or (huge.exists() and "[always]" in huge.read_text()):
        pytest.skip("pages are large here")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    run = lambda *word: subprocess.run([sys.executable, "-c", code, *word], env=env, capture_output=True, text=True)
    kept, given_back = run("keep"), run()
    if "no glibc" in kept.stderr:
        pytest.skip("the C library is another")
    assert int(kept.stdout) < 1000 < 10000 < int(given_back.stdout)


def test_the_compiler_knows_its_flags():
    """An unknown one ends the process, and every compiler of JAX knows those of GPUs by name."""
    flags = platform.flags("gpu", True, "")
    code = "import jax; jax.jit(lambda x: x + 1)(1)"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = lambda flags: subprocess.run(
        [sys.executable, "-c", code], env=env | {"XLA_FLAGS": flags}, capture_output=True
    )
    assert run(flags).returncode == 0
    assert run(flags + " --xla_gpu_no_such_flag=true").returncode != 0
