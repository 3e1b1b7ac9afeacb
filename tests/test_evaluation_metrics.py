"""Measures against answers that are known: equal sets, Gaussians, shifts, brute force."""

from pathlib import Path

import numpy as np
import pytest

from t2i_jax.evaluation.alignment import retrieve
from t2i_jax.evaluation.metrics import (
    GaussianFit,
    blocks,
    distinct,
    frechet,
    inception_score,
    kernel_distance,
    overlap,
    principal,
    psnr,
    ssim,
)

IMAGES = np.load(Path(__file__).parent / "assets" / "tiny_twemoji32.npz")["images"]
rng = np.random.default_rng(0)


def gaussian(mean, covariance) -> GaussianFit:
    return GaussianFit(np.asarray(mean, float), np.asarray(covariance, float))


def test_frechet_of_a_set_with_itself_is_zero():
    for n in (20, 200):  # fewer pictures than features, and more
        g = GaussianFit.of(rng.normal(size=(n, 50)).astype(np.float32))
        assert frechet(g, g) < 1e-9 * np.trace(g.covariance)


def test_frechet_of_known_gaussians():
    # Diagonal: |m|^2 + sum (s_a - s_b)^2.
    a, b = gaussian([0, 0], np.diag([1, 4])), gaussian([3, 4], np.diag([9, 1]))
    np.testing.assert_allclose(frechet(a, b), 25 + (1 - 3) ** 2 + (2 - 1) ** 2)
    # Of full covariances a trace of a root: by eigenvalues of the (not symmetric) product.
    x, y = rng.normal(size=(2, 60, 8))
    a, b = GaussianFit.of(x @ rng.normal(size=(8, 8))), GaussianFit.of(y)
    root = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()
    want = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    np.testing.assert_allclose(frechet(a, b), want, rtol=1e-9)
    np.testing.assert_allclose(frechet(a, b), frechet(b, a), rtol=1e-9)
    # A shift of every picture moves the means and nothing else, also where covariances are singular.
    x = rng.normal(size=(10, 30))
    np.testing.assert_allclose(frechet(GaussianFit.of(x), GaussianFit.of(x + 2)), 30 * 4, rtol=1e-9)


@pytest.mark.parametrize("n", [30, 300])
def test_principal_directions_keep_most_variance(n):
    x = rng.normal(size=(n, 40)) * np.linspace(10, 0.1, 40)
    mean, directions = principal(x, 5)
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-8)
    variances = np.linalg.svd(x - mean, compute_uv=False)[:5] ** 2
    np.testing.assert_allclose(np.sort(((x - mean) @ directions).var(0) * n), np.sort(variances), rtol=1e-8)
    assert principal(x[:3], 5)[1].shape == (40, 2)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    draws = [kernel_distance(*rng.normal(size=(2, 30, 10))) for _ in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(200)
    assert kernel_distance(rng.normal(size=(30, 10)), rng.normal(size=(30, 10)) + 1) > 5 * np.std(draws)


def test_overlap():
    x = rng.normal(size=(300, 4))
    same = overlap(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = overlap(x, x + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    # All generated pictures in one corner of the real ones: precise, but little is recalled.
    corner = overlap(x, x[:1] + 0.01 * rng.normal(size=(300, 4)))
    assert corner.precision > 0.95 and corner.recall < 0.05 and corner.coverage < 0.05


def test_overlap_by_brute_force(monkeypatch):
    x, y, k = rng.normal(size=(12, 2)), rng.normal(size=(9, 2)) + 0.7, 2
    monkeypatch.setattr("t2i_jax.evaluation.metrics.blocks", lambda a: blocks(a, 5))
    found = overlap(x, y, k)
    reach = lambda s: [sorted(np.linalg.norm(p - q) for q in s)[k] for p in s]
    inside = lambda p, s: sum(np.linalg.norm(p - q) <= r for q, r in zip(s, reach(s), strict=True))
    assert found.precision == np.mean([inside(p, x) > 0 for p in y])
    assert found.recall == np.mean([inside(p, y) > 0 for p in x])
    np.testing.assert_allclose(found.density, np.mean([inside(p, x) for p in y]) / k)
    hit = [min(np.linalg.norm(p - q) for q in y) <= r for p, r in zip(x, reach(x), strict=True)]
    assert found.coverage == np.mean(hit)


def test_images_of_one_prompt_are_counted_as_far_as_they_differ():
    real = np.arange(40.0)[:, None] * [[2.0, 0.0]]  # each two from its nearest
    assert distinct(real[:7], real) == 7 and distinct(np.zeros((9, 2)), real) == 1
    modes = np.repeat([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], 5, axis=0)
    assert distinct(modes + rng.uniform(-0.5, 0.5, modes.shape), real) == 3


def test_inception_score_limits():
    np.testing.assert_allclose(inception_score(1000 * np.eye(7)), 7, rtol=1e-6)  # sure and diverse
    np.testing.assert_allclose(inception_score(np.tile([5.0, 0, 0], (9, 1))), 1)  # all alike
    np.testing.assert_allclose(inception_score(np.zeros((9, 3))), 1)  # unsure


def test_psnr():
    x = np.full((2, 16, 16, 3), 100, np.uint8)
    y = x.copy()
    y[1] += 10
    np.testing.assert_allclose(psnr(x, y), [100, 20 * np.log10(25.5)])


def test_ssim_equals_brute_force():
    x, y = IMAGES[100:101, :14, :13], IMAGES[150:151, :14, :13]
    grid = np.arange(-5, 6)
    window = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for c in range(3):
        for i in range(4):
            for j in range(3):
                a, b = (z[0, i : i + 11, j : j + 11, c].astype(float) for z in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                up = (2 * ma * mb + 2.55**2) * (2 * cov + 7.65**2)
                values.append(up / ((ma**2 + mb**2 + 2.55**2) * (va + vb + 7.65**2)))
    np.testing.assert_allclose(ssim(x, y), np.mean(values), rtol=1e-9)
    np.testing.assert_allclose(ssim(x, x), 1)


def test_retrieval_of_equal_pictures_is_first():
    gallery = rng.normal(size=(40, 16))
    found = retrieve(gallery[::-1], gallery, list(range(40))[::-1])
    assert found.top(1) == 1 and found.median == 1
    assert found.chance(1) == 1 / 40 and found.chance(100) == 1 and found.median_by_chance == 20.5


def test_retrieval_by_concept_and_of_nothing():
    concepts = ["cat", "dog", "cat", "bird"]
    gallery = np.array([[1.0, 0], [0, 1], [-1, 0.2], [0, -1]])
    queries = gallery[[2]] * 3  # like the second cat: the concept is found by its best picture
    assert retrieve(queries, gallery, ["cat"], concepts).ranks.tolist() == [1]
    # A picture at the mean of all says nothing: the tie counts against it.
    assert retrieve(gallery.mean(0, keepdims=True), gallery, ["dog"], concepts).ranks.tolist() == [3]
    # The same picture for every prompt is right by chance only.
    constant = np.tile(rng.normal(size=(1, 8)), (30, 1))
    assert retrieve(constant, rng.normal(size=(30, 8))).top(1) == 1 / 30


def test_wrong_sets_are_named():
    with pytest.raises(ValueError, match="at least 4"):
        overlap(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="not finite"):
        GaussianFit.of(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="11x11"):
        ssim(IMAGES[:1, :8, :8], IMAGES[:1, :8, :8])
    with pytest.raises(ValueError, match="two sets"):
        psnr(IMAGES[:1], IMAGES[:2])
    with pytest.raises(ValueError, match="no real image of 'fish' and 1 more"):
        retrieve(np.ones((2, 3)), np.ones((1, 3)), ["fish", "bird"], ["cat"])
