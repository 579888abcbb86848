"""A kernel on each device's part of rows, tokens and heads, as the layout in use splits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from maxtext import sharding
from maxtext.masks import Mask


def is_split(axis: str) -> bool:
  """Whether the layout in use splits this logical axis, and this is not yet a device's part."""
  return (layout := _whole()) is not None and layout.ways(axis) > 1


def by_parts() -> bool:
  """Whether kernels are given each device's part: types of JAX do not know what kernels do."""
  return (layout := _whole()) is not None and layout.explicit


def _whole() -> sharding.Layout | None:
  """The layout of arrays over several devices, where this is not yet a device's part."""
  layout, manual = sharding.active(), jax.sharding.get_abstract_mesh().manual_axes
  return None if layout is None or layout.mesh.size == 1 or manual else layout


@dataclasses.dataclass(frozen=True)
class Split:
  """The mesh axes that split q [b t h k] and k, v [b s g k], dimension by dimension."""

  mesh: Mesh
  q: PartitionSpec
  kv: PartitionSpec

  @classmethod
  def of(cls, q: jax.Array, k: jax.Array, slots: str | None = None) -> Split | None:
    """The split of q and k, or None where they are whole: on one device, or already its part.

    With `slots`, the logical axis of the keys' length, all queries are on every device that has
    some of them. A lone key head is whole: all query heads meet it.
    """
    if (layout := _whole()) is None:
      return None
    keys = "activation_kv_heads" if k.shape[2] > 1 else None
    lengths = (None, slots) if slots else (sharding.LENGTH,) * 2
    sides = (q, lengths[0], "activation_heads", "query"), (k, lengths[1], keys, "key")
    specs = (
      layout.sharding(("activation_batch", length, heads, None), x.shape, name).spec
      for x, length, heads, name in sides
    )
    return cls(layout.mesh, *specs)

  @property
  def length(self) -> tuple[str, ...]:
    """The mesh axes that split the length."""
    entry = self.q[1]
    return (entry,) if isinstance(entry, str) else tuple(entry or ())

  def ways(self, dimension: int) -> int:
    """Into how many parts a dimension of q is split."""
    entry = self.q[dimension]
    ways = 1
    for axis in (entry,) if isinstance(entry, str) else entry or ():
      ways *= self.mesh.shape[axis]
    return ways

  @property
  def crossed(self) -> str | None:
    """In words, that a device's query heads need key heads of other devices, if they do."""
    if self.q[2] == self.kv[2]:
      return None
    return "query heads and key heads are not split over the same mesh axes"

  def run(
    self,
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    sink: jax.Array | None,
  ) -> jax.Array:
    """kernel(q, k, v, mask, sink) of each device's parts -> [b t h k].

    Manual over the whole mesh: what is not split is on every device that shares it.
    """
    sides, heads = {"q": self.q, "kv": self.kv}, PartitionSpec(self.q[2])
    marks: dict[str, Any] = {
      f"{s}_{m}": PartitionSpec(*sides[s][:2]) for s in sides for m in ("pos", "seg", "span")
    }
    return sharding.by_device(
      kernel, (self.q, self.kv, self.kv, dataclasses.replace(mask, **marks), heads), self.q
    )(q, k, v, mask, sink)
