"""Attention by kernels that never write the weights (t, s) down: cuDNN's on GPUs, splash attention on TPUs.

They take q (b, t, n, h), k and v (b, s, m, h), a scale, whether places see only what stands before them (then t = s),
and which keys are no padding (b, s); they give (b, t, n, h). What a query without any key gets is not defined.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from t2i_jax.parallel import RULES, fit

log = logging.getLogger(__name__)

Kind = Literal["auto", "plain", "cudnn", "splash"]
KINDS = ("auto", "plain", "cudnn", "splash")
OF_PLATFORM: dict[str, Kind] = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
LONG = 256
"""From so many places on "auto" takes a kernel: shorter ones are single products that hardly leave the cache."""

KEPT = "attention"
"""The name of what splash attention's backward pass needs of its forward pass, for policies of recomputation."""


def platform() -> str:
    """Of the devices of the mesh that is set (which a plan sets to chips that are not there), or of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    # That of a process has no abstract device, and JAX has no public type for the device of one.
    return getattr(mesh.abstract_device, "platform", None) or jax.default_backend()


def choose(kind: Kind, q: Array, k: Array) -> Callable[..., Array] | None:
    """The kernel for queries and keys of these shapes, or None for products written out.

    Errors: ValueError for an unknown kind, and for a kernel that was asked for and cannot do it, saying why.
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
    """Why a kernel cannot do it; empty if it can."""
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


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool = False,
    valid: Array | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """FlashAttention of cuDNN (Dao et al. 2022) through `jax.nn.dot_product_attention`, which XLA can shard."""
    t, s = q.shape[1], k.shape[1]
    q, k, v = (_padded(x, 8) for x in (q, k, v))  # odd lengths have no backward pass
    if valid is not None or (not causal and k.shape[1] > s):
        valid = jnp.ones((1, s), bool) if valid is None else valid
        valid = jnp.pad(valid, [(0, 0), (0, k.shape[1] - s)])
    mask = None if valid is None else jnp.broadcast_to(valid[:, None, None], (len(valid), 1, q.shape[1], k.shape[1]))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=causal, implementation=implementation)
    return y[:, :t]


def splash(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool = False,
    valid: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Splash attention, the Pallas kernel for TPUs that leaves out what no query sees, on each device by itself.

    Rows of the batch and heads are shared among devices as everywhere (`parallel.RULES`); every device has whole
    sequences, which are filled up to a multiple of 128. interpret: run it without a TPU, slowly, to test it.
    """
    t = q.shape[1]
    if valid is not None or (not causal and t % 128):  # else there is nothing to hide, or order hides it
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
    """On one device: q (b, t, n, h), scaled, k and v (b, t, m, h), valid (b, t); 128 divides t."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    t, n = q.shape[1:3]
    block = next(size for size in (512, 384, 256, 128) if t % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    mask = (kernels.CausalMask if causal else kernels.FullMask)((t, t))
    kernel: Any = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * n),
        block_sizes=kernels.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=KEPT,
    )

    def one(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
        # Queries belong to segment 1, and so do the keys that are no padding.
        ones = jnp.ones(t, jnp.int32)
        segments = None if valid is None else kernels.SegmentIds(ones, valid.astype(jnp.int32))
        return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), segment_ids=segments).swapaxes(0, 1)

    return jax.vmap(one)(q, k, v, valid)


def _padded(x: Array, multiple: int) -> Array:
    """x (b, t, ...) with zeros behind it, up to a multiple of t."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *[(0, 0)] * (x.ndim - 2)])
