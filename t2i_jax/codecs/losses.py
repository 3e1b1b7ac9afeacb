"""Losses of a reconstruction: on pixels, on features of a frozen network, and adversarial."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from t2i_jax.core.arrays import Float, typed
from t2i_jax.features.vgg import VGGTrunk, Weights, features
from t2i_jax.nn.layers import at_least_fp32


@typed
def reconstruction(
    x: Float[Array, "*b"], y: Float[Array, "*b"], kind: Literal["l1", "l2", "smooth_l1"]
) -> Float[Array, ""]:
    """Mean absolute or squared difference; smooth_l1 is half the square below 1 (Girshick 2015, eq. 3)."""
    d = at_least_fp32(x) - at_least_fp32(y)
    if kind == "smooth_l1":
        return jnp.mean(optax.losses.huber_loss(d))
    return jnp.mean(jnp.abs(d) if kind == "l1" else d * d)


@typed
def logit_laplace(
    x: Float[Array, "*b"], place: Float[Array, "*b"] | float, log_scale: Float[Array, "*b"] | float
) -> Float[Array, ""]:
    """Mean -log density of x in (0, 1) whose logit is Laplace (Ramesh et al. 2021, A.3)."""
    logit = jnp.log(x) - jnp.log1p(-x)
    nll = jnp.abs(logit - place) * jnp.exp(-log_scale) + log_scale + jnp.log(2 * x * (1 - x))
    return jnp.mean(nll)


@typed
def psnr(x: Float[Array, "b i j c"], y: Float[Array, "b i j c"]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], the mean over the batch."""
    mse = jnp.mean((x.astype(jnp.float32) - y.astype(jnp.float32)) ** 2, (1, 2, 3))
    return jnp.mean(10 * jnp.log10(4 / jnp.maximum(mse, 1e-10)))


@typed
def perceptual(trunk: VGGTrunk, x: Float[Array, "b i j 3"], y: Float[Array, "b i j 3"]) -> Float[Array, " b"]:
    """LPIPS of images in [-1, 1], 0 for equal ones (Zhang et al. 2018, arXiv:1801.03924)."""
    return compare(features(trunk, x), features(trunk, y), trunk.heads)


def compare(xs: list[Array], ys: list[Array], heads: tuple[Weights, ...]) -> Array:
    """Squared differences of unit features: weighted over channels, mean over positions, summed over blocks (eq. 1)."""
    unit = lambda f: f / (jnp.sqrt(jnp.sum(f * f, -1, keepdims=True) + 1e-20) + 1e-10)
    distance = lambda x, y, w: jnp.mean(((unit(x) - unit(y)) ** 2) @ w, (1, 2))
    fp32 = lambda f: f.astype(jnp.float32)
    return jnp.stack([distance(fp32(x), fp32(y), w) for x, y, w in zip(xs, ys, heads, strict=True)]).sum(0)


def adaptive_weight(faithful: Callable[[Array], Array], adversarial: Callable[[Array], Array], w: Array) -> Array:
    """Weight that equalises the gradient norms of two losses at a kernel: |d faithful/dw| / (|d adversarial/dw| +
    1e-4).

    Both are functions of `w`, the decoder's last kernel. Clipped to 1e4, without gradient (arXiv:2012.09841 eq. 7).
    """
    w = jax.lax.stop_gradient(w)
    size = lambda loss: jnp.linalg.norm(jax.grad(loss)(w).reshape(-1))
    return jax.lax.stop_gradient(jnp.clip(size(faithful) / (size(adversarial) + 1e-4), 0, 1e4))
