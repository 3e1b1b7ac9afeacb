"""The examples of the user's own parts: each is trained, stored, read again and sampled as those of the library are."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples import clipart, multistep
from examples.fsq import FSQHead
from examples.gan import GAN, GANSampler
from examples.trigonometric import Trigonometric
from t2i_jax.core import config
from t2i_jax.core.errors import ConfigError
from t2i_jax.core.family import with_fields
from t2i_jax.core.sharding import MeshConfig
from t2i_jax.models.any_order import AnyOrder
from t2i_jax.models.diffusion import Diffusion
from t2i_jax.models.masked import Masked
from t2i_jax.networks.condition import ClassEmbedder
from t2i_jax.networks.dit import DiT
from t2i_jax.pipeline import Pipeline
from t2i_jax.release import release
from t2i_jax.sampling.options import ARSampler, DiffusionSampler, MaskedSampler
from t2i_jax.sampling.orders import Permutation, Sets
from t2i_jax.sampling.solvers import SOLVERS, Denoised, solve
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.training.loop import train
from t2i_jax.training.optimizer import Optimizer
from tests.fixtures import toys

LEVELS = (4, 3, 2)
SHAPE = dict(grid=(2, 2), width=16, depth=1, heads=2, head=FSQHead(LEVELS), condition=ClassEmbedder(2), dropout=0.0)
FAST = Optimizer(learning_rate=1e-2, warmup=2)


@dataclasses.dataclass(frozen=True)
class Corners(toys.Numbers):
    """Classes, and codes, or images, that are the least or the largest of their values, by the class."""

    largest: tuple[int, ...] = ()

    def batches(self, text=None, position=0, rows=None, split="train", spec=None):
        for batch in super().batches(text, position, rows, split, spec):
            label = (batch["x"][:, 0] > 0).astype(np.int32)
            each = label[:, None, None, None]
            codes = np.tile(each * np.asarray(self.largest, np.int32), (1, 2, 2, 1))
            image = np.tile(25 + 205 * each, (1, 8, 8, 3)).astype(np.uint8)
            yield {"label": label} | ({"codes": codes} if self.largest else {"image": image})


def stored(value):
    """What is read of a config that was stored as JSON."""
    return config.from_json(json.loads(json.dumps(config.to_json(value))))


def test_levels_are_quantised_evenly():
    head = FSQHead(LEVELS)
    codes = jnp.asarray(list(itertools.product(*map(range, LEVELS))))
    np.testing.assert_array_equal(head.quantize(jnp.arctanh(0.999 * head.dequantize(codes))), codes)
    assert head.code.values == len(codes) == 24
    assert np.abs(np.asarray(head.dequantize(codes))).max() == 1
    with pytest.raises(ConfigError, match=r"FSQHead\.levels .*2 to"):
        FSQHead((8, 1))


@pytest.mark.parametrize(
    "family, options",
    [
        (with_fields(Masked(), **SHAPE, order=Sets(), buffer=1), MaskedSampler(iterations=2, temperature=0.01)),
        (with_fields(AnyOrder(), **SHAPE, order=Permutation()), ARSampler(greedy=True)),
    ],
    ids=["masked", "any order"],
)
def test_a_head_is_trained_and_sampled(family, options, tmp_path):
    experiment = toys.experiment(
        family, Corners(largest=tuple(n - 1 for n in LEVELS)), steps=60, save_every=60, optimizer=FAST
    )
    train(experiment, tmp_path)
    read, artifact = config.load(tmp_path), load_artifact(tmp_path)
    assert read.model == family == artifact.config and read.model.head == FSQHead(LEVELS)
    assert config.override(experiment, ["--model.head.levels", "5", "5"]).model.head == FSQHead((5, 5))
    label, keys = jnp.asarray([0, 1]), jax.random.split(jax.random.key(0))
    codes = family.sample(artifact.model, {"label": label}, keys, options, guided=False)
    wanted = label[:, None, None, None] * (np.asarray(LEVELS) - 1)
    np.testing.assert_array_equal(codes, np.broadcast_to(wanted, codes.shape))


def test_a_process_keeps_the_law_of_its_data():
    """Quantiles of a Gaussian whose score is known are those of its images at the end."""
    process, mean, std, z = Trigonometric(), 0.6, 0.5, jnp.linspace(-2, 2, 9)[:, None]

    def denoise(x, i):
        a, s = path.alpha[i], path.sigma[i]
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        return Denoised(x0, (x - a * x0) / s)

    path = process.timesteps(64)
    np.testing.assert_allclose(path.alpha[:65] ** 2 + path.sigma[:65] ** 2, 1, rtol=1e-5)
    start = path.alpha[0] * mean + jnp.hypot(path.alpha[0] * std, path.sigma[0]) * z
    for solver in (process.solver, "heun", "lms"):
        x = jax.jit(lambda x, s=solver: solve(SOLVERS[s], denoise, x, path, jnp.zeros_like))(start)
        np.testing.assert_allclose(x, mean + std * z, atol=0.03 if solver == "ddim" else 2e-3)


def test_a_process_and_a_solver_go_into_a_diffusion():
    network = with_fields(
        DiT(),
        size=(2, 2),
        channels=3,
        patch=1,
        width=8,
        depth=1,
        heads=2,
        learn_variance=False,
        condition=ClassEmbedder(3),
    )
    family = Diffusion(network, Trigonometric(scale=2.0, max_steps=8), "v", solver="lms")
    assert SOLVERS["lms"] is multistep.lms and stored(family) == family
    model, keys = family.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 2)
    batch = {"codes": jnp.ones((2, 2, 2, 3)), "label": jnp.arange(2)}
    assert np.isfinite(jax.jit(family.loss)(model, batch, keys[0]).loss)
    for solver in SOLVERS:
        sample = dataclasses.replace(family, solver=solver).sample
        made = jax.eval_shape(sample, model, {"label": batch["label"]}, keys, DiffusionSampler(steps=4))
        assert made.shape == (2, 2, 2, 3)
    # A new network predicts v = 0, so that x_0 = alpha x: samples are finite and of the shape asked for.
    images = family.sample(model, {"label": batch["label"]}, keys, DiffusionSampler(steps=4))
    assert images.shape == (2, 2, 2, 3) and np.isfinite(images).all()
    with pytest.raises(ConfigError, match=r"one of own, ddpm.*lms"):
        dataclasses.replace(family, solver="dppm")


def test_a_family_is_trained_released_and_sampled(tmp_path):
    family = GAN((8, 8), width=8, noise=4, condition=ClassEmbedder(2))
    train(
        toys.experiment(family, Corners(), steps=150, save_every=150, optimizer=dataclasses.replace(FAST, b1=0.5)),
        tmp_path / "run",
    )
    release(tmp_path / "run", tmp_path / "released")
    pipeline = Pipeline.load(tmp_path / "released", MeshConfig(1))
    shares = []
    preview = lambda share, images: shares.append(share)
    dark, bright = pipeline.sampler(GANSampler(0.5)).sample(["0", "1"], on_preview=preview)
    assert shares == [1]
    assert dark.shape == (8, 8, 3) and dark.mean() < 64 and bright.mean() > 192


def test_clip_art_becomes_a_folder_of_captioned_pictures(tmp_path):
    """Two Debian packages as they are unpacked: stamps with sentences in many languages, and names of files."""
    stamps, library = tmp_path / "usr/share/tuxpaint/stamps/animals", tmp_path / "usr/share/openclipart/png"
    files = {
        stamps / "cat.png": "A cat.\nde.utf8=Eine Katze.\n",
        stamps / "mute.png": None,
        library / "food" / "red_apple_ann_b_01.png": None,
        library / "food" / "red_apple_ann_b_02.png": None,
        library / "special" / "dots.png": None,
        library / "food" / "broken.png": None,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (300, 150), (255, 0, 0, 128)).save(path)
        if text:
            path.with_suffix(".txt").write_text(text)
    (library / "food" / "broken.png").write_bytes(b"no picture")
    counts = clipart.build(tmp_path, tmp_path / "out")
    written = {p.stem.partition("-")[2]: p for p in (tmp_path / "out").rglob("*.png")}
    assert sum(counts.values()) == len(written) == 3 and {"cat", "red_apple_ann_b_01"} < written.keys()
    assert written["red_apple_ann_b_01"].parent == written["red_apple_ann_b_02"].parent
    assert written["cat"].with_suffix(".txt").read_text() == "A cat\n"
    said = written["red_apple_ann_b_02"].with_suffix(".txt").read_text().splitlines()
    assert said == ["red apple ann b", "red apple ann b, food"]
    with Image.open(written["cat"]) as picture:
        assert picture.size == (clipart.SIDE,) * 2 and picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((48, 48)) == (255, 127, 127)
