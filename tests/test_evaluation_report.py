"""Whole evaluations: real images against themselves, against others and against noise; reports on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from t2i_jax.evaluation.features import FeatureNetwork
from t2i_jax.evaluation.report import Number, Report, evaluate_images, evaluate_reconstruction

DATA = np.load(Path(__file__).parent / "assets" / "tiny_twemoji32.npz")
ORDER = np.random.default_rng(0).permutation(256)
TEST, TRAIN = ORDER[:60], ORDER[60:]
IMAGES, CAPTIONS = DATA["images"], DATA["captions"]
PIXELS = FeatureNetwork("pixels", batch=32).load()


def measure(generated):
    captions = CAPTIONS[TEST].tolist()
    return evaluate_images(generated, IMAGES[TEST], captions, IMAGES[TRAIN], [PIXELS])


def test_generation_orders_sets_as_the_eye_does():
    same = measure(IMAGES[TEST])
    others = measure(IMAGES[TRAIN[:60]])
    noise = measure(np.random.default_rng(0).integers(0, 256, IMAGES[TEST].shape, dtype=np.uint8))
    value = lambda numbers, name: numbers[f"pixels@16/{name}"].value
    assert value(same, "frechet") < 1e-6 < value(others, "frechet") < value(noise, "frechet")
    assert value(same, "top1") == 1 and value(others, "top1") < 0.1 and value(noise, "top1") < 0.1
    assert value(same, "recall") == 1 and value(noise, "recall") == 0
    # Other real images are about as far as training images.
    baseline = others["pixels@16/frechet"].baselines["real"]
    assert 0.5 * baseline < value(others, "frechet") < 2 * baseline
    assert same["pixels@16/top1"].baselines == {"chance": 1 / 60}


def test_features_do_not_depend_on_the_batch():
    few, many = FeatureNetwork("pixels", batch=7).load(), PIXELS
    np.testing.assert_allclose(few(IMAGES[:20]), many(IMAGES[:20]), rtol=1e-6)
    assert many(IMAGES[:20]).shape == (20, 16 * 16 * 3) and many(IMAGES[:20]).dtype == np.float32


def test_reconstruction():
    original = IMAGES[:20]
    noisy = lambda s: np.clip(original + np.random.default_rng(0).normal(0, s, original.shape), 0, 255).astype(np.uint8)
    distance = lambda a, b: np.abs(a - b).mean((1, 2, 3))
    a, b = (evaluate_reconstruction(original, noisy(s), distance, [PIXELS], batch=8) for s in (5, 30))
    assert a["psnr"].value > b["psnr"].value > b["psnr"].baselines["flat colour"]
    assert a["ssim"].value > b["ssim"].value > b["ssim"].baselines["flat colour"]
    assert a["perceptual"].value < b["perceptual"].value
    assert a["pixels@16/frechet"].value < b["pixels@16/frechet"].value
    want = np.abs(original / 127.5 - noisy(5) / 127.5).mean()
    np.testing.assert_allclose(a["perceptual"].value, want, rtol=1e-5)  # batches of 8, 8 and 4 weigh as they should


def test_report_on_disk(tmp_path):
    numbers = {"psnr": Number(23.456789, "higher", {"flat colour": 12.0}), "frechet": Number(12345.678, "lower")}
    numbers["top1"] = Number(0.97, "higher", {"chance": 0.01}, (0.91549, 0.98972))
    report = Report("Codec", numbers, {"images": 20})
    report.save(tmp_path / "new" / "report.json")
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["numbers"]["psnr"] == {"value": 23.456789, "better": "higher", "flat colour": 12.0}
    assert written["numbers"]["top1"]["interval"] == [0.9155, 0.9897] and written["facts"] == {"images": 20}
    markdown = (tmp_path / "new" / "report.md").read_text()
    assert "| psnr ↑ | 23.46 | flat colour 12 |" in markdown and "| frechet ↓ | 12,346 |  |" in markdown
    assert "| top1 ↑ | 0.97 (0.9155 to 0.9897) | chance 0.01 |" in markdown
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]
    assert report.table().row_count == 3


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="generated: 60 images with 59 captions"):
        evaluate_images(IMAGES[TEST], IMAGES[TEST], ["x"] * 59, IMAGES[TRAIN], [PIXELS])
    with pytest.raises(ValueError, match="train_real: uint8"):
        evaluate_images(IMAGES[TEST], IMAGES[TEST], ["x"] * 60, IMAGES[TRAIN] / 255, [PIXELS])
    with pytest.raises(ValueError, match=r"features\.weights"):
        FeatureNetwork("inception").load()
    with pytest.raises(ValueError, match=r"features\.name='vgg'"):
        FeatureNetwork("vgg").load()  # pyright: ignore
