"""Runs and released models that an earlier version of the library wrote go on and draw as they did.

`assets/version1.tar.xz` was made at commit 389a867 by the `make.py` in it: a run of two steps of each family and codec
with optimiser, average and records, a released model with codec and vocabulary, the losses of two more steps, and what
each draws. It is never made anew: what it holds is what users have.
"""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from t2i_jax.pipeline import Pipeline
from t2i_jax.storage.artifacts import load_artifact
from t2i_jax.storage.stored import stored
from t2i_jax.training import loop
from tests.fixtures.families import batch_for

ARCHIVE = Path(__file__).parent / "assets" / "version1.tar.xz"
NAMES = "vqgan kl dvae ar ar-captions ar-features ar-vector stream masked masked-diffusion masked-flow masked-mixture "
NAMES += "any-order any-order-flow vq-diffusion vq-diffusion-mask dit flow edm unet upsampler classifier noised-clip"
QUICK = ("kl", "ar-captions", "masked", "edm")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A folder with what the archive holds."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def there(old, monkeypatch):
    """The runs name their records and vocabulary by paths from that folder."""
    monkeypatch.chdir(old)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES.split()])
def test_a_run_goes_on_and_draws(old, name):
    experiment, losses = stored(old / "runs" / name), json.loads((old / "losses.json").read_text())[name]
    with np.load("drawn.npz") as drawn:
        if name in drawn:
            close(draws(f"runs/{name}", experiment.model), drawn[name])
    shutil.copytree(f"runs/{name}", f"on/{name}")
    longer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=4))
    loop.train(longer, f"on/{name}")
    lines = [json.loads(line) for line in Path(f"on/{name}/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        for key, value in losses[str(line["step"])].items():
            np.testing.assert_allclose(line[key], value, rtol=1e-3, err_msg=f"{key} of step {line['step']}")


def draws(run, family):
    """What the family of a run draws by its own options, for two conditions."""
    condition = {k: v for k, v in batch_for(family, 2).items() if k in family.condition_spec()}
    if "low_res" in family.batch_spec():
        condition["low_res"] = np.random.default_rng(0).uniform(-1, 1, (2, 2, 2, 3)).astype(np.float32)
    keys, options = jax.random.split(jax.random.key(1), 2), family.options()
    if type(family).__name__ == "Diffusion":
        options = dataclasses.replace(options, steps=4)
    model = load_artifact(run).model
    return np.asarray(jax.jit(lambda m, c, k: family.sample(m, c, k, options.arrays()))(model, condition, keys))


def close(found, was):
    """Codes are the same; latents and images within one grey level."""
    assert found.dtype == was.dtype and found.shape == was.shape
    if np.issubdtype(was.dtype, np.integer):
        assert np.array_equal(found, was)
    else:
        np.testing.assert_allclose(found, was, rtol=1e-6, atol=2 / 255)  # latents may be in the thousands


def test_a_released_model_draws_what_it_did(old):
    images = Pipeline.load("released").sample(["a red heart", "two green trees"], [3, 4])
    with np.load("drawn.npz") as drawn:
        assert np.abs(images.astype(int) - drawn["released"].astype(int)).max() <= 1
