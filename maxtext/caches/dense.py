"""Caches whose rows all write to the same slots."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.caches.slabs import Slab, Storage
from maxtext.caches.store import Answer, Size, Store, Tokens, joined
from maxtext.errors import ConfigError
from maxtext.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """A slot per token, in all layers of one block, of which `written` [l] are in use.

  All rows write to the same slots: prompts of different lengths are padded. More tokens than there
  are slots must not be appended; `over` says if they have been. `layer` is the one that is open;
  while the cache is `fresh`, nothing is held yet, and new tokens see each other only. What is
  answered of new tokens is what will be read of them later, so that a prompt may come at once or in
  parts. Tokens that see what comes after them, in a span or a block, have to come in one part.
  """

  store: Store
  written: jax.Array
  layer: jax.Array | None = None
  fresh: bool = dataclasses.field(default=True, metadata={"static": True})

  @classmethod
  def empty(cls, size: Size, rows: int, slots: int, storage: Storage) -> DenseCache:
    return cls(Store.empty(size, rows, slots, storage), jnp.zeros(size.layers, jnp.int32))

  @property
  def slots(self) -> int:
    return self.store.slots

  @property
  def over(self) -> jax.Array:
    """Whether layers [l] have been given more tokens than there are slots."""
    return self.written > self.slots

  def at(self, layer: jax.Array | None) -> DenseCache:
    """The same cache, open at one of its layers; None: closed."""
    return dataclasses.replace(self, layer=layer)

  def filled(self) -> DenseCache:
    """The same cache after the first tokens: what follows sees them."""
    return dataclasses.replace(self, fresh=False)

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[DenseCache, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] -> the cache with them, all keys, values [b s g k], the mask over [b t s]."""
    new = self.store.tokens(k, v, mask)
    cache = self._write(new)
    if self.fresh:
      new = self.store.rounded(new)
      return cache, new.keys, new.values, mask
    return cache, *cache.held(mask)

  def held(self, mask: Mask) -> Answer:
    """What the open layer holds, and who of the mask's queries sees it."""
    return self.store.open(self.layer).answer(mask)

  def _write(self, new: Tokens) -> DenseCache:
    """The cache with the new tokens in the next slots of the open layer."""
    count = new.positions.shape[1]
    if count > self.slots:
      problem = f"{count} tokens do not fit into the {self.slots} slots of the cache; give it more"
      raise ConfigError("slots", problem)
    slot = 0 if self.fresh else self._next()
    return self._with(self.store.write(new, lambda slab, x: slab.put(x, self.layer, slot)), count)

  def _next(self) -> jax.Array:
    """How many tokens the open layer has been given."""
    return lax.dynamic_index_in_dim(self.written, self.layer, keepdims=False)

  def _with(self, store: Store, count: int) -> DenseCache:
    written = self.written.at[self.layer].add(count)
    return dataclasses.replace(self, store=store, written=written)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache(DenseCache):
  """The last `s` tokens, for a window or a chunk no longer: a new one takes the oldest one's place.

  Prompts of different lengths are padded on the left: on the right, padding would take the places
  of tokens (in a RowCache it takes none).
  """

  @property
  def over(self) -> jax.Array:
    """Never: the oldest give way."""
    return jnp.zeros_like(self.written, bool)

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[DenseCache, jax.Array, jax.Array, Mask]:
    """As DenseCache; several tokens at once see what is held before any of it is overwritten."""
    if self.fresh or k.shape[1] == 1:
      return super().append(k, v, mask)
    new = self.store.tokens(k, v, mask)
    answer = joined(self.held(mask), self.store.rounded(new).answer(mask))
    return self._write(new), *answer

  def _write(self, new: Tokens) -> DenseCache:
    b, t = new.positions.shape
    written = jnp.zeros((), jnp.int32) if self.fresh else self._next()
    if t == 1:
      slot = written % self.slots
      return self._with(self.store.write(new, lambda slab, x: slab.put(x, self.layer, slot)), t)
    kept = min(t, self.slots)
    slots = (written + t - kept + jnp.arange(kept)) % self.slots
    slots = jnp.broadcast_to(slots, (b, kept))

    def write(slab: Slab, x: jax.Array) -> Slab:
      return slab.scatter(x[:, -kept:], self.layer, slots)

    return self._with(self.store.write(new, write), t)
