"""What a layer keeps that has a state in place of keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.sharding import constrain
from maxtext.specs import DeltaSpec

AXES = {  # the logical axes of each array
  "state": ("layers", "activation_batch", "activation_kv_heads", None, None, None),
  "inputs": ("layers", "activation_batch", None, "activation_kv_heads", None),
  "segments": ("layers", "activation_batch"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
  """The state after a row's last token [l b g r k v] in float32, what the convolution took in
  before it [l b w g c], the oldest first, and the document that it belongs to [l b], 0 before any.

  It is as large after a thousand tokens as after one. `layer` is the one that is open.
  """

  state: jax.Array
  inputs: jax.Array
  segments: jax.Array
  layer: jax.Array | None = None

  @classmethod
  def empty(cls, spec: DeltaSpec, layers: int, rows: int, dtype: Any) -> StateCache:
    """That of so many layers; the convolution's inputs are kept in `dtype`."""
    shape = (spec.key_heads, spec.per_key, spec.key_dim, spec.value_dim)
    inputs = (spec.conv - 1, spec.key_heads, spec.channels)
    return cls(
      jnp.zeros((layers, rows, *shape), jnp.float32),
      jnp.zeros((layers, rows, *inputs), dtype),
      jnp.zeros((layers, rows), jnp.int32),
    )._placed()

  def at(self, layer: jax.Array | None) -> StateCache:
    """The same cache, open at one of its layers; None: closed."""
    return dataclasses.replace(self, layer=layer)

  def filled(self) -> StateCache:
    """The same cache: it may be continued at any time."""
    return self

  def held(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """State [b g r k v], inputs [b w g c] and document [b] of the open layer."""
    arrays = (self.state, self.inputs, self.segments)
    return tuple(lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in arrays)

  def keep(self, state: jax.Array, inputs: jax.Array, segments: jax.Array) -> StateCache:
    """With these in place of what the open layer holds."""
    put = lambda name, x: lax.dynamic_update_index_in_dim(
      getattr(self, name), x.astype(getattr(self, name).dtype), self.layer, 0
    )
    new = {"state": state, "inputs": inputs, "segments": segments}
    return dataclasses.replace(self, **{name: put(name, x) for name, x in new.items()})._placed()

  def row(self, slot: jax.Array | int) -> StateCache:
    """One row alone, to be continued, and then inserted again."""
    return self._each(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, axis=1))

  def insert(self, other: StateCache, slot: jax.Array | int) -> StateCache:
    """With the only row of another cache in place of row `slot`."""
    put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), slot, axis=1)
    return self._each(put, other)

  def reset(self, slot: jax.Array | int) -> StateCache:
    """With row `slot` empty."""
    return self.insert(self.row(slot)._each(jnp.zeros_like), slot)

  def _each(self, f: Any, *others: StateCache) -> StateCache:
    new = {name: f(*(getattr(c, name) for c in (self, *others))) for name in AXES}
    return dataclasses.replace(self, **new)

  def _placed(self) -> StateCache:
    new = {name: constrain(getattr(self, name), *axes) for name, axes in AXES.items()}
    return dataclasses.replace(self, **new)
