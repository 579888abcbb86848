"""Rows times the matrix of their group, behind one call: what experts of their own tokens compute.

Rows stand group after group. Letters: m rows, e groups, d and f the widths of rows and products.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

SIDE = (
  512  # of megablox's blocks at most, in all directions: in float32 they fill half of the memory
)


@dataclasses.dataclass(frozen=True)
class Product:
  """How products of groups are computed: by `tiles` in plain JAX, by XLA's `ragged` product, or by
  the `megablox` kernel of a TPU.
  """

  kernel: str
  precision: str | None = None
  interpret: bool = False

  @classmethod
  def on(cls, platform: str, megablox: bool = True, precision: str | None = None) -> Product:
    """What is there for a platform. On a CPU XLA's product costs as many dense ones as there are
    groups.
    """
    if platform == "tpu" and megablox:
      return cls("megablox", precision)
    return cls("tiles" if platform == "cpu" else "ragged", precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  sizes: jax.Array,
  share: jax.Array | None = None,
) -> jax.Array:
  """x [m d], w [e d f], rows of each group sizes [e] -> [m f] in the dtype of x, times share [m];
  0 after the last group.

  The gradient by w is summed in float32; that by the shares takes no further product, and nothing
  as wide as x is there times its share.
  """
  y = _grouped(product, x, w.astype(x.dtype), sizes)
  return y if share is None else _times(y, share)


def _forward(
  product: Product, x: jax.Array, w: jax.Array, sizes: jax.Array, share: jax.Array | None = None
):
  return grouped_matmul(product, x, w, sizes, share), (x, w, sizes, share)


def _backward(product: Product, saved: Any, g: jax.Array):
  x, w, sizes, share = saved
  dw = _outer(product, x, g if share is None else _times(g, share), sizes).astype(w.dtype)
  dx, dshare = _grouped(product, g, w.astype(x.dtype), sizes, turned=True), None
  if share is not None:
    dshare = jnp.einsum("md,md->m", dx, x, preferred_element_type=jnp.float32).astype(share.dtype)
    dx = _times(dx, share)
  return dx, dw, None, dshare


grouped_matmul.defvjp(_forward, _backward)


def _times(x: jax.Array, share: jax.Array) -> jax.Array:
  return (x * share[:, None]).astype(x.dtype)


def _grouped(
  product: Product, x: jax.Array, w: jax.Array, sizes: jax.Array, turned: bool = False
) -> jax.Array:
  """As `grouped_matmul`; with `turned` x is [m f], and the products are by w's other width."""
  rows = x.shape[0]
  if product.kernel == "megablox":
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    x = _padded(x)
    sides = _sides(x.shape[0], x.shape[1], w.shape[1 if turned else 2])
    y = gmm(x, w, sizes, x.dtype, sides, transpose_rhs=turned, interpret=product.interpret)[:rows]
  elif product.kernel == "ragged":
    dimensions = lax.RaggedDotDimensionNumbers((((1,), (2 if turned else 1,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(x, w, sizes, dimensions, precision=product.precision)
  else:
    y = _by_tiles(x, w.swapaxes(1, 2) if turned else w, sizes, product.precision)
  return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), y, 0)


def _outer(product: Product, x: jax.Array, g: jax.Array, sizes: jax.Array) -> jax.Array:
  """x [m d], g [m f] -> the sum over each group's rows of x times g, [e d f] in float32."""
  if product.kernel == "megablox":
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, g = _padded(x), _padded(g)
    sides = _sides(x.shape[0], x.shape[1], g.shape[1])
    return tgmm(x.swapaxes(0, 1), g, sizes, jnp.float32, sides, interpret=product.interpret)
  if product.kernel == "ragged":
    dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(
      x, g, sizes, dimensions, precision=product.precision, preferred_element_type=jnp.float32
    )
  return _outer_by_tiles(x, g, sizes, product.precision)


def _padded(x: jax.Array) -> jax.Array:
  """[m d] with rows of zeros below, up to a whole number of megablox's blocks."""
  unit = 128 if x.shape[0] <= SIDE else SIDE
  return jnp.pad(x, ((0, -x.shape[0] % unit), (0, 0)))


def _sides(*sizes: int) -> tuple[int, ...]:
  return tuple(min(SIDE, size) for size in sizes)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Rows in tiles of `side`, each of one group: where each begins and ends, and whose it is, [j].

  Of as many as any sizes may need the first `used` are there.
  """

  side: int
  begin: jax.Array
  end: jax.Array
  group: jax.Array
  used: jax.Array

  @classmethod
  def of(cls, rows: int, sizes: jax.Array) -> Tiles:
    groups = sizes.shape[0]
    # smaller ones waste fewer rows on the ends of groups; of larger ones fewer read a matrix
    side = max(1, rows // (4 * groups), min(rows // groups, 64))
    count = rows if side == 1 else rows // side + min(groups, rows)
    ends = jnp.cumsum(sizes)
    last = jnp.cumsum(-(-sizes // side))  # tiles up to each group's last
    j = jnp.arange(count)
    group = jnp.minimum(jnp.searchsorted(last, j, side="right"), groups - 1)
    before = jnp.where(group > 0, last[group - 1], 0)
    begin = ends[group] - sizes[group] + (j - before) * side
    return cls(side, begin, ends[group], group, last[-1])


def _by_tiles(x: jax.Array, w: jax.Array, sizes: jax.Array, precision: str | None) -> jax.Array:
  """Tiles are in the order of the rows: what one writes beyond its group the next writes over."""
  rows, tiles = x.shape[0], Tiles.of(x.shape[0], sizes)
  x = jnp.pad(x, ((0, tiles.side), (0, 0)))

  def step(j: jax.Array, y: jax.Array) -> jax.Array:
    part = lax.dynamic_slice_in_dim(x, tiles.begin[j], tiles.side)
    made = jnp.dot(part, w[tiles.group[j]], precision=precision)
    return lax.dynamic_update_slice_in_dim(y, made, tiles.begin[j], 0)

  y = jnp.zeros((rows + tiles.side, w.shape[2]), x.dtype)
  return lax.fori_loop(0, tiles.used, step, y)[:rows]


def _outer_by_tiles(
  x: jax.Array, g: jax.Array, sizes: jax.Array, precision: str | None
) -> jax.Array:
  tiles = Tiles.of(x.shape[0], sizes)
  x, g = (jnp.pad(a, ((0, tiles.side), (0, 0))) for a in (x, g))

  def step(j: jax.Array, total: jax.Array) -> jax.Array:
    begin = tiles.begin[j]
    part = lax.dynamic_slice_in_dim(x, begin, tiles.side)
    part = jnp.where((begin + jnp.arange(tiles.side))[:, None] < tiles.end[j], part, 0)
    made = jnp.einsum(
      "td,tf->df",
      part,
      lax.dynamic_slice_in_dim(g, begin, tiles.side),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    return total.at[tiles.group[j]].add(made)

  total = jnp.zeros((sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)
  return lax.fori_loop(0, tiles.used, step, total)
