"""A cache whose rows share a pool of pages, and who has which of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from maxtext.caches.rows import places, set_row
from maxtext.caches.slabs import Slab, Storage
from maxtext.caches.store import Answer, Size, Store, Tokens
from maxtext.errors import ConfigError
from maxtext.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """A pool of pages of every layer: keys, values [l p n g k], of which rows have those they need.

  table [b m] lists the pages of each row in the order of its tokens, -1 where it has none yet;
  `written` [l b] tokens are in them. Padding takes no slot, as in RowCache, and what is appended
  beyond the last page of a row is lost. A layer with a window keeps all of its pages.
  """

  pool: Store
  table: jax.Array
  written: jax.Array
  layer: jax.Array | None = None

  @classmethod
  def empty(
    cls, size: Size, rows: int, pages: int, page: int, most: int, storage: Storage
  ) -> PagedCache:
    """`pages` of `page` slots, up to `most` for a row, handed out in turn until they are used up.

    With fewer than rows x most, begin with `table` of a Ledger.
    """
    for key, value in (("pages", pages), ("page", page), ("most", most)):
      if value < 1:
        raise ConfigError(key, f"{value} is not at least 1")
    table = np.arange(rows * most, dtype=np.int32).reshape(rows, most)
    pool = Store.empty(size, pages, page, storage, axis=None)
    written = jnp.zeros((size.layers, rows), jnp.int32)
    return cls(pool, jnp.asarray(np.where(table < pages, table, -1)), written)

  @property
  def page(self) -> int:
    """How many slots a page has."""
    return self.pool.slots

  @property
  def over(self) -> jax.Array:
    """Whether layers and rows [l b] have been given tokens that are lost."""
    return self.written > (self.table >= 0).sum(1) * self.page

  def at(self, layer: jax.Array | None) -> PagedCache:
    """The same cache, open at one of its layers; None: closed."""
    return dataclasses.replace(self, layer=layer)

  def filled(self) -> PagedCache:
    """The same cache: it may be appended to at any time."""
    return self

  def paged(self, table: Any) -> PagedCache:
    """The same pool, its pages given out anew by a table [b m]."""
    return dataclasses.replace(self, table=jnp.asarray(table, jnp.int32))

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[PagedCache, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] -> the cache with them, keys and values [b s g k] not gathered from their
    pages yet, and the mask over [b t s].
    """
    cache = self._write(self.pool.tokens(k, v, mask))
    return cache, *cache.held(mask)

  def held(self, mask: Mask) -> Answer:
    """What the open layer holds, and who of the mask's queries sees it."""
    slots = jnp.arange(self.table.shape[1] * self.page)
    filled = slots < self._next()[:, None]
    return self.pool.open(self.layer, self.table).where(filled).answer(mask)

  def row(self, slot: jax.Array | int) -> PagedCache:
    """One row alone, to be continued in its pages, while no other is, and then inserted again."""
    table = lax.dynamic_slice_in_dim(self.table, slot, 1, axis=0)
    written = lax.dynamic_slice_in_dim(self.written, slot, 1, axis=1)
    return dataclasses.replace(self, table=table, written=written)

  def insert(self, other: PagedCache, slot: jax.Array | int) -> PagedCache:
    """With `row(slot)` as it has been continued."""
    written = set_row(self.written, slot, other.written)
    return dataclasses.replace(self, pool=other.pool, written=written)

  def reset(self, slot: jax.Array | int) -> PagedCache:
    """With row `slot` empty; it keeps its pages."""
    return dataclasses.replace(self, written=set_row(self.written, slot, 0))

  def _next(self) -> jax.Array:
    """How many tokens each row of the open layer has been given: [b]."""
    return lax.dynamic_index_in_dim(self.written, self.layer, keepdims=False)

  def _write(self, new: Tokens) -> PagedCache:
    slots, count = places(new.segments, self._next())
    most, lost = self.table.shape[1], self.pool.rows
    there = (new.segments != 0) & (slots < most * self.page)
    number = jnp.clip(slots // self.page, 0, most - 1)
    pages = jnp.take_along_axis(self.table, number, axis=1)
    pages = jnp.where(there & (pages >= 0), pages, lost)

    def write(slab: Slab, x: jax.Array) -> Slab:
      return slab.scatter_pages(x, self.layer, pages, slots % self.page)

    pool, written = self.pool.write(new, write), self.written.at[self.layer].add(count)
    return dataclasses.replace(self, pool=pool, written=written)


class Ledger:
  """Which row has which pages; kept by the host, for the tables of all layers."""

  def __init__(self, rows: int, pages: int, page: int, most: int):
    """`pages` of `page` slots each, up to `most` for a row."""
    self.page = page
    self.table = np.full((rows, most), -1, np.int32)
    self._free = [*range(pages - 1, -1, -1)]

  @property
  def left(self) -> int:
    """How many pages no row has."""
    return len(self._free)

  def assign(self, row: int, tokens: int) -> bool:
    """Have `row` hold `tokens` in all; False, and nothing is changed, if there are too few pages.

    Raises ConfigError for more than a row can ever hold.
    """
    need, most = -(-tokens // self.page), self.table.shape[1]
    if need > most:
      problem = f"{tokens} tokens are more than the {most} pages of {self.page} that a row may have"
      raise ConfigError("max_target_length", problem)
    had = int((self.table[row] >= 0).sum())
    if need - had > self.left:
      return False
    for i in range(had, need):
      self.table[row, i] = self._free.pop()
    return True

  def free(self, row: int) -> None:
    """Take all pages from `row`."""
    self._free.extend(int(page) for page in self.table[row][::-1] if page >= 0)
    self.table[row] = -1
