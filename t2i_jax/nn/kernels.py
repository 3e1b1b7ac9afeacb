"""Fused attention kernels that never materialise the weights (t, s): cuDNN on GPUs, splash attention on TPUs.

They take q (b, t, n, h), k and v (b, s, m, h), a scale, whether attention is causal (then t = s), and the mask of keys
that are not padding (b, s); they return (b, t, n, h). The output of a query without visible keys is undefined.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from t2i_jax.core.arrays import Bool, Float, typed
from t2i_jax.core.sharding import RULES, fit
from t2i_jax.core.types import AttentionKind

log = logging.getLogger(__name__)

Kind = AttentionKind
KINDS = ("auto", "plain", "cudnn", "splash")
OF_PLATFORM: dict[str, Kind] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
LONG = 256
"""Length from which "auto" selects a kernel: shorter sequences are single products that hardly leave the cache."""

KEPT = "attention"
"""Checkpoint name of the residuals of splash attention, for rematerialisation policies."""


def platform() -> str:
    """Platform of the devices of the current mesh (`t2i plan` sets one of absent chips), or of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    # A mesh of this process has no abstract device, and JAX has no public type for abstract devices.
    return getattr(mesh.abstract_device, "platform", None) or jax.default_backend()


def choose(kind: Kind, q: Array, k: Array) -> Callable[..., Array] | None:
    """The kernel for queries and keys of these shapes, or None for plain einsums.

    Errors: ValueError for an unknown kind, and for a requested kernel that does not support these shapes, with the
    reason.
    """
    if kind not in KINDS:
        raise ValueError(f"attention '{kind}': it is one of {', '.join(KINDS)}")
    wanted = OF_PLATFORM.get(platform(), "plain") if kind == "auto" else kind
    if wanted == "plain" or (kind == "auto" and min(q.shape[1], k.shape[1]) < LONG):
        return None
    reason = unfit(wanted, q, k)
    if not reason:
        return cudnn if wanted == "cudnn" else partial(splash, interpret=platform() != "tpu")
    if kind == "auto":
        _tell(f"attention is written out in place of {wanted}: {reason}")
        return None
    raise ValueError(f"attention '{kind}': {reason}")


def unfit(kind: Kind, q: Array, k: Array) -> str:
    """Why a kernel does not support these inputs; empty if it does."""
    (t, n, h), (s, m) = q.shape[1:], k.shape[1:3]
    if n % m:
        return f"{n} query heads cannot be shared by {m} key-value heads"
    if kind == "splash":
        return "" if t == s else f"{t} queries look at {s} keys, and it is for a sequence that looks at itself"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in bfloat16 and float16, not in {q.dtype}"
    return "" if h % 8 == 0 and h <= 128 else f"cuDNN takes heads of up to 128, in multiples of 8, not of {h}"


@functools.cache
def _tell(message: str) -> None:
    log.warning(message)


@typed
def cudnn(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s m h"],
    v: Float[Array, "b s m h"],
    scale: float,
    causal: bool = False,
    valid: Bool[Array, "_ s"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b t n h"]:
    """FlashAttention of cuDNN (Dao et al. 2022) through `jax.nn.dot_product_attention`, which XLA can shard."""
    t, s = q.shape[1], k.shape[1]
    q, k, v = (_padded(x, 8) for x in (q, k, v))  # odd lengths have no backward pass
    if valid is not None or (not causal and k.shape[1] > s):
        valid = jnp.ones((1, s), bool) if valid is None else valid
        valid = jnp.pad(valid, [(0, 0), (0, k.shape[1] - s)])
    mask = None if valid is None else jnp.broadcast_to(valid[:, None, None], (len(valid), 1, q.shape[1], k.shape[1]))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=causal, implementation=implementation)
    return y[:, :t]


@typed
def splash(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t m h"],
    v: Float[Array, "b t m h"],
    scale: float,
    causal: bool = False,
    valid: Bool[Array, "_ t"] | None = None,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Splash attention, the Pallas kernel for TPUs that skips masked blocks, run separately on each device.

    The batch and the heads are sharded as elsewhere (`sharding.RULES`); every device has whole sequences, padded to a
    multiple of 128. interpret: run it without a TPU, slowly, for tests.
    """
    t = q.shape[1]
    if valid is not None or (not causal and t % 128):  # else there is no padding, or causality hides it
        valid = _padded(jnp.broadcast_to(True if valid is None else valid, k.shape[:2]), 128)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (_padded(x, 128) for x in (q, k, v))
    local = lambda q, k, v, valid: _splash(q, k, v, valid, causal, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        spec = fit(P(RULES["batch"], None, RULES["heads"], None), k.shape, dict(mesh.shape))
        local = jax.shard_map(local, in_specs=(spec, spec, spec, P(spec[0])), out_specs=spec, check_vma=False)
    return local(q, k, v, valid)[:, :t]


def _splash(q: Array, k: Array, v: Array, valid: Array | None, causal: bool, interpret: bool) -> Array:
    """Splash attention on one device: q (b, t, n, h), scaled, k and v (b, t, m, h), valid (b, t); 128 divides t."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    t, n = q.shape[1:3]
    block = next(size for size in (512, 384, 256, 128) if t % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = (kernels.CausalMask if causal else kernels.FullMask)((t, t))
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * n),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=KEPT,
    )

    def one(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
        # Queries belong to segment 1, as do the keys that are not padding.
        ones = jnp.ones(t, jnp.int32)
        segments = None if valid is None else kernels.SegmentIds(ones, valid.astype(jnp.int32))
        y = kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), segment_ids=segments)
        return cast(Array, y).swapaxes(0, 1)  # with `save_residuals` it would be a tuple

    return jax.vmap(one)(q, k, v, valid)


def _padded(x: Array, multiple: int) -> Array:
    """x (b, t, ...) zero-padded at the end to the next multiple in t."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)])
