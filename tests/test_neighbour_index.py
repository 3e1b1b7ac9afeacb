"""The neighbour index: exact on every mesh, made in parts that survive a kill, refused where it does not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from t2i_jax.cli import main
from t2i_jax.core.config import to_json
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.sharding import MeshConfig, shardings
from t2i_jax.data import ArrayRecord, Data, write_records
from t2i_jax.evaluation.alignment import wilson
from t2i_jax.evaluation.embedders import load_embedder
from t2i_jax.evaluation.neighbours import (
    approximate,
    build_index,
    neighbours_of_images,
    recall,
    searcher,
    without_itself,
    write_neighbours,
)
from t2i_jax.evaluation.probe import Probe, nearest_distances
from t2i_jax.nn.layers import Linear
from t2i_jax.nn.search import EmbeddingTable, search
from t2i_jax.text.index import Index, read_index, weights_digest
from t2i_jax.text.retrieval import with_database
from tests.fixtures import toys
from tests.fixtures.families import FAMILIES

MESHES = ((1, 1, 1), (8, 1, 1), (1, 2, 4), (2, 2, 2))


def brute_force(rows, queries, count):
    """Numbers of the nearest rows by a stable sort of all cosines in float64: of equal ones the first row."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.argsort(-np.round(unit(queries.astype(float)) @ unit(rows.astype(float)).T, 9), 1, kind="stable")[
        :, :count
    ]


def on_mesh(mesh, rows, queries, count, most):
    mesh = MeshConfig(*mesh).build()
    with jax.set_mesh(mesh):
        table = EmbeddingTable(jnp.asarray(rows))
        table = jax.device_put(table, shardings(table, mesh))
        split = [s.data.shape[0] for s in table.rows[...].addressable_shards]
        assert split == [len(table.rows[...]) // mesh.size] * mesh.size  # no device has all of it
        return jax.device_get(jax.jit(search, static_argnums=(2, 3))(table, jnp.asarray(queries), count, most))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_search_is_exact_on_every_mesh_with_ties(mesh):
    """Rows are signs, so that many products are equal, and exact in fp32; some rows are repeated far apart."""
    rng = np.random.default_rng(0)
    rows = rng.choice([-1.0, 1.0], (700, 9)).astype(np.float32)
    rows[640:] = rows[:60]
    queries = rows[::97]
    wanted = brute_force(rows, queries, 20)
    for most in (2**26, 8 * 37, 1):  # all products at once; some; one query's fewest
        found = on_mesh(mesh, rows, queries, 20, most)
        np.testing.assert_array_equal(found.rows, wanted)
        np.testing.assert_array_equal(found.vectors, rows[wanted])
    assert (np.diff(wanted[:, :2]) > 0).any()


@pytest.mark.parametrize("mesh", MESHES[1:3], ids=str)
def test_what_a_search_finds_is_that_of_one_device(mesh):
    rng = np.random.default_rng(1)
    rows, queries = (rng.normal(size=(n, 16)).astype(np.float32) for n in (300, 5))
    rows *= rng.uniform(0.1, 10, (300, 1)).astype(np.float32)
    alone, split = (on_mesh(m, rows, queries, 300, 2**20) for m in ((1, 1, 1), mesh))  # each row, filling rows never
    np.testing.assert_array_equal(split.rows, brute_force(rows, queries, 300))
    np.testing.assert_array_equal(alone.rows, split.rows)
    np.testing.assert_allclose(alone.cosines, split.cosines, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- the index


@pytest.fixture
def experiment(tmp_path):
    """24 pictures of flat colours, of which two are equal and one is broken."""
    rng = np.random.default_rng(0)
    pictures = [np.full((8, 8, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(24)]
    pictures[20] = pictures[3]
    records = [{"key": f"k{n}", "image": x, "captions": [f"picture {n}"]} for n, x in enumerate(pictures)]
    records[5]["image"] = b"no picture"
    write_records(tmp_path / "data", records)
    data = Data(ArrayRecord(str(tmp_path / "data")), image_size=8, batch_size=4, broken_share=0.5)
    return toys.experiment(FAMILIES["rdm"], data, MeshConfig(1, 1, 1), steps=1)


def embedder_of(experiment):
    return load_embedder("pixels", experiment.text, "images", experiment.mesh.build(), 4)


def test_an_index_goes_on_where_it_was_stopped(experiment, tmp_path):
    out, embedder = tmp_path / "index", embedder_of(experiment)
    whole = build_index(experiment, embedder, tmp_path / "whole", block=10)
    assert whole.records.tolist() == [n for n in range(24) if n != 5] and whole.rows.shape == (23, 768)
    calls = []

    def dies(records):
        calls.append(len(records))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embedder.embed(records)

    with pytest.raises(KeyboardInterrupt):
        build_index(experiment, dataclasses.replace(embedder, embed=dies), out, block=10)
    assert not out.exists() and len(list((tmp_path / "index.partial").glob("embeddings-*"))) == 1
    with pytest.raises(ConfigError, match=r"unfinished work of another config(.|\n)*block: 10 -> 7"):
        build_index(experiment, embedder, out, block=7)
    calls.clear()
    count = lambda records: calls.append(len(records)) or embedder.embed(records)
    again = build_index(experiment, dataclasses.replace(embedder, embed=count), out, block=10)
    assert len(calls) == 4  # the first block is not embedded anew
    np.testing.assert_array_equal(again.rows, whole.rows)
    np.testing.assert_array_equal(again.records, whole.records)
    assert not (tmp_path / "index.partial").exists()


def test_what_is_there_is_read_or_refused(experiment, tmp_path):
    out, embedder = tmp_path / "index", embedder_of(experiment)
    built = build_index(experiment, embedder, out)
    refuse = dataclasses.replace(embedder, embed=lambda records: pytest.fail("embeds again"))
    np.testing.assert_array_equal(build_index(experiment, refuse, out).rows, built.rows)
    with pytest.raises(ConfigError, match=r"an index of something else(.|\n)*digest"):
        build_index(experiment, dataclasses.replace(refuse, digest="another"), out)
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match="is no index of"):
        build_index(experiment, refuse, tmp_path / "file")
    facts = json.loads((out / "neighbours.json").read_text())
    for change, said in {"version": "version 9", "files": "1 files of embeddings of 9", "count": "not 9, 768"}.items():
        (out / "neighbours.json").write_text(json.dumps(facts | {change: 9}))
        with pytest.raises(ConfigError, match=said):
            read_index(out)
    (out / "neighbours.json").write_text(json.dumps(facts))
    (out / "embeddings-00000-of-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="no embeddings of an index"):
        read_index(out)


def test_an_index_by_another_encoder_is_refused():
    model, other = (Linear(3, 4, jax.random.key(n)) for n in (0, 1))
    index = Index(
        np.ones((5, 4), np.float32), np.arange(5), {"encoder": "ClipEmbedding", "digest": weights_digest(model)}
    )
    index.check("there", 4, 5, model)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), model)
    index.check("there", 4, 5, rounded)  # as a model released in bf16 has it
    for width, count, encoder, said in (
        (6, 5, model, "6 numbers"),
        (4, 6, model, "6 rows"),
        (4, 5, other, "another enc"),
    ):
        with pytest.raises(ConfigError, match=f"there: .*{said}"):
            index.check("there", width, count, encoder)
    Index(index.rows, index.records).check("there", 4, 5, other)  # an array of another program says nothing
    with pytest.raises(ConfigError, match="reads no neighbours"):
        with_database(None, "there")


def test_neighbours_are_others_and_equals_are_first(experiment, tmp_path):
    out, embedder = tmp_path / "index", embedder_of(experiment)
    index = build_index(experiment, embedder, out, block=10)
    find = searcher(index, experiment)
    write_neighbours(index, out, find, 4)
    parts = [load_file(p) for p in sorted(out.glob("neighbours-*.safetensors"))]
    assert len(parts) == 3
    found, cosines = (np.concatenate([part[k] for part in parts]) for k in ("record", "cosine"))
    truth = brute_force(index.rows, index.rows, 23)
    truth = np.stack([[i for i in row if i != n][:4] for n, row in enumerate(truth)])
    np.testing.assert_array_equal(found, index.records[truth])
    assert (np.diff(cosines) <= 0).all()
    twin = index.records.tolist().index(3)
    assert found[twin, 0] == 20 and cosines[twin, 0] > 0.99999
    stays = sorted(out.glob("neighbours-*"))[0].stat().st_mtime_ns
    write_neighbours(index, out, lambda *_: pytest.fail("searches again"), 4)
    assert sorted(out.glob("neighbours-*"))[0].stat().st_mtime_ns == stays
    with pytest.raises(ConfigError, match="23 records"):
        write_neighbours(index, out, find, 23)
    last = without_itself(np.ones((1, 3)), np.array([[1, 2, 3]]), np.array([7]))[1]  # many equals come before itself
    assert last.tolist() == [[1, 2]]


def test_the_records_nearest_to_other_images(experiment, tmp_path):
    index = build_index(experiment, embedder_of(experiment), tmp_path / "index")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    examples = experiment.data.examples("train")
    for n, record in enumerate((7, 11)):
        Image.fromarray(examples[record]["image"]).resize((16, 16)).save(drawn / f"{n:05d}.png")
    Image.new("RGB", (8, 8)).save(drawn / "sheet.png")  # no image of `t2i sample`
    find = searcher(index, experiment)
    embedder, out = embedder_of(experiment), tmp_path / "index"
    cosines, records = neighbours_of_images(index, experiment, "train", embedder, find, drawn, out, 3)
    assert records[:, 0].tolist() == [7, 11] and cosines.shape == (2, 3)
    said = json.loads((out / "nearest-drawn.json").read_text())["images"]
    assert [line["keys"][0] for line in said] == ["k7", "k11"] and (out / "nearest-drawn.png").exists()
    assert len(list(drawn.iterdir())) == 3


def test_the_command(experiment, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_json(experiment)))
    out = tmp_path / "index"
    arguments = ["data", "neighbours", str(tmp_path / "config.json"), "--out", str(out), "--encoder", "pixels"]
    main([*arguments, "--count", "3", "--rows", "4"])
    assert (out / "neighbours.png").exists() and read_index(out).rows.shape == (23, 768)
    assert "23 images by pixels@16" in capsys.readouterr().err
    for more, said in {
        ("--encoder", "nothing"): "it is one of",
        ("--of", "captions"): "images alone",
        ("--images", "nowhere"): "no folder",
        ("--search", "faiss", "--count", "2"): "pip install faiss-cpu",
    }.items():
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["encode", str(tmp_path / "config.json"), "--out", "x", "--database"])
    assert "t2i data neighbours" in capsys.readouterr().err


def test_recall_counts_what_is_found(experiment):
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    index = Index(rows, np.arange(50))
    exact = searcher(index, experiment)
    assert recall(index, exact, exact, 5) == 1

    def poor(queries, count):
        cosines, found = exact(queries, count)
        return cosines, np.where(np.arange(count) < 2, found, -1)

    assert recall(index, exact, poor, 5) == pytest.approx(0.4)


@pytest.mark.parametrize("how", ["usearch", "faiss"])
def test_a_graph_finds_nearly_all(how, experiment):
    pytest.importorskip(how)
    rows = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    index = Index(rows, np.arange(2000))
    assert recall(index, searcher(index, experiment), approximate(rows, how), 5) > 0.95


# ---------------------------------------------------------------------------------------------------------- the probe


def test_a_probe_tells_gaussians_apart_as_well_as_can_be():
    """Two Gaussians of unit variance, means 2 apart along one axis: the best classifier is right in 84.1 %."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    x = rng.normal(size=(4000, 5))
    x[:, 2] += 2 * labels
    probe = Probe.fit(x[:2000], [f"class {n}" for n in labels[:2000]])
    right = np.mean([said == f"class {n}" for said, n in zip(probe(x[2000:]), labels[2000:], strict=True)])
    low, high = wilson(round(right * 2000), 2000)
    assert low < 0.8413 < high and high - low < 0.04
    with pytest.raises(ValueError, match="several classes"):
        Probe.fit(x, ["one"] * len(x))


def test_an_interval_of_no_hits_reaches_above_zero():
    low, high = wilson(0, 100)
    assert low == 0 and high == pytest.approx(1.96**2 / (100 + 1.96**2))


def test_a_copy_is_at_no_distance():
    known = np.random.default_rng(0).normal(size=(20, 3))
    found = nearest_distances(np.stack([known[4], np.add(known[0], (0.5, 0, 0))]), known)
    assert found[0] < 1e-6 < found[1] <= 0.5 + 1e-9
