"""Images of several shapes: buckets, the order of batches, training on them and drawing them."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from t2i_jax.cli.sizes import parse_size
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.params import named
from t2i_jax.core.specs import FieldSpec
from t2i_jax.data.buckets import BucketOrder, buckets_of, shapes_around
from t2i_jax.data.images import open_image, size_of
from t2i_jax.data.pipeline import Data
from t2i_jax.data.records import DataError, write_records
from t2i_jax.data.sources import ArrayRecord, Folder
from t2i_jax.data.transforms import Crop, to_shape
from t2i_jax.encode import encode_splits
from t2i_jax.evaluation.run import evaluate_folder
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.networks.condition import ClassEmbedder, Conditioning, Joined, SizeAndCrop
from t2i_jax.networks.dit import DiT
from t2i_jax.nn.positions import RotaryPositions, SinCosPositions
from t2i_jax.nn.transformer import Transformer
from t2i_jax.noise.processes import Flow
from t2i_jax.pipeline import Pipeline
from t2i_jax.plan.ready import abstract_setup, batch_of, batch_shapes, of_size
from t2i_jax.previews import Previews
from t2i_jax.storage.artifacts import Artifact, save_artifact
from t2i_jax.training.experiment import Experiment, Train
from t2i_jax.training.loop import train
from t2i_jax.training.trainer import Trainer
from tests.fixtures import toys
from tests.fixtures.families import CODECS, FAMILIES, batch_for, fresh
from tests.fixtures.runs import same

SHAPES = ((8, 16), (8, 8), (16, 8))


def write_pictures(folder, sizes, label=False):
    """PNG files of these rows and columns, each of one grey of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (rows, columns) in enumerate(sizes):
        Image.fromarray(np.full((rows, columns, 3), 10 + i, np.uint8)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    return folder


def test_shapes_around_a_side():
    assert shapes_around(64, 8) == ((48, 80), (56, 72), (64, 64), (72, 56), (80, 48))
    for side, multiple, longest in itertools.product((64, 256, 512), (8, 16, 64), (1.0, 1.5, 3.0)):
        shapes = shapes_around(side, multiple, longest)
        assert (side, side) in shapes and {(c, r) for r, c in shapes if r == c} <= set(shapes)
        for rows, columns in shapes:
            assert rows % multiple == columns % multiple == 0 and side**2 - rows * multiple < rows * columns <= side**2
            assert max(rows, columns) <= longest * min(rows, columns)
    with pytest.raises(ValueError, match="side 60"):
        shapes_around(60, 8)


def test_an_image_goes_to_the_nearest_ratio_of_the_largest_resolution_that_it_fills():
    shapes = ((32, 64), (64, 64), (64, 32), (128, 128), (64, 128))
    sizes = np.array([(30, 70), (300, 310), (100, 100), (500, 240), (128, 256), (0, 0), (5000, 100)])
    assert buckets_of(sizes, shapes).tolist() == [0, 3, 1, 2, 4, 1, 2]
    some = np.random.default_rng(0).integers(20, 400, (200, 2))
    one = shapes_around(64, 8)
    gap = lambda size: [abs(math.log(size[0] / size[1] * c / r)) for r, c in one]
    assert buckets_of(some, one).tolist() == [int(np.argmin(gap(size))) for size in some]


def test_the_size_of_a_file_is_that_of_the_upright_image(tmp_path):
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    assert size_of(np.zeros((3, 5, 3))) == (3, 5) and size_of(b"no image") == (0, 0) and size_of(None) == (0, 0)
    for turn, size in ((1, (10, 20)), (6, (20, 10)), (8, (20, 10)), (3, (10, 20))):
        exif[0x0112] = turn
        image.save(tmp_path / "a.jpg", exif=exif)
        assert size_of((tmp_path / "a.jpg").read_bytes()) == size


@pytest.mark.parametrize("counts", [(7, 5, 3), (12, 1, 1), (4, 4, 4), (20,)])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_each_record_comes_once_in_each_epoch_of_its_shape(counts, batch):
    buckets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    n = len(buckets)
    order = BucketOrder(buckets, batch, [n], None, 3)
    seen = {k: [] for k in range(len(counts))}
    for number in range(n):  # a period: each bucket has as many batches as records
        rows = [order[number * batch + row] for row in range(batch)]
        (kind,) = {int(buckets[i]) for i in rows}
        assert order.bucket(number * batch) == kind
        seen[kind] += rows
        for k, count in enumerate(counts):  # evenly: never more than a turn or two off its share
            assert abs(len(seen[k]) / batch - count * (number + 1) / n) < 2
    for k, count in enumerate(counts):
        assert len(seen[k]) == count * batch
        for epoch in range(batch):
            assert sorted(seen[k][epoch * count :][:count]) == np.flatnonzero(buckets == k).tolist()


def test_sources_keep_their_weights_within_every_shape():
    buckets = np.array([0, 1] * 20 + [0, 0, 1, 1] * 5)  # 40 records, then 20
    order = BucketOrder(buckets, 4, [40, 20], [1.0, 3.0], 0)
    found = np.array([order[g] for g in range(4 * 2000)])
    assert abs((found >= 40).mean() - 0.75) < 0.01
    for kind in (0, 1):
        assert abs((found[buckets[found] == kind] >= 40).mean() - 0.75) < 0.02


def test_one_shape_of_all_is_the_order_without_shapes(tmp_path):
    source = Folder(str(write_pictures(tmp_path / "pictures", [(8, 8)] * 6)))
    plain, shaped = Data(source, image_size=8, batch_size=4), Data(source, shapes=((8, 8),), batch_size=4)
    for data in (plain, shaped):
        rows = [next(stream) for stream in [data.batches()] for _ in range(3)]
        assert {b["image"].shape for b in rows} == {(4, 8, 8, 3)}
        assert len({int(b["image"][i, 0, 0, 0]) for b in rows for i in range(4)}) == 6


def test_batches_are_of_one_shape_on_any_hosts_after_any_stop(tmp_path):
    sizes = [(8, 20)] * 5 + [(9, 9)] * 4 + [(30, 12)] * 6
    source = Folder(str(write_pictures(tmp_path / "pictures", sizes)))
    data = Data(source, shapes=SHAPES, batch_size=4, crop="random")
    tokens = lambda captions: (np.array([[int(c.split()[1])] for c in captions]), np.ones((len(captions), 1), bool))
    whole = list(itertools.islice(data.batches(tokens), 12))
    assert {b["image"].shape[1:3] for b in whole} == set(SHAPES)
    for batch in whole:
        for shape, number in zip([batch["image"].shape[1:3]] * 4, batch["text"][:, 0], strict=True):
            assert SHAPES[buckets_of(np.array([sizes[number]]), SHAPES)[0]] == shape
    for at in (1, 7):
        later = list(itertools.islice(data.batches(tokens, at * 4), 3))
        chex.assert_trees_all_equal(later, whole[at : at + 3])
    for rows in ([0, 1], [3, 2]):
        part = list(itertools.islice(data.batches(tokens, rows=rows), 12))
        chex.assert_trees_all_equal(part, [{k: v[rows] for k, v in b.items()} for b in whole])
    # A position that is no whole number of batches, as after another batch size, goes on with the next whole one.
    chex.assert_trees_all_equal(next(data.batches(tokens, 5)), whole[2])


def test_a_broken_record_is_replaced_by_one_of_its_shape(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(8, 20)] * 5 + [(30, 12)] * 6)
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[:-30])
    data = Data(Folder(str(folder)), shapes=SHAPES, batch_size=2, broken_count=10**6)
    for batch in itertools.islice(data.batches(), 30):
        grey = batch["image"][:, 0, 0, 0].astype(int) - 10
        assert 7 not in grey and set(grey < 5) == {batch["image"].shape[1] == 8}


def test_bad_shapes_are_said(tmp_path):
    folder = Folder(str(write_pictures(tmp_path / "pictures", [(8, 8)])))
    with pytest.raises(DataError, match="twice"):
        Data(folder, shapes=((8, 8), (8, 8)))
    with pytest.raises(DataError, match="rows and columns"):
        Data(folder, shapes=((8, 0),))


# -- families


ALL = FAMILIES | {
    f"{name}-rotary": with_fields(FAMILIES[name], positions=RotaryPositions()) for name in ("masked", "masked-bert")
}
ANY = [name for name, config in ALL.items() if config.capabilities.any_size]
FIXED = [name for name, c in FAMILIES.items() if c.capabilities.family and not c.capabilities.any_size]


@pytest.mark.parametrize("name", ANY)
def test_parameters_serve_every_grid(name):
    config = ALL[name]
    patch = config.sample_spec().patch
    rows, columns = config.sample_spec().grid
    other = config.sized((2 * rows, columns + 2 * (columns > 2) * patch if columns % 4 else 2 * columns))
    assert other.sized((rows, columns)) == config
    model = jax.eval_shape(config.init, jax.random.key(0))
    adopted = jax.eval_shape(other.adopt, model)
    fresh = jax.eval_shape(other.init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(adopted, fresh)
    batch = jax.tree.map(jnp.asarray, batch_for(other, 2))
    loss = lambda model: sum(o.loss(model, batch, jax.random.key(1), jnp.int32(0), True).loss for o in objectives)
    objectives = list(other.objectives().values())
    assert jax.eval_shape(loss, adopted).shape == ()
    condition = {k: v for k, v in batch.items() if k in other.condition_spec()}
    if config.capabilities.super_resolution:
        condition.setdefault("low_res", jnp.zeros((2, 2, 2, config.sample_spec().code.shape[0])))
    draw = lambda model: other.sample(model, condition, jax.random.split(jax.random.key(0), 2))
    assert jax.eval_shape(draw, adopted).shape == (2, *other.sample_spec().shape)


def test_there_are_families_of_each_kind():
    kinds = {type(ALL[name]).__name__ for name in ANY}
    assert {"Diffusion", "AR", "Masked"} <= kinds and FIXED
    for name in FIXED:
        with pytest.raises(ConfigError, match="of one size"):
            Pipeline.place(FAMILIES[name], {}, None, None).sized(16, 16)


def test_positions_are_scaled_to_the_range_of_the_first_grid():
    network = DiT((8, 8), 3, 2, Transformer(16, 1, 2, norm="layer", bias=True))
    other = network.sized((16, 4))
    table = other.positions.table(other.grid, 16).reshape(8, 2, 16)
    own = network.positions.table(network.grid, 16).reshape(4, 4, 16)
    np.testing.assert_allclose(table[::2], own[:, ::2], atol=1e-6)
    assert other.sized((8, 8)) == network and other.positions.base == (4, 4)


# -- training


def experiment(tmp_path, steps, positions=RotaryPositions(), count=9):
    sizes = [(8, 20)] * count + [(9, 9)] * (count - 2) + [(30, 12)] * (count - 4)
    rng = np.random.default_rng(0)
    if not (tmp_path / "data").exists():
        records = (
            {"key": str(i), "image": rng.integers(0, 255, (*s, 3)).astype(np.uint8), "label": i % 3}
            for i, s in enumerate(sizes)
        )
        write_records(tmp_path / "data", records)
    network = DiT(
        (8, 8),
        3,
        4,
        Transformer(16, 1, 2, norm="layer", bias=True),
        conditioning=Conditioning(ClassEmbedder(3)),
        positions=positions,
        learn_variance=False,
    )
    source = ArrayRecord(str(tmp_path / "data"))
    return Experiment(
        Diffusion(network, Flow(), "velocity"),
        Data(source, source, shapes=SHAPES, batch_size=8),
        Train(steps, evaluate_every=0, preview_every=0, save_every=100),
        toys.experiment().mesh,
    )


@pytest.mark.parametrize("positions", [RotaryPositions(), SinCosPositions()])
def test_a_run_on_mixed_shapes_goes_on_exactly_and_draws_each(positions, tmp_path):
    whole = train(experiment(tmp_path, 8, positions), tmp_path / "whole")
    train(experiment(tmp_path, 3, positions), tmp_path / "parts")
    parts = train(experiment(tmp_path, 8, positions), tmp_path / "parts")
    same(whole, parts)
    pipeline = Pipeline.load(tmp_path / "whole")
    for rows, columns in ((8, 16), (16, 8), (12, 12)):
        images = pipeline.sized(columns, rows)(1, seeds=[0, 1], steps=2)
        assert images.shape == (2, rows, columns, 3)
    np.testing.assert_array_equal(pipeline.sized(8, 8)(1, steps=2), pipeline(1, steps=2))
    with pytest.raises(ConfigError, match="size 10x8"):
        pipeline.sized(10, 8)


def test_one_program_is_compiled_for_each_shape(tmp_path):
    e = experiment(tmp_path, 1)
    trainer = Trainer(e, tmp_path / "run")
    with jax.set_mesh(trainer.mesh):
        state, batches = trainer.start(), trainer.batches(0)
        batch = next(batches)
        assert list(trainer.warm(state, batch)) == [1, 2, 3]
        seen = set()
        for some in itertools.chain([batch], itertools.islice(batches, 12)):
            seen.add(some["image"].shape)
            state, metrics = trainer.update(state, some)
            assert np.isfinite(float(metrics["loss"]))
        assert len(seen) == len(trainer.compiled) == 3 and trainer.step._cache_size() == 0
        batches.close()


def test_the_loss_of_a_shape_is_that_of_the_model_of_this_size(tmp_path):
    e = experiment(tmp_path, 1, SinCosPositions())
    trainer = Trainer(e, tmp_path / "run")
    with jax.set_mesh(trainer.mesh):
        state = trainer.start()
        for batch in itertools.islice(trainer.batches(0), 6):
            ready = trainer.prepare(trainer.frozen, batch, jax.random.key(0))
            grid = ready["image"].shape[1:3]
            own, model = e.model.sized(grid), trainer.model(state)
            fresh = own.init(jax.random.key(0))
            values = named(model) | ({"positions": named(fresh)["positions"]})
            direct = own.loss(own.adopt(model), ready, jax.random.key(5)).loss
            through = trainer.objectives["model"].loss(model, ready, jax.random.key(5), jnp.int32(0), True).loss
            np.testing.assert_allclose(direct, through, rtol=1e-6)
            np.testing.assert_array_equal(named(own.adopt(model))["positions"][...], values["positions"][...])


def test_a_family_of_one_size_takes_no_shapes(tmp_path):
    e = experiment(tmp_path, 1)
    fixed = dataclasses.replace(e, model=FAMILIES[FIXED[0]])
    with pytest.raises(ConfigError, match="data.shapes: .*of one size"):
        Trainer(fixed, tmp_path / "run")
    with pytest.raises(ConfigError, match="data.shapes"):
        Trainer(dataclasses.replace(e, data=dataclasses.replace(e.data, shapes=((8, 8), (8, 10)))), tmp_path / "run")


def test_codes_of_several_shapes_are_stored_and_trained_on(tmp_path):
    e = experiment(tmp_path, 1)
    codec = CODECS["kl"]
    weights = codec.init(jax.random.key(0))
    save_artifact(Artifact(codec, weights), tmp_path / "codec", "")
    factor, k = codec.spec.factor, codec.spec.code.shape[0]
    shapes, data = SHAPES, dataclasses.replace(e.data, held_out=None)
    network = dataclasses.replace(e.model.network, size=(8 // factor, 8 // factor), channels=k, patch=1)
    model = dataclasses.replace(e.model, network=network)
    e = dataclasses.replace(e, model=model, data=data, codec=str(tmp_path / "codec"))
    encode_splits(e, tmp_path / "codes", ["train"], batch_size=8)
    stored = list(ArrayRecord(str(tmp_path / "codes")).open())
    source = list(ArrayRecord(str(tmp_path / "data")).open())
    for record, own in zip(stored, source, strict=True):
        shape = shapes[buckets_of(np.array([own["image"].shape[:2]]), shapes)[0]]
        assert record["key"] == own["key"] and tuple(record["size"]) == shape
        top, left, height, width = np.array(record["crop"]) * np.tile(own["image"].shape[:2], 2)
        assert abs(height / width - shape[0] / shape[1]) < 1e-6 and {top, left} >= {0.0}
        assert np.allclose((2 * top + height, 2 * left + width), own["image"].shape[:2])
        image = to_shape(open_image(own["image"], max(shape), 1.0), shape)[0][None] / np.float32(127.5) - 1
        np.testing.assert_allclose(
            record["latents"], codec.to_store(weights, jnp.asarray(image))["latents"][0], atol=1e-5
        )
    encoded = dataclasses.replace(e, data=dataclasses.replace(data, source=ArrayRecord(str(tmp_path / "codes"))))
    train(dataclasses.replace(encoded, train=dataclasses.replace(e.train, steps=4)), tmp_path / "run")
    images = Pipeline.load(tmp_path / "run").sized(16, 8)(1, steps=2)
    assert images.shape == (1, 8, 16, 3)


def test_a_run_on_shapes_is_previewed_and_evaluated_at_any_of_them(tmp_path):
    e = experiment(tmp_path, 2)
    e = dataclasses.replace(e, train=dataclasses.replace(e.train, preview_every=2, previews=4))
    train(e, tmp_path / "run", preview=Previews())
    assert (tmp_path / "run/samples/0000002.png").exists()
    for size in (None, (16, 8)):
        report = evaluate_folder(
            tmp_path / "run", tmp_path / "out", count=8, spaces=["pixels"], size=size, options=["--steps=2"]
        )
        assert report.facts["images"]["known classes"] == 8
    with pytest.raises(ConfigError, match="size 10x8"):
        evaluate_folder(tmp_path / "run", tmp_path / "out", count=8, spaces=["pixels"], size=(10, 8))
    with pytest.raises(ConfigError, match="--size 10:"):
        parse_size("10")


def test_a_plan_is_of_the_largest_shape_or_of_the_one_asked_for(tmp_path):
    e = experiment(tmp_path, 1)
    for size, grid in ((None, (8, 16)), ((8, 16), (16, 8)), ((12, 12), (12, 12))):
        planned = of_size(e, size)
        assert planned.model.grid == grid and batch_shapes(planned)["image"].shape == (8, *grid, 3)
        setup = abstract_setup(planned, batch_of(planned)[0], e.mesh.build())
        assert setup.trainer.flops(setup.batch) > 0
    with pytest.raises(ConfigError, match="size 10x8"):
        of_size(e, (10, 8))


# -- the original's size and the crop, as a condition


def read_crops(tmp_path, **fields):
    source = Folder(str(write_pictures(tmp_path / "pictures", [(30, 60), (64, 16), (20, 20)])))
    spec = {"image": FieldSpec((None, None, 3), "uint8"), "crop": FieldSpec((4,), "float32", optional=True)}
    data = Data(source, image_size=8, batch_size=3, **fields)
    return data, next(data.batches(spec=spec))


def test_a_crop_is_given_in_pixels_of_the_scaled_image(tmp_path):
    _, batch = read_crops(tmp_path)
    found = {tuple(row.round(5).tolist()) for row in batch["crop"]}
    assert found == {(30, 60, 0, 4), (64, 16, 12, 0), (20, 20, 0, 0)}
    _, batch = read_crops(tmp_path, crop="random")
    for rows, columns, above, left in batch["crop"]:
        assert above >= 0 and left >= 0 and rows in (30, 64, 20)
        scale = 8 / min(rows, columns) / 0.8  # a crop of 0.8 is the smallest
        assert above + 8 <= rows * scale + 1e-3 and left + 8 <= columns * scale + 1e-3


def test_a_mirrored_image_has_its_crop_mirrored(tmp_path):
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, :, 0] = np.arange(32) * 8
    write_records(tmp_path / "data", [{"key": "a", "image": image}] * 8)
    spec = {"image": FieldSpec((None, None, 3), "uint8"), "crop": FieldSpec((4,), "float32", optional=True)}
    source = ArrayRecord(str(tmp_path / "data"))
    data = Data(source, image_size=8, batch_size=8, crop="random", smallest_crop=1.0, flip=True)
    rows = next(data.batches(spec=spec))
    flipped = 0
    for pixels, (_, _, _, left) in zip(rows["image"][:, 0, :, 0].astype(int), rows["crop"], strict=True):
        turned = pixels[0] > pixels[-1]
        first = (pixels[-1] if turned else pixels[0]) / 8  # the column where the crop begins in the stored image
        assert abs((24 - left if turned else left) - first) < 1.1
        flipped += turned
    assert 0 < flipped < 8


def test_a_model_reads_the_crop_and_stands_for_a_whole_image_without_it():
    what = Joined((ClassEmbedder(3), SizeAndCrop((64, 64), 8)))
    module = what.init(jax.random.key(0), 16)
    batch, drop = {"label": jnp.arange(3)}, jnp.zeros(3, bool)
    tokens, mask = module(batch, drop)
    assert tokens.shape == (3, 2, 16) and mask.all()
    whole = jnp.tile(jnp.array([64.0, 64.0, 0.0, 0.0]), (3, 1))
    np.testing.assert_allclose(module(batch | {"crop": whole}, drop)[0], tokens, atol=1e-6)
    other = module(batch | {"crop": whole.at[:, 2].set(9.0)}, drop)[0]
    assert np.abs(other[:, 1] - tokens[:, 1]).min(1).max() > 0 and np.array_equal(other[:, 0], tokens[:, 0])
    dropped = module(batch | {"crop": whole}, ~drop)[0]
    np.testing.assert_allclose(dropped[:, 1], tokens[:, 1], atol=1e-6)  # it stays where the class is dropped


def test_a_run_reads_crops_of_images_and_of_stored_codes(tmp_path):
    e = experiment(tmp_path, 2)
    what = Joined((ClassEmbedder(3), SizeAndCrop((8, 8), 8)))
    network = dataclasses.replace(e.model.network, conditioning=Conditioning(what))
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, network=network))
    trainer = Trainer(e, tmp_path / "unused")
    with jax.set_mesh(trainer.mesh):
        batches = trainer.batches(0)
        assert next(batches)["crop"].shape == (8, 4)
        batches.close()
    train(e, tmp_path / "run")
    assert Pipeline.load(tmp_path / "run").sized(16, 8)(1, steps=2).shape == (1, 8, 16, 3)
    (record, *_) = e.data.examples()
    rows, columns = record["original"]
    assert Crop(*record["crop"]).numbers((rows, columns), (8, 16)).tolist()[:2] == [rows, columns]


def test_an_upsampler_keeps_the_ratio_of_what_it_is_given():
    place = lambda name: Pipeline.place(FAMILIES[name], fresh(FAMILIES[name]))
    base, second = place("dit"), place("upsampler")
    rows, columns = base.image_shape
    wide = base.sized(2 * columns, rows // 2)
    (stage,) = wide._cascade([second])
    assert stage.image_shape[1] == 4 * stage.image_shape[0] and stage.image_shape[0] >= rows // 2
    assert base._cascade([second])[0] is second


def test_a_pipeline_is_saved_with_its_codec_and_at_its_size(tmp_path):
    codec = CODECS["kl"]
    factor, k = codec.spec.factor, codec.spec.code.shape[0]
    network = DiT((8 // factor,) * 2, k, 1, Transformer(16, 1, 2, norm="layer", bias=True), learn_variance=False)
    family = Diffusion(network, Flow(), "velocity")
    made = Pipeline.place(family, fresh(family), Artifact(codec, fresh(codec)))
    made.save(tmp_path / "model")
    read = Pipeline.load(tmp_path / "model")
    np.testing.assert_array_equal(made(3, steps=2), read(3, steps=2))
    wide = read.sized(16, 8)
    wide.save(tmp_path / "wide")
    np.testing.assert_array_equal(wide(3, steps=2), Pipeline.load(tmp_path / "wide")(3, steps=2))
