"""Exact search for the nearest rows of a table by cosine, over the devices of a mesh.

Each device searches its own rows, some at a time, and all compare what they found. Of equal cosines the row that comes
first is nearer, on any mesh and for any number of rows at a time, as in a sort of all products.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from t2i_jax.core.arrays import Float, Int, typed
from t2i_jax.core.sharding import RULES, fit
from t2i_jax.nn.layers import ModelState

MOST_PRODUCTS = 2**26
"""Products of queries and rows that are in memory at a time, on a device."""
SPLIT = 256
"""Tables are filled up to a multiple of so many rows, which most meshes divide."""


class EmbeddingTable(nnx.Module):
    """Vectors fp32 (n, k), and one over the length of each, which a search needs and no call computes again.

    They are split over all devices of a mesh. Rows that fill the table up have the scale 0 and are never found.
    """

    def __init__(self, rows: Array):
        scale = 1 / jnp.maximum(jnp.linalg.norm(rows, axis=-1), 1e-12)
        more = -len(rows) % SPLIT
        self.rows = ModelState(jnp.pad(rows, ((0, more), (0, 0))), axes=("rows", None))
        self.scale = ModelState(jnp.pad(scale, (0, more)), axes=("rows",))


class Nearest(NamedTuple):
    """The nearest rows of each query, by falling cosine."""

    cosines: Array
    """fp32 (b, count)"""
    rows: Array
    """their numbers int32 (b, count)"""
    vectors: Array
    """as they are stored, fp32 (b, count, k)"""


@typed
def search(table: EmbeddingTable, queries: Float[Array, "b k"], count: int, most: int = MOST_PRODUCTS) -> Nearest:
    """The `count` rows of a table whose cosines with each query (b, k) are largest.

    Equal to a sort of all cosines, computed in fp32, by falling cosine and then by number. The table has at least
    `count` rows. most: products in memory at a time.
    """
    rows, scale, queries = table.rows[...], table.scale[...], queries.astype(jnp.float32)
    lengths = jnp.maximum(jnp.linalg.norm(queries, axis=-1, keepdims=True), 1e-12)
    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else fit(P(RULES["rows"]), (len(rows),), dict(mesh.shape))
    axes = RULES["rows"]
    if mesh.empty or mesh.size == 1 or not spec or spec[0] is None or not isinstance(axes, tuple):
        cosines, found = _nearest(rows, scale, queries, count, most)
        return Nearest(cosines / lengths, found, rows[found])

    def part(rows: Array, scale: Array, queries: Array) -> Nearest:
        """What one device does: its candidates, the best of those of all, and their vectors, each from its device."""
        first = jax.lax.axis_index(axes) * len(rows)
        cosines, found = _nearest(rows, scale, queries, min(count, len(rows)), most)
        together = lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True)  # by device, hence by number of the row
        cosines, places = jax.lax.top_k(together(cosines), count)
        found = jnp.take_along_axis(together(found + first), places, 1)
        mine = (found >= first) & (found < first + len(rows))
        vectors = jnp.where(mine[..., None], rows[jnp.where(mine, found - first, 0)], 0)
        return Nearest(cosines, found, jax.lax.psum(vectors, axes))

    split = jax.shard_map(part, in_specs=(P(axes), P(axes), P()), out_specs=P(), check_vma=False)
    found = split(rows, scale, queries)
    return found._replace(cosines=found.cosines / lengths)


def _nearest(rows: Array, scale: Array, queries: Array, count: int, most: int) -> tuple[Array, Array]:
    """Numbers int32 (b, count) of the nearest of the rows of one device, and their cosines, fp32, times the length of
    the query: dividing by it first would round what is equal to unequal numbers."""
    n, b = len(rows), len(queries)
    size = min(n, max(count, most // max(b, 1)))

    def best(start: Array | int, fresh: Array | int) -> tuple[Array, Array]:
        """Of `size` rows from `start` on, without those before `fresh`, which were searched before."""
        some, lengths = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (rows, scale))
        products = jnp.matmul(queries, some.T, precision="highest") * lengths
        counts = (lengths > 0) & (start + jnp.arange(size) >= fresh)
        cosines, places = jax.lax.top_k(jnp.where(counts, products, -jnp.inf), count)
        return cosines, places.astype(jnp.int32) + start

    if size == n:
        return best(0, 0)

    def step(known: tuple[Array, Array], fresh: Array) -> tuple[tuple[Array, Array], None]:
        others = best(jnp.minimum(fresh, n - size), fresh)
        cosines, found = (jnp.concatenate(pair, 1) for pair in zip(known, others, strict=True))
        cosines, places = jax.lax.top_k(cosines, count)
        return (cosines, jnp.take_along_axis(found, places, 1)), None

    none = jnp.full((b, count), -jnp.inf), jnp.zeros((b, count), jnp.int32)
    return jax.lax.scan(step, none, jnp.arange(0, n, size, dtype=jnp.int32))[0]


@typed
def nearest(table: EmbeddingTable, queries: Float[Array, "b k"], count: int) -> Int[Array, "b {count}"]:
    """The numbers of the rows that `search` finds: int32 (b, count)."""
    return search(table, queries, count).rows
