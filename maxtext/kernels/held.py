"""Keys or values that stand in a cache, for kernels that read a part of them without the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256  # slots that are read at once, where nothing else is said


def _static(default: Any = dataclasses.MISSING) -> Any:
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
  """One layer's keys or values [b s g k], where a cache has stored them for all layers.

  data is [l b s g k] with all axes but the first permuted: stored axis i + 1 is the logical axis
  `order[i]`. Its codes are times `scale`, which has size 1 where numbers share one; None: they are
  the numbers. With a table [b m] of page numbers, data is [l p n g k], permuted alike: pages of n
  slots, of which row b has those that the table lists, in that order; negative: it has none yet.
  `dtype` is that of what is read, `size` how many slots a kernel should read at once.
  """

  data: jax.Array
  scale: jax.Array | None
  layer: jax.Array
  table: jax.Array | None
  order: tuple[int, ...] = _static()
  dtype: Any = _static()
  size: int = _static(BLOCK)

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the array it stands for."""
    first, second, *rest = (self.data.shape[1:][self.order.index(i)] for i in range(self._rank))
    if self.table is not None:
      first, second = self.table.shape[0], self.table.shape[1] * second
    return (first, second, *rest)

  def dense(self) -> jax.Array:
    """The array itself: [b s g k]."""
    if self.table is None:
      return self._decode(lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False))
    pages = self._decode(lambda x: self._pages(x, self.table), lead=1)
    return pages.reshape(self.shape)

  def block(self, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slots `start` to `start + size` of one row: [size g k].

    Of pages, `start` and `size` are whole ones.
    """
    if self.table is None:
      return self._decode(lambda x: self._part(x, row, start, size))[0]
    n = self._slots_of_page
    table = lax.dynamic_slice(self.table, (row, start // n), (1, size // n))[0]
    pages = self._decode(lambda x: self._pages(x, table))
    return pages.reshape(size, *pages.shape[2:])

  def step(self, size: int) -> int:
    """The size of blocks nearest to `size` that can be read."""
    whole = 1 if self.table is None else self._slots_of_page
    return min(max(size // whole, 1) * whole, self.shape[1])

  @property
  def _rank(self) -> int:
    return len(self.order)

  @property
  def _slots_of_page(self) -> int:
    return self.data.shape[1 + self.order.index(1)]

  def _part(self, x: jax.Array, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """x [l b s ...] as stored -> [1 size ...] as stored."""
    begin = {0: row, 1: start}
    many = {0: 1, 1: size}
    starts = [self.layer, *(begin.get(i, 0) for i in self.order)]
    sizes = [1, *(many.get(i, x.shape[1 + at]) for at, i in enumerate(self.order))]
    starts = [jnp.asarray(i, jnp.int32) for i in starts]
    return lax.dynamic_slice(x, starts, sizes)[0]

  def _pages(self, x: jax.Array, table: jax.Array) -> jax.Array:
    """x [l p n ...] as stored, table [*m] -> [*m n ...], the pages first, then as stored."""
    index: list[Any] = [self.layer, *[slice(None)] * self._rank]
    index[1 + self.order.index(0)] = jnp.maximum(table, 0)
    return x.at[tuple(index)].get(mode="clip")

  def _decode(self, read: Any, lead: int = 0) -> jax.Array:
    """What `read` takes from data and scale, as numbers, its axes in the logical order.

    Read by a table, the axis of pages stands first, with `lead` axes more before it.
    """
    order = self.order
    if self.table is not None:
      order = (0, *(i for i in order if i != 0))
    back = [*range(lead), *(lead + order.index(i) for i in range(self._rank))]
    x = read(self.data)
    if self.scale is not None:  # in float32: bfloat16 would round the codes' products twice
      x = x.astype(jnp.float32) * read(self.scale)
    return lax.transpose(x.astype(self.dtype), back)


def dense(x: jax.Array | Held) -> jax.Array:
  """The array [b s g k] itself, of what may still stand in a cache."""
  return x.dense() if isinstance(x, Held) else x


def block(x: jax.Array | Held, row: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Slots `start` to `start + size` of one row of x [b s g k]: [size g k]."""
  if isinstance(x, Held):
    return x.block(row, start, size)
  where = [jnp.asarray(i, jnp.int32) for i in (row, start, *[0] * (x.ndim - 2))]
  return lax.dynamic_slice(x, where, (1, size, *x.shape[2:]))[0]


def step(x: jax.Array | Held) -> int:
  """How many slots of x [b s g k] are read at once."""
  if isinstance(x, Held):
    return x.step(x.size)
  return min(BLOCK, x.shape[1])
