"""Caches whose rows go on by themselves: each writes at its own next slot."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.caches.slabs import Storage
from maxtext.caches.store import Answer, Size, Store, Tokens, joined
from maxtext.errors import ConfigError
from maxtext.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
  """Slots of which every row has its own number in use: `written` [l b].

  Padding, whose segment is 0, takes no slot, wherever it stands: a row that is given nothing else
  stays as it is. As a `ring`, a row holds its last `s` tokens; else what is appended beyond the
  last slot is lost, and must not be. `layer` and `fresh` as in DenseCache.
  """

  store: Store
  written: jax.Array
  layer: jax.Array | None = None
  fresh: bool = dataclasses.field(default=False, metadata={"static": True})
  ring: bool = dataclasses.field(default=False, metadata={"static": True})

  @classmethod
  def empty(
    cls, size: Size, rows: int, slots: int, storage: Storage, ring: bool = False
  ) -> RowCache:
    written = jnp.zeros((size.layers, rows), jnp.int32)
    return cls(Store.empty(size, rows, slots, storage), written, ring=ring)

  @property
  def slots(self) -> int:
    return self.store.slots

  @property
  def over(self) -> jax.Array:
    """Whether layers and rows [l b] have been given tokens that are lost."""
    return self.written > (jnp.iinfo(jnp.int32).max if self.ring else self.slots)

  def at(self, layer: jax.Array | None) -> RowCache:
    """The same cache, open at one of its layers; None: closed."""
    return dataclasses.replace(self, layer=layer)

  def filled(self) -> RowCache:
    """The same cache after the first tokens: what follows sees them."""
    return dataclasses.replace(self, fresh=False)

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[RowCache, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] -> the cache with them, all keys, values [b s g k], the mask over [b t s]."""
    new = self.store.tokens(k, v, mask)
    cache = self._write(new)
    if self.fresh:
      new = self.store.rounded(new)
      return cache, new.keys, new.values, mask
    if self.ring and k.shape[1] > 1:
      return cache, *joined(self.held(mask), self.store.rounded(new).answer(mask))
    return cache, *cache.held(mask)

  def held(self, mask: Mask) -> Answer:
    """What the open layer holds, and who of the mask's queries sees it."""
    filled = jnp.arange(self.slots) < self._next()[:, None]
    return self.store.open(self.layer).where(filled).answer(mask)

  def row(self, slot: jax.Array | int) -> RowCache:
    """One row alone, to be continued, and then inserted again."""
    written = lax.dynamic_slice_in_dim(self.written, slot, 1, axis=1)
    return dataclasses.replace(self, store=self.store.row(slot), written=written)

  def insert(self, other: RowCache, slot: jax.Array | int) -> RowCache:
    """With the only row of another cache in place of row `slot`; it may have fewer slots.

    Raises ConfigError if it is stored otherwise.
    """
    if other.ring != self.ring or (self.ring and other.slots != self.slots):
      raise ConfigError("insert", "rings go into rings of the same number of slots")
    store = self.store.with_row(other.store, slot)
    return dataclasses.replace(
      self, store=store, written=set_row(self.written, slot, other.written)
    )

  def reset(self, slot: jax.Array | int) -> RowCache:
    """With row `slot` empty."""
    return dataclasses.replace(self, written=set_row(self.written, slot, 0))

  def _next(self) -> jax.Array:
    """How many tokens each row of the open layer has been given: [b]."""
    return lax.dynamic_index_in_dim(self.written, self.layer, keepdims=False)

  def _write(self, new: Tokens) -> RowCache:
    slots, count = places(new.segments, self._next())
    if self.ring:
      kept = slots >= (self._next() + count - self.slots)[:, None]
      slots = jnp.where(kept & (new.segments != 0), slots % self.slots, self.slots)
    else:
      slots = jnp.where(new.segments != 0, slots, self.slots)
    store = self.store.write(new, lambda slab, x: slab.scatter(x, self.layer, slots))
    return dataclasses.replace(self, store=store, written=self.written.at[self.layer].add(count))


def places(segments: jax.Array, written: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where tokens [b t] go that follow `written` [b] in each row, and how many they are [b].

  Of padding it says nothing.
  """
  real = (segments != 0).astype(jnp.int32)
  sums = jnp.cumsum(real, axis=1, dtype=jnp.int32)
  return written[:, None] + sums - 1, real.sum(1, dtype=jnp.int32)


def set_row(written: jax.Array, slot: jax.Array | int, count: jax.Array | int) -> jax.Array:
  """written [l b] with `count` [l 1] at row `slot`."""
  count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), (written.shape[0], 1))
  return lax.dynamic_update_slice_in_dim(written, count, slot, axis=1)
