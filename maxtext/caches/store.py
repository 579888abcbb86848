"""What every kind of cache keeps of tokens: keys, values, and the marks that a mask is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxtext.caches.slabs import Slab, Storage
from maxtext.errors import ConfigError
from maxtext.kernels.held import dense
from maxtext.masks import Mask

Answer = tuple[Any, Any, Mask]  # keys, values [b s g k], arrays or Held; the mask over them
Width = tuple[int, int]  # heads, and the width of each


@dataclasses.dataclass(frozen=True)
class Size:
  """What is kept in all layers of one block: heads and widths of keys and of values, which may
  differ (of a latent: one head each, the latent's width and that of the rope key).
  """

  layers: int
  keys: Width
  values: Width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Tokens that are appended or held: keys, values [b s g k] and their marks [b s]."""

  keys: Any
  values: Any
  positions: jax.Array
  segments: jax.Array
  spans: jax.Array | None

  def answer(self, mask: Mask) -> Answer:
    """Them, and who of the mask's queries sees them."""
    mask = mask.over(self.positions, self.segments, self.spans)
    return self.keys, self.values, dataclasses.replace(mask, cached=True)

  def where(self, filled: jax.Array) -> Tokens:
    """The same, of which only those in `filled` [b s] are there."""
    return dataclasses.replace(self, segments=jnp.where(filled, self.segments, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
  """Slabs of keys and values [l b s g k], positions, segments and, where asked for, spans [l b s].

  Segment 0 is an empty slot, or padding.
  """

  keys: Slab
  values: Slab
  positions: Slab
  segments: Slab
  spans: Slab | None

  @classmethod
  def empty(
    cls, size: Size, rows: int, slots: int, storage: Storage, axis: str | None = "activation_batch"
  ) -> Store:
    """`rows` of `slots`; `axis` is the logical axis that the rows are."""
    shape = (size.layers, rows, slots)
    slab = lambda *more: Slab.empty((*shape, *more), storage, axis)
    spans = slab() if storage.spans else None
    return cls(slab(*size.keys), slab(*size.values), slab(), slab(), spans)

  @property
  def rows(self) -> int:
    return self.keys.shape[1]

  @property
  def slots(self) -> int:
    return self.keys.shape[2]

  def tokens(self, k: jax.Array, v: jax.Array, mask: Mask) -> Tokens:
    """What is to be kept of k, v [b t g k]. Raises ConfigError for spans, if it keeps none."""
    if mask.q_span is not None and self.spans is None:
      raise ConfigError("spans", "are not kept by this cache; give its Storage spans=True")
    segments = jnp.ones_like(mask.q_pos) if mask.q_seg is None else mask.q_seg
    spans = mask.q_span
    if self.spans is not None and spans is None:
      spans = jnp.zeros_like(mask.q_pos)
    return Tokens(k, v, mask.q_pos, segments, spans)

  def rounded(self, new: Tokens) -> Tokens:
    """New tokens as they are read once they have been stored."""
    keys, values = self.keys.rounded(new.keys), self.values.rounded(new.values)
    return dataclasses.replace(new, keys=keys, values=values)

  def write(self, new: Tokens, write: Callable[[Slab, jax.Array], Slab]) -> Store:
    """With write(slab, what of the tokens goes into it) in place of every slab."""
    part = lambda name: _map(write, getattr(self, name), getattr(new, name))
    return Store(*map(part, ("keys", "values", "positions", "segments", "spans")))

  def open(self, layer: jax.Array, table: jax.Array | None = None) -> Tokens:
    """What a layer holds: keys and values not read yet, and the marks of what is in the slots."""
    marks = (self.positions, self.segments, self.spans)
    read = [None if mark is None else mark.open(layer, table).dense() for mark in marks]
    return Tokens(self.keys.open(layer, table), self.values.open(layer, table), *read)

  def row(self, slot: jax.Array | int) -> Store:
    """One of the rows alone, of all layers."""
    return _each(lambda slab: slab.row(slot), self)

  def with_row(self, other: Store, slot: jax.Array | int) -> Store:
    """With the only row of another store in place of row `slot`. Raises ConfigError."""
    alike = jax.tree.structure(other) == jax.tree.structure(self)
    if not alike or other.slots > self.slots or other.rows != 1:
      raise ConfigError("insert", "give one row, stored as this cache is, with no more slots")
    return _each(lambda slab, new: slab.with_row(new, slot), self, other)


def joined(first: Answer, second: Answer) -> Answer:
  """The keys, values and mask over the slots of both answers to the same queries."""
  (k, v, mask), (more_k, more_v, more) = first, second
  join = lambda a, b: jnp.concatenate([dense(a), dense(b)], axis=1)
  marks = [(getattr(mask, f"kv_{m}"), getattr(more, f"kv_{m}")) for m in ("pos", "seg", "span")]
  both = mask.over(*(_map(join, *pair) for pair in marks))
  return join(k, more_k), join(v, more_v), both


def _each(f: Callable[..., Slab], *stores: Store) -> Store:
  return jax.tree.map(f, *stores, is_leaf=lambda x: isinstance(x, Slab))


def _map(f: Callable[..., Any], first: Any, second: Any) -> Any:
  return None if first is None else f(first, second)
