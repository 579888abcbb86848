"""Keys and values kept from token to token, with the mask over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.masks import Mask
from maxtext.sharding import Layout, constrain
from maxtext.specs import AttentionSpec, DecoderSpec

Caches = tuple[tuple["DenseCache", ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """A slot per token, in all layers of one block: keys, values [l b s g k].

  positions, segments [l b s] are those of the tokens in the slots; segment 0 is an empty slot, or
  padding. `written` [l] slots are in use. All rows write to the same slots: prompts of different
  lengths are padded on the left. More than `s` tokens must not be appended. `layer` is the one that
  is open; while the cache is `fresh`, nothing is held yet, and new tokens see each other only.
  """

  keys: jax.Array
  values: jax.Array
  positions: jax.Array
  segments: jax.Array
  written: jax.Array
  layer: jax.Array | None = None
  fresh: bool = dataclasses.field(default=True, metadata={"static": True})

  @property
  def slots(self) -> int:
    return self.keys.shape[2]

  def at(self, layer: jax.Array | None) -> DenseCache:
    """The same cache, open at one of its layers; None: closed."""
    return dataclasses.replace(self, layer=layer)

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[DenseCache, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] -> the cache with them, all keys, values [b s g k], the mask over [b t s]."""
    if self.fresh:
      return self._write(k, v, mask), k, v, mask
    cache = self._write(k, v, mask)
    return cache, *cache._held(mask)

  def _held(self, mask: Mask) -> tuple[jax.Array, jax.Array, Mask]:
    """What the open layer holds, and who of the mask's queries sees it."""
    keys, values, positions, segments = map(
      self._open, (self.keys, self.values, self.positions, self.segments)
    )
    q_seg = jnp.ones_like(mask.q_pos) if mask.q_seg is None else mask.q_seg
    return keys, values, dataclasses.replace(mask, kv_pos=positions, q_seg=q_seg, kv_seg=segments)

  def _write(self, k: jax.Array, v: jax.Array, mask: Mask) -> DenseCache:
    """The cache with the new tokens in the next slots of the open layer."""
    slot = 0 if self.fresh else self._open(self.written)
    return self._with(k, v, mask, lambda whole, new: self._put(whole, new, slot))

  def _with(self, k: jax.Array, v: jax.Array, mask: Mask, put: Any) -> DenseCache:
    """Every array after `put(array, what is new in it)`, and the count of what has been written."""
    segments = jnp.ones_like(mask.q_pos) if mask.q_seg is None else mask.q_seg
    return dataclasses.replace(
      self,
      keys=_place(put(self.keys, k)),
      values=_place(put(self.values, v)),
      positions=_place(put(self.positions, mask.q_pos)),
      segments=_place(put(self.segments, segments)),
      written=self.written.at[self.layer].add(k.shape[1]),
    )

  def _open(self, whole: jax.Array) -> jax.Array:
    """[l ...] -> the open layer's part."""
    return lax.dynamic_index_in_dim(whole, self.layer, keepdims=False)

  def _put(self, whole: jax.Array, new: jax.Array, slot: jax.Array | int) -> jax.Array:
    """[l b s ...] with new [b t ...] in the open layer, from `slot` on."""
    start = [self.layer, 0, slot, *[0] * (whole.ndim - 3)]
    start = [jnp.asarray(i, jnp.int32) for i in start]
    return lax.dynamic_update_slice(whole, new.astype(whole.dtype)[None], start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingCache(DenseCache):
  """The last `s` tokens, for a window no longer: a new one takes the place of the oldest."""

  def append(
    self, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[DenseCache, jax.Array, jax.Array, Mask]:
    """As DenseCache; several tokens at once see what is held before any of it is overwritten."""
    cache = self._write(k, v, mask)
    if self.fresh:
      return cache, k, v, mask
    if k.shape[1] == 1:
      return cache, *cache._held(mask)
    keys, values, held = self._held(mask)
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
    both = dataclasses.replace(
      held, kv_pos=join(held.kv_pos, mask.q_pos), kv_seg=join(held.kv_seg, held.q_seg)
    )
    return cache, join(keys, k), join(values, v), both

  def _write(self, k: jax.Array, v: jax.Array, mask: Mask) -> DenseCache:
    written = jnp.zeros((), jnp.int32) if self.fresh else self._open(self.written)
    if k.shape[1] == 1:
      return self._with(k, v, mask, lambda whole, new: self._put(whole, new, written % self.slots))
    kept = min(k.shape[1], self.slots)
    slots = (written + k.shape[1] - kept + jnp.arange(kept)) % self.slots

    def put(whole: jax.Array, new: jax.Array) -> jax.Array:
      last = new[:, -kept:].astype(whole.dtype)
      return self._put(whole, self._open(whole).at[:, slots].set(last, unique_indices=True), 0)

    return self._with(k, v, mask, put)


def empty(spec: DecoderSpec, batch: int, slots: int, dtype: jnp.dtype) -> Caches:
  """Fresh caches of a decoder: `batch` rows of `slots` tokens, fewer where a window is shorter."""
  return tuple(
    tuple(_empty(block.attention, stage.repeat, batch, slots, dtype) for block in stage.blocks)
    for stage in spec.stages
  )


def filled(caches: Caches) -> Caches:
  """The caches after the first tokens: what follows sees them."""
  close = lambda cache: dataclasses.replace(cache, fresh=False)
  return tuple(tuple(map(close, stage)) for stage in caches)


def _empty(
  spec: AttentionSpec, layers: int, batch: int, slots: int, dtype: jnp.dtype
) -> DenseCache:
  ring = spec.window is not None and spec.window < slots
  slots = spec.window if ring else slots
  held = _place(jnp.zeros((layers, batch, slots, spec.kv_heads, spec.head_dim), dtype))
  mark = _place(jnp.zeros((layers, batch, slots), jnp.int32))
  kind = RingCache if ring else DenseCache
  return kind(held, held, mark, mark, jnp.zeros(layers, jnp.int32))


def placed(caches: Caches, layout: Layout) -> Caches:
  """The shapes of caches, with where they stand."""

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    where = layout.sharding(_AXES[: x.ndim], x.shape, "a cache")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(place, caches)


_AXES = ("layers", "activation_batch", None, "activation_kv_heads", "activation_kv")


def _place(x: jax.Array) -> jax.Array:
  """Constrain x [l b s] or [l b s g k]: rows and heads as activations are."""
  return constrain(x, *_AXES[: x.ndim])
