"""The command: what a user can mend is one line and status 2; solvers and meshes are chosen when drawing."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli import main
from t2i_jax.comparison import Comparison
from t2i_jax.comparison.report import files_of
from t2i_jax.core.config import ConfigError
from t2i_jax.core.console import stdout
from t2i_jax.core.family import with_fields
from t2i_jax.core.outputs import check_new, write_json, write_markdown
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.data.records import may_become
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.noise.processes import Discrete
from t2i_jax.pipeline import Pipeline
from t2i_jax.previews import Previews
from t2i_jax.sampling.options import DiffusionSampler, MaskedSampler, validate_options
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.storage.remote import resolve_path
from t2i_jax.training.loop import check_run
from tests.fixtures import toys
from tests.fixtures.commands import refused
from tests.fixtures.families import FAMILIES

NETWORK = with_fields(
    DiT(),
    size=(4, 4),
    channels=3,
    patch=2,
    width=32,
    depth=1,
    heads=2,
    condition=ClassEmbedder(3),
    learn_variance=False,
)
FAMILY = Diffusion(NETWORK, Discrete("cosine", 20), sampling=DiffusionSampler(4, guidance=2.0))

FILE = """
from t2i_jax.core.family import with_fields
from t2i_jax.data.pipeline import Data
from t2i_jax.data.sources import ArrayRecord
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.sampling.options import DiffusionSampler
from t2i_jax.networks.dit import DiT
from t2i_jax.training.experiment import Experiment
model = Diffusion(with_fields(DiT((4, 4), 3, patch=2), width=16, depth=1, heads=2), {fields})
experiment = Experiment(model, Data(ArrayRecord("nowhere")))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    leaves, tree = jax.tree.flatten(jax.jit(FAMILY.init)(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    shaken = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    save_artifact(Artifact(FAMILY, tree.unflatten(shaken)), path, "")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "a\0b", "1"],
        ["sample", "MODEL", "1", "--image=a\0b"],
        ["evaluate", "a\0b"],
        ["train", "a\0b.py", "--run=run"],
        ["encode", str(Path(__file__).parent.parent / "configs/glyphs_ar.py"), "--data.source.path=a\0b", "--out=out"],
    ],
    ids=lambda a: a[0],
)
def test_a_path_with_a_zero_byte_is_named(arguments, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *(str(folder) if a == "MODEL" else a for a in arguments))
    assert "a\0b" in said.replace("\\x00", "\0")


def test_options_that_are_no_numbers_are_written_into_pictures(folder, tmp_path, capsys):
    """Names and None too: pictures of the same options are not drawn again, of others they are."""
    image, mask = np.full((4, 4, 3), 90, np.uint8), np.arange(16).reshape(4, 4) < 8
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--spacing", "log_snr"]
    given += ["--guidance-low-snr", "-2", "--eta", "none", "--resample", "3"]
    draw = lambda *more: main([str(a) for a in ("sample", folder, "1", "--out", tmp_path / "out", *given, *more)])
    for more, drawn in (((), 1), ((), 0), (("--eta", "0.5"), 1), (("--spacing", "karras", "--eta", "0.5"), 1)):
        draw(*more)
        assert f"{drawn} new images" in " ".join(capsys.readouterr().err.split())
    found = np.asarray(Image.open(tmp_path / "out" / "00000.png").convert("RGB"))
    assert np.abs(found[~mask].astype(int) - 90).max() <= 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["1", "--spacing", "odd"], "log_snr"),
        (["1", "--resample", "0"], "resample 0: 1 to 1000"),
        (["1", "--scale", "100000"], "--scale 100000: 1 to 64"),
        (["1", "--count", "10000000000"], "--count 10000000000: 1 to 1000000"),
        (["1", "--guidance", "nan"], "--guidance nan: a finite number"),
        (["1", "--eta", "much"], "--eta"),
        (["1", "--steps", "21"], "steps 21: 1 to 20"),
        (["1", "--solver", "rk4"], "dpm++, dpm++sde, unipc"),
        (["3"], "3 is not one of 0 to 2"),
        (["-1"], ""),
        (["cat"], "class numbers as prompts: 'cat' is no number"),
        (["1", "--classifier-scale", "1"], "--classifier"),
        (["1", "--candidates", "3"], "--rerank"),
        (["1", "--out", "gs://bucket/pictures"], "this machine alone"),
        (["1", "--mesh", "data=3,fsdp=5"], "mesh data=3,fsdp=5,tensor=1: needs 15 devices"),
        (["1", "--mesh", "rows=3"], "rows=3"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_in_sampling_are_one_line(folder, capsys, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    printed = refused(capsys, "sample", folder, *flags)
    assert says in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("gs:*"))


@pytest.mark.parametrize(
    "content",
    [b"0\n\n 1 \r\n", "\ufeff0\n1".encode(), "0\r\n1\r\n".encode("utf-16"), b"0\r\r1\r", b"0\x00\n\x001\n\n\n"],
)
def test_prompts_are_the_lines_of_a_text_file(folder, tmp_path, capsys, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    main([str(a) for a in ("sample", folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")])
    capsys.readouterr()
    prompts = [Image.open(tmp_path / "out" / f"0000{i}.png").info["prompt"] for i in range(2)]
    assert prompts == ["0", "1"] and not (tmp_path / "out" / "00002.png").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"0\ncaf\xe9\n", "byte 5 (0xe9) is no UTF-8"),
        (b"\n \n", "no line but blank ones"),
        ("0\n1".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (None, "prompts.txt: No such file"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(folder, tmp_path, capsys, content, says):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    printed = refused(capsys, "sample", folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert says in printed and "prompts.txt" in printed and not (tmp_path / "out").exists()


def test_images_to_fill_are_what_a_viewer_shows(folder, tmp_path, capsys):
    """Turned by EXIF, transparent, of 16 bits, palettes: what is kept of them is what is seen."""
    seen = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    turned, exif = Image.fromarray(seen).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = np.dstack([seen, np.full((4, 4), 255, np.uint8)])
    clear[3, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(seen).quantize(16).save(tmp_path / "palette.png")
    grey = np.linspace(0, 65535, 16).round().astype(np.uint16).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 255
    Image.fromarray(np.dstack([np.full((4, 4, 3), 255, np.uint8), mask])).save(tmp_path / "mask.png")
    shown = {"turned": seen, "clear": seen.copy(), "palette": seen, "grey": np.dstack([grey / 257] * 3)}
    shown["clear"][3, 3] = 255
    for name, image in shown.items():
        given = ("--image", tmp_path / f"{name}.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / name)
        main([str(a) for a in ("sample", folder, "1", *given)])
        found = np.asarray(Image.open(tmp_path / name / "00000.png").convert("RGB")).astype(int)
        assert np.abs(found[2:] - image[2:]).max() <= 1, name
    capsys.readouterr()
    (tmp_path / "web.png").write_text("<html>not found</html>")
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    for flags, says in (
        (("--image", tmp_path / "web.png"), "web.png: no image: it is a web page"),
        (("--image", tmp_path / "grey.png", "--mask", tmp_path / "black.png"), "black.png: the mask marks nothing"),
        (("--image", tmp_path / "none.png"), "none.png"),
    ):
        assert says in " ".join(refused(capsys, "sample", folder, "1", *flags, "--out", tmp_path / "bad").split())


@pytest.mark.parametrize(
    ("fields", "flags", "says"),
    [
        ("solver='rk4'", [], "solver 'rk4': one of"),
        ("sampling=DiffusionSampler(2000)", [], "steps 2000: 1 to 1000"),
        ("", ["--mesh.data=3", "--mesh.fsdp=5"], "needs 15 devices"),
        ("", ["--model.solver=heun", "--model.predicts=y"], "model.predicts"),
    ],
)
def test_mistakes_in_a_config_are_one_line(capsys, tmp_path, fields, flags, says):
    file = tmp_path / "experiment.py"
    file.write_text(FILE.format(fields=fields))
    printed = refused(capsys, "train", file, "--run", tmp_path / "run", *flags)
    assert says in printed and "Traceback" not in printed


def test_options_of_sets_that_are_not_there_are_named():
    with pytest.raises(ConfigError, match="shape 7: 0 cosine, 1 linear"):
        validate_options(FAMILIES["masked"], MaskedSampler(shape=7))
    with pytest.raises(ConfigError, match="1 to 1024"):
        MaskedSampler(iterations=2000)


def test_what_draws_nothing_has_no_previews():
    trainer: Any = SimpleNamespace(experiment=SimpleNamespace(model=FAMILIES["classifier"]))
    assert Previews()(trainer, None, 5) is None


def test_other_fields_of_a_family(folder):
    pipeline = Pipeline.load(folder, MeshConfig(1))
    assert pipeline.replace(solver="ddpm") is pipeline
    other = pipeline.replace(solver="heun")
    assert other.family == dataclasses.replace(FAMILY, solver="heun") and other.about["solver"] == "heun"
    assert pipeline.family == FAMILY and "solver" not in pipeline.about
    with pytest.raises(ConfigError, match="has no 'order'"):
        pipeline.replace(order=3)
    for field in ({"network": with_fields(NETWORK, width=16)}, {"process": Discrete()}, {"predicts": "v"}):
        with pytest.raises(ConfigError, match=f"a Diffusion is trained with its '{min(field)}"):
            pipeline.replace(**field)


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws_by_any_solver(folder):
    one, many = (Pipeline.load(folder, mesh) for mesh in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2)))
    spread = [x for x in jax.tree.leaves(many.parts["model"]) if not x.is_fully_replicated]
    assert spread and all(x.addressable_shards[0].data.size < x.size for x in spread)
    draw = lambda pipeline: pipeline.sample(["0", "1"], [5, 6], batch_size=2).astype(int)
    plain, heun = draw(one), draw(one.replace(solver="heun"))
    np.testing.assert_allclose(draw(many.replace(solver="heun")), heun, atol=1)
    assert jnp.abs(plain - heun).max() > 1


def test_a_folder_whose_name_is_not_utf8_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="not UTF-8"):
        check_run(tmp_path / "caf\udce9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        check_new(tmp_path / "caf\udce9" / "released")
    with pytest.raises(ConfigError, match="not UTF-8"):
        may_become(tmp_path / "caf\udce9")


@pytest.mark.parametrize(
    "words",
    [
        "train {0}",
        "encode {0} --out out",
        "plan {0} --topology h100:8",
        "data vocab {0} --out words.model",
        "evaluate {0} --data {0}",
        "bench train {0}",
        "bench codec {0}",
        "bench sample {0}",
    ],
)
def test_a_config_of_another_kind_is_named(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("from t2i_jax.training.optimizer import Optimizer\nexperiment = Optimizer()\n")
    with pytest.raises(SystemExit) as stopped:
        main(words.format("other.py").split())
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "Traceback" not in said and "other.py" in said
    assert words.startswith("evaluate") or "builds a Optimizer; an Experiment is needed" in said


def test_modules_of_the_user_are_imported_first(tmp_path, monkeypatch, capsys):
    """A run has a part of the user's own; a config imports a module that Python does not find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    part = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Part:\n    x: int = 1\n"
    (tmp_path / "own_part_of_a_test.py").write_text(part)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"version": 1, "type": "own_part_of_a_test:Part"}')
    assert "T2I_IMPORT=own_part_of_a_test" in refused(capsys, "train", "run")
    monkeypatch.setenv("T2I_IMPORT", "own_part_of_a_test")
    assert "builds a Part; an Experiment is needed" in refused(capsys, "train", "run")
    monkeypatch.setenv("T2I_IMPORT", "not_there_at_all")
    assert "T2I_IMPORT: not_there_at_all: ModuleNotFoundError" in refused(capsys, "train", "run")
    monkeypatch.delenv("T2I_IMPORT")
    (tmp_path / "mine.py").write_text("import not_there_at_all\n")
    assert "if it is a file of this folder: PYTHONPATH=. t2i" in refused(capsys, "train", "mine.py")


@pytest.mark.parametrize(
    ("command", "says"), [("train", "a released model has neither data nor training"), ("evaluate", "name images")]
)
def test_a_released_model_has_no_data_of_its_own(folder, tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, command, folder) and not list(tmp_path.iterdir())


def test_a_run_that_is_named_as_the_config_goes_on(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("t2i_jax.cli.train.load_experiment", lambda path, rest: path)
    monkeypatch.setattr("t2i_jax.cli.train.train", lambda experiment, run, accept: begun.append(run))
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "lr0.1").mkdir()
    for words in (["one"], ["one/config.json"], ["lr0.1"], ["lr0.1/config.json"], ["a/b.py"], ["one", "--run", "two"]):
        main(["train", str(tmp_path / words[0]), *words[1:]])
    runs = Path("runs")
    assert begun == [tmp_path / "one", runs / "one", runs / "lr0.1", runs / "lr0.1", runs / "b", Path("two")]


def test_a_run_in_a_store_goes_on_by_its_config(capsys):
    assert "gs:/bucket/run: a run in a store goes on by its config" in refused(capsys, "train", "gs://bucket/run")


@pytest.mark.parametrize("out", [".", "/"])
def test_a_report_is_a_file(out):
    with pytest.raises(ConfigError, match="name a file"):
        files_of(Comparison("title", "about", {}, toys.experiment(), flops=1.0), Path(out))


def test_a_file_name_that_is_not_utf8_is_printed_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "utf-8", errors="strict"))
    stdout().print("caf\udce9: written")
    assert written.getvalue() == b"caf\\udce9: written\n"


def test_text_with_a_file_name_that_is_not_utf8_is_written_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"command": "t2i --out=caf\udce9"})
    write_markdown(tmp_path / "a.md", "`t2i --out=caf\udce9`")
    assert json.loads((tmp_path / "a.json").read_text())["command"] == "t2i --out=caf\udce9"
    assert "caf\\udce9" in (tmp_path / "a.md").read_text()


def test_a_page_and_its_plot_have_two_names(tmp_path, capsys):
    assert "end it in .md" in refused(capsys, "bench", "solvers", "--out", tmp_path / "new.png")
    assert not [*tmp_path.iterdir()]


def test_a_loop_of_links_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((ConfigError, OSError), match="loop"):
        may_become(tmp_path / "loop" / "x")


@pytest.mark.parametrize("path", ["//a/b", "///a/b", "/a/b"])
def test_slashes_before_a_path_are_one(path):
    assert str(resolve_path(path)) == "/a/b"
