"""The caches of a whole decoder: one for each block of each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from maxtext.caches.prompt import bounded
from maxtext.caches.slabs import Slab, Storage
from maxtext.caches.state import AXES, StateCache
from maxtext.caches.store import Size
from maxtext.sharding import Layout
from maxtext.specs import AttentionSpec, BlockSpec, DecoderSpec

Caches = tuple[tuple[Any, ...], ...]  # per stage, per block
Make = Callable[[Size, int, int, Storage, int | None], Any]


def empty(
  spec: DecoderSpec, rows: int, slots: int, storage: Storage, make: Make = bounded
) -> Caches:
  """Fresh caches of a decoder: `rows` of `slots` tokens, fewer where a layer sees less far back.

  `make(size, rows, slots, storage, reach)` gives that of one block with attention; a delta net has
  its state.
  """

  def one(block: BlockSpec, layers: int) -> Any:
    if block.attention is None:
      return StateCache.empty(block.delta, layers, rows, storage.dtype)
    return make(kept(block.attention, layers), rows, slots, storage, reach(block.attention))

  return tuple(tuple(one(block, stage.repeat) for block in stage.blocks) for stage in spec.stages)


def kept(spec: AttentionSpec, layers: int) -> Size:
  """What a cache keeps of so many layers."""
  if (low := spec.latent) is None:
    each = (spec.kv_heads, spec.head_dim)
    return Size(layers, each, each)
  if low.expanded_cache:
    return Size(layers, (spec.heads, spec.head_dim), (spec.heads, low.value_dim))
  return Size(layers, (1, low.kv_rank), (1, low.rope_dim))


def reach(spec: AttentionSpec) -> int | None:
  """How many tokens back the layer sees, the query itself included; None: all."""
  return min((n for n in (spec.window, spec.chunk) if n is not None), default=None)


def filled(caches: Caches) -> Caches:
  """The caches after the first tokens: what follows sees them."""
  return tuple(tuple(cache.filled() for cache in stage) for stage in caches)


def placed(caches: Caches, layout: Layout) -> Caches:
  """The shapes of caches, with where they stand."""

  def place(path: Any, x: Any) -> Any:
    if isinstance(x, Slab):
      return x.places(layout)
    where = layout.sharding(_AXES[path[-1].name][: x.ndim], x.shape, "a cache")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  leaf = lambda x: isinstance(x, Slab)
  return jax.tree_util.tree_map_with_path(place, caches, is_leaf=leaf)


_AXES = AXES | {"written": ("layers", "activation_batch"), "table": ("activation_batch", None)}
