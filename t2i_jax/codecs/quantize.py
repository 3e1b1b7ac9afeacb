"""Vector quantisation: each vector becomes the index of the nearest row of a codebook (van den Oord et al. 2017).

The codebook follows gradients or, with a `decay`, moving averages of the vectors assigned to each row. Sharding of the
batch makes no difference: the statistics are those of the whole batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.fields import Checked, NotNegative, Positive, Rate, Size
from t2i_jax.core.keys import apart
from t2i_jax.nn.layers import Linear, ModelState, at_least_fp32, normal, param, replace, unit


@dataclasses.dataclass(frozen=True)
class QuantizerConfig(Checked):
    """A codebook and its training settings. The defaults are those of LlamaGen."""

    codes: Size = 16384
    """rows of the codebook: the vocabulary of models of the codes"""
    dim: Size = 8
    """width of a row"""
    normalize: bool = True
    """normalise vectors and rows to unit length before comparing them (Yu et al. 2022, arXiv:2110.04627)"""
    cosine: bool = False
    """compare by angle, but leave rows as long as they are"""
    commitment: NotNegative = 0.25
    """weight of the loss that moves the encoder's vectors to their rows"""
    codebook: NotNegative = 1.0
    """weight of the loss that moves the rows to their vectors; has no effect with a decay"""
    entropy: NotNegative = 0.0
    """weight of (mean entropy of a vector's soft assignment - entropy of the mean assignment), which favours full
    use"""
    temperature: Positive = 0.01
    """temperature of the soft assignment"""
    decay: Rate = 0.0
    """decay of the moving averages that form the codebook, which is initialised from vectors of the first batch; 0: it
    is a parameter and follows gradients"""
    revive: NotNegative = 0.0
    """with a decay: rows used less often than this share of the uniform share restart at a vector of the batch"""

    def init(self, key: Array) -> "Quantizer":
        return Quantizer(self, key)


@dataclasses.dataclass(frozen=True)
class GumbelConfig(Checked):
    """A codebook whose rows are chosen by logits, with noise in training (Jang et al. 2017, arXiv:1611.01144).

    The defaults are those of the Gumbel VQGAN of taming-transformers.
    """

    codes: Size = 8192
    """rows of the codebook"""
    dim: Size = 256
    """width of a row"""
    temperature: Positive = 0.9
    """initial temperature of the softmax"""
    temperature_end: Positive = 1e-6
    """temperature after a cosine decay over `temperature_steps`"""
    temperature_steps: Size = 1_000_000
    hard: bool = True
    """one row in the forward pass and the mixture in the backward pass; else the mixture in both"""
    kl: NotNegative = 1e-8
    """weight of KL(q || uniform)"""

    def init(self, key: Array) -> "GumbelQuantizer":
        return GumbelQuantizer(self, key)

    def temperature_at(self, step: Array | int) -> Array:
        """Temperature of the softmax at a step, a scalar."""
        least = self.temperature_end / self.temperature
        return jnp.asarray(optax.cosine_decay_schedule(self.temperature, self.temperature_steps, least)(step))


@typed
def nearest(z: Float[Array, "n k"], rows: Float[Array, "v k"], chunk: int = 1024) -> Int[Array, " n"]:
    """Index of the row nearest to each vector, the lowest in ties.

    It compares `chunk` rows at a time, so the (n, v) distances are never in memory at once.
    """
    v, chunk = len(rows), min(chunk, len(rows))
    parts = -(-v // chunk)
    pad = parts * chunk - v
    # |z - e|^2 is least where z.e - |e|^2 / 2 is greatest; padding rows are infinitely far.
    half = jnp.pad(jnp.sum(rows**2, -1) / 2, (0, pad), constant_values=jnp.inf)
    rows = jnp.pad(rows, ((0, pad), (0, 0)))

    def closer(best, part):
        rows, half, first = part
        score = jnp.matmul(z, rows.T, precision="highest") - half
        top = score.max(-1)
        index = first + jax.lax.argmax(score, 1, jnp.int32)
        return (jnp.maximum(top, best[0]), jnp.where(top > best[0], index, best[1])), None

    start = (jnp.full(len(z), -jnp.inf, z.dtype), jnp.zeros(len(z), jnp.int32))
    split = (rows.reshape(parts, chunk, -1), half.reshape(parts, chunk), jnp.arange(parts, dtype=jnp.int32) * chunk)
    return jax.lax.scan(closer, start, split)[0][1]


def usage(codes: Int[Array, "*b"], v: int) -> dict[str, Array]:
    """Codebook use: `usage`, the share of v rows that occurs, `perplexity`, exp of the entropy, 1 to
    v."""
    p = counts(codes, v) / codes.size
    return {"usage": jnp.mean(p > 0), "perplexity": jnp.exp(-jnp.sum(p * jnp.log(jnp.maximum(p, 1e-10))))}


@typed
def counts(codes: Int[Array, "*b"], v: int) -> Float[Array, " {v}"]:
    """How often each of v codes occurs, fp32 (v,)."""
    return jnp.zeros(v).at[codes.reshape(-1)].add(1.0)


class Quantizer(nnx.Module):
    """A codebook of v rows of width k; vectors are float (..., k), codes int32 (...)."""

    def __init__(self, config: QuantizerConfig, key: Array):
        rows = normal(key, (config.codes, config.dim), config.dim**-0.5)
        self.config = config
        self.codebook = ModelState(rows) if config.decay else param(rows, None, None)
        self.sizes = ModelState(jnp.zeros(config.codes)) if config.decay else None

    @typed
    def rows(self) -> Float[Array, "v k"]:
        """The codebook as used for comparison and lookup."""
        return unit(self.codebook[...]) if self.config.normalize else self.codebook[...]

    @typed
    def prepare(self, z: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
        """Vectors as used for comparison."""
        z = at_least_fp32(z)
        return unit(z) if self.config.normalize else z

    @typed
    def codes(self, z: Float[Array, "*b k"]) -> Int[Array, "*b"]:
        """The nearest rows, int32."""
        z, rows = self.prepare(z), self.rows()
        z, rows = (unit(z), unit(rows)) if self.config.cosine else (z, rows)
        return nearest(z.reshape(-1, z.shape[-1]), rows).reshape(z.shape[:-1])

    @typed
    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b k"]:
        """The rows of these codes."""
        return self.rows()[codes]

    def __call__(
        self, z: Array, key: Array | None = None, step: Array | int = 0
    ) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Quantise vectors in training: (..., k) -> vectors (..., k), codes (...), loss, metrics; no key is needed.

        The vectors are rows of the codebook whose gradient is passed to z unchanged (the straight-through estimator).
        The loss is eq. 3 of arXiv:1711.00937 without its first term, plus the entropy term.
        """
        config, z = self.config, self.prepare(z)
        fixed = jax.lax.stop_gradient
        codes = self.codes(fixed(z))
        e = self.vectors(codes)
        commitment, codebook = jnp.mean((z - fixed(e)) ** 2), jnp.mean((fixed(z) - e) ** 2)
        loss = config.commitment * commitment
        metrics = {"commitment": commitment, **usage(codes, config.codes)}
        if not config.decay:
            loss = loss + config.codebook * codebook
        if config.entropy:
            metrics["entropy"] = self.entropy(z)
            loss = loss + config.entropy * metrics["entropy"]
        return z + fixed(e - z), codes, loss, metrics

    @typed
    def entropy(self, z: Float[Array, "*b k"]) -> Float[Array, ""]:
        """E[H(p)] - H(E[p]) of p = softmax(-|z - e|^2 / temperature); needs (n, v) arrays."""
        z, rows = z.reshape(-1, z.shape[-1]), self.rows()
        distances = jnp.sum(z**2, -1, keepdims=True) - 2 * z @ rows.T + jnp.sum(rows**2, -1)
        logits = -distances / self.config.temperature
        p = jax.nn.softmax(logits)
        each = -jnp.sum(p * jax.nn.log_softmax(logits), -1).mean()
        mean = p.mean(0)
        return each + jnp.sum(mean * jnp.log(mean + 1e-5))

    def ema_update(self, z: Array, codes: Array, key: Array) -> "Quantizer":
        """The quantiser after a batch: moving averages of cluster sizes and sums (appendix A.1), dead rows revived.

        z: (..., k), encoder outputs; codes: int (...), their rows. The first batch initialises a fresh codebook with
        distinct vectors, or repeated ones plus a little noise if there are fewer vectors than rows. After that, a row
        without vectors keeps its value unless `revive` restarts it.
        """
        decay, v = self.config.decay, self.config.codes
        if not decay:
            return self
        z = jax.lax.stop_gradient(self.prepare(z)).reshape(-1, self.config.dim)
        codes = codes.reshape(-1)
        share, hits = len(z) / v, counts(codes, v)
        sizes, rows = self.sizes[...], self.codebook[...]
        fresh = ~jnp.any(sizes > 0)
        # A row is its cluster's mean, so size times row is the running sum of eq. 7.
        sums = decay * sizes[:, None] * rows + (1 - decay) * jnp.zeros_like(rows).at[codes].add(z)
        sizes = decay * sizes + (1 - decay) * hits
        rows = jnp.where(hits[:, None] > 0, sums / jnp.where(hits > 0, sizes, 1.0)[:, None], rows)
        # Vectors far from their row show where the codebook lacks rows, so they are sampled more often.
        far = jnp.cumsum(jnp.where(fresh, 1.0, jnp.sum((z - self.rows()[codes]) ** 2, -1)))
        u = jax.random.uniform(key, (v,))
        drawn = z[jnp.searchsorted(far, far[-1] * jnp.where(fresh, (jnp.arange(v) + u[0]) / v, u))]
        if len(z) < v:
            noise = 0.01 * z.std() * jax.random.normal(apart(key), rows.shape)
            drawn = jnp.where(fresh, drawn + noise, drawn)
        dead = fresh | (sizes < self.config.revive * share)
        return replace(
            self,
            codebook=jnp.where(dead[:, None], drawn, rows),
            sizes=jnp.where(dead, share, sizes),
        )


class GumbelQuantizer(nnx.Module):
    """A codebook of v rows of width k, and the logits that choose from it; the interface of `Quantizer`."""

    def __init__(self, config: GumbelConfig, key: Array):
        first, second = jax.random.split(key)
        self.config = config
        self.project = Linear(config.dim, config.codes, first, std=None, axes=(None, None))
        self.codebook = param(normal(second, (config.codes, config.dim), config.dim**-0.5), None, None)

    @typed
    def rows(self) -> Float[Array, "v k"]:
        """The codebook."""
        return self.codebook[...]

    @typed
    def logits(self, z: Float[Array, "*b k"]) -> Float[Array, "*b v"]:
        """Logits of the rows, fp32."""
        return self.project(z.astype(jnp.float32))

    @typed
    def codes(self, z: Float[Array, "*b k"]) -> Int[Array, "*b"]:
        """The most probable rows, int32, without noise."""
        return jnp.argmax(self.logits(z), -1).astype(jnp.int32)

    @typed
    def vectors(self, codes: Int[Array, "*b"]) -> Float[Array, "*b k"]:
        """The rows of these codes."""
        return self.rows()[codes]

    @typed
    def choice(
        self, logits: Float[Array, "*b v"], noise: Float[Array, "*b v"], temperature: Array | float
    ) -> Float[Array, "*b v"]:
        """Weights of the rows from logits and Gumbel noise (eq. 2 and, if hard, 2.2)."""
        soft = jax.nn.softmax((logits + noise) / temperature)
        if not self.config.hard:
            return soft
        one = jax.nn.one_hot(jnp.argmax(soft, -1), soft.shape[-1])
        return soft + jax.lax.stop_gradient(one - soft)

    @typed
    def divergence(self, logits: Float[Array, "*b v"]) -> Float[Array, ""]:
        """KL(q || uniform), the mean over positions."""
        q = jax.nn.softmax(logits)
        return jnp.mean(jnp.sum(q * jnp.log(q * q.shape[-1] + 1e-10), -1))

    def __call__(self, z: Array, key: Array, step: Array | int = 0) -> tuple[Array, Array, Array, dict[str, Array]]:
        """Quantise vectors in training: (..., k) -> vectors (..., k), codes (...), loss, metrics."""
        logits, temperature = self.logits(z), self.config.temperature_at(step)
        weights = self.choice(logits, jax.random.gumbel(key, logits.shape), temperature)
        codes, kl = jnp.argmax(weights, -1).astype(jnp.int32), self.divergence(logits)
        metrics = {"kl": kl, "temperature": temperature, **usage(codes, self.config.codes)}
        return weights @ self.rows(), codes, self.config.kl * kl, metrics

    def ema_update(self, z: Array, codes: Array, key: Array) -> "GumbelQuantizer":
        """Itself: its codebook follows gradients."""
        return self
