"""Measures of sets of images and of pairs of images, in float64 on the host."""

import dataclasses

import numpy as np
from scipy.ndimage import correlate1d

from t2i_jax.core.arrays import Float, typed

# --- Sets: features (n, d) of generated and of real images


@dataclasses.dataclass(frozen=True)
class GaussianFit:
    """Mean (d,) and covariance (d, d) of feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "GaussianFit":
        """The Gaussian of features (n, d). Errors: `ValueError` for fewer than two."""
        check_features(features, 2)
        x = features.astype(np.float64)
        return cls(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))

    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance; rounding below zero counts as zero."""
        values, vectors = np.linalg.eigh(self.covariance)
        return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def frechet(a: GaussianFit, b: GaussianFit) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): Frechet distance (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root of C_a C_b is the sum of the singular values of C_a^(1/2) C_b^(1/2): real, never negative, and
    as exact for singular covariances (fewer images than features) as for others.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Frechet distance of features of {len(a.mean)} and {len(b.mean)} dimensions")
    cross = np.linalg.svd(a.root() @ b.root(), compute_uv=False).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


@typed
def principal(real: np.ndarray, dimensions: int) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d k"]]:
    """Mean (d,) and principal directions (d, k) of real features (n, d); k is `dimensions`, or what n images span.

    With fewer images than features a covariance is mostly unseen; its leading directions are not.
    """
    check_features(real, 2)
    mean = real.mean(0, dtype=np.float64)
    x = real - mean
    few = len(x) < x.shape[1]
    values, vectors = np.linalg.eigh(x @ x.T if few else x.T @ x)
    kept = np.flatnonzero(values > 1e-10 * values[-1])[-dimensions:]
    return mean, x.T @ vectors[:, kept] / np.sqrt(values[kept]) if few else vectors[:, kept]


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy with kernel (x.y / d + 1)^3, unbiased: 0 on average for equal laws at any n.

    KID, Binkowski et al. 2018, eq. 4, over all images rather than blocks of them; may come out slightly negative.
    """
    for features in (a, b):
        check_features(features, 2)
    a, b = a.astype(np.float64), b.astype(np.float64)
    kernel = lambda inner: (inner / a.shape[1] + 1) ** 3
    total = lambda x, y: sum(kernel(rows @ y.T).sum() for rows in blocks(x))
    within = lambda x: (total(x, x) - kernel((x * x).sum(1)).sum()) / (len(x) * (len(x) - 1))
    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Overlap of two sets: precision and density of the generated images, recall and coverage of the real ones."""

    precision: float
    recall: float
    density: float
    coverage: float


NEIGHBOURS = 3
"""k of precision and recall; sets of fewer than k + 1 images have none."""


def overlap(real: np.ndarray, generated: np.ndarray, neighbours: int = NEIGHBOURS) -> Overlap:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Each image has a ball that reaches its k-th nearest neighbour in its own set. Precision: generated
    images inside some real ball. Recall: real ones inside some generated ball. Density: real balls around a generated
    image, over k. Coverage: real balls with a generated image in them.
    """
    k = neighbours
    for features in (real, generated):
        check_features(features, k + 1)
    # The first of a sorted row is the image itself.
    radius = lambda x: np.concatenate([np.partition(distances(rows, x), k, axis=1)[:, k] for rows in blocks(x)])
    around_real, around_generated = radius(real), radius(generated)
    balls, recall, coverage = np.zeros(len(generated)), [], []
    for rows, reach in zip(blocks(real), blocks(around_real), strict=True):
        between = distances(rows, generated)
        inside = between <= reach[:, None]
        balls += inside.sum(0)
        coverage.append(inside.any(1))
        recall.append((between <= around_generated).any(1))
    share = lambda parts: float(np.concatenate(parts).mean())
    return Overlap(float((balls > 0).mean()), share(recall), float(balls.mean() / k), share(coverage))


@typed
def distances(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> Float[np.ndarray, "n m"]:
    """Euclidean distances (n, m) of the rows of a (n, d) and b (m, d)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))


@typed
def distinct(images: Float[np.ndarray, "n k"], real: Float[np.ndarray, "m k"]) -> int:
    """How many images differ from each other, by their features and those of real ones.

    Taken in turn, one counts that is as far from all that were counted as the median real image is from the nearest
    other real one.
    """
    check_features(real, 2)
    nearest = np.concatenate([np.partition(distances(rows, real), 1, axis=1)[:, 1] for rows in blocks(real)])
    apart, kept = distances(images, images) >= np.median(nearest), [0]
    for i in range(1, len(images)):
        if apart[i, kept].all():
            kept.append(i)
    return len(kept)


def blocks(x: np.ndarray, size: int = 1024) -> list[np.ndarray]:
    """The rows of x in portions, so that matrices quadratic in images fit in memory."""
    return [x[i : i + size] for i in range(0, len(x), size)]


@typed
def inception_score(logits: Float[np.ndarray, "n v"]) -> float:
    """exp E KL(p(y|x) || p(y)) from class logits (n, v) (Salimans et al. 2016), over all images at once."""
    logits = logits.astype(np.float64)
    logp = logits - logits.max(1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    p = np.exp(logp)
    marginal = np.log(np.maximum(p.mean(0), 1e-300))
    return float(np.exp((p * (logp - marginal)).sum(1).mean()))


def check_features(features: np.ndarray, least: int) -> None:
    """Errors: `ValueError` unless `features` is finite (n, d) with n >= `least`."""
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"features of at least {least} images are wanted, (n, d), not {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features are not finite")


# --- Pairs: images uint8 (n, i, j, 3) and their reconstructions


@typed
def psnr(real: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " n"]:
    """Peak signal-to-noise ratio per image (n,) in dB; 100 dB at most, which equal images get."""
    check_pairs(real, other)
    error = ((real.astype(np.float64) - other) ** 2).mean((1, 2, 3)) / 255**2
    return -10 * np.log10(np.maximum(error, 1e-10))


@typed
def ssim(real: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " n"]:
    """Structural similarity per image (n,), at most 1 (Wang et al. 2004): per channel, where the window fits.

    Gaussian window of 11x11 and sigma 1.5, K1 = 0.01, K2 = 0.03. Errors: `ValueError` for sides below 11.
    """
    check_pairs(real, other)
    if min(real.shape[1:3]) < 11:
        raise ValueError(f"ssim: images are at least 11x11, not {real.shape[1]}x{real.shape[2]}")
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()

    def one(x: np.ndarray, y: np.ndarray) -> float:  # one pair at a time: five maps of it stay in the cache
        x, y = x.astype(np.float64), y.astype(np.float64)
        blur = lambda z: correlate1d(correlate1d(z, taps, 0), taps, 1)[5:-5, 5:-5]
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())

    return np.array([one(x, y) for x, y in zip(real, other, strict=True)])


def check_pairs(real: np.ndarray, other: np.ndarray) -> None:
    """Errors: `ValueError` unless both are uint8 of one shape (n, i, j, 3)."""
    if real.shape != other.shape or real.ndim != 4 or real.dtype != np.uint8 or other.dtype != np.uint8:
        raise ValueError(
            f"two sets of uint8 (n, i, j, 3) are wanted, not {real.dtype} {real.shape} and {other.dtype} {other.shape}"
        )
