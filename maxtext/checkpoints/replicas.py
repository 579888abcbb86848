"""A state of which every part is read from storage once, and goes from there to its replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.stores import Store


def read(folder: Path, arrays: Iterable[Array], target: Any) -> Any:
  """The arrays that `target` (of jax.ShapeDtypeStruct with NamedShardings) names, as it shards
  them, bit for bit. Raises CheckpointError.

  Which process reads a part is the same for all parts that are split alike: of a mesh whose first
  axis goes over the hosts, the first.
  """
  store, there = Store(folder), {array.path: array for array in arrays}
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  one = lambda path, like: _read(store, there[name(path)], like)
  return jax.tree_util.tree_map_with_path(one, target)


def _read(store: Store, array: Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """One array: its replicas stand along a further axis, all but the first of zeros, and are summed
  as whole numbers, which changes no bit.
  """
  mesh, spec = like.sharding.mesh, like.sharding.spec
  used = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
  free = tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in used)
  ways = math.prod(mesh.shape[axis] for axis in free)
  dtype = np.dtype(like.dtype)
  bits = np.dtype(f"uint{8 * dtype.itemsize}")

  def part(index: Any) -> np.ndarray:
    replica, *inner = index
    if replica.start:
      shape = [len(range(*each.indices(size))) for each, size in zip(inner, like.shape)]
      return np.zeros((1, *shape), bits)
    return store.read(array, tuple(inner)).view(bits)[None]

  def merge(x: jax.Array) -> jax.Array:
    whole = x.sum(0, dtype=bits)
    return whole.astype(bool) if dtype.kind == "b" else jax.lax.bitcast_convert_type(whole, dtype)

  wide = NamedSharding(mesh, PartitionSpec(free or None, *spec))
  replicas = jax.make_array_from_callback((ways, *like.shape), wide, part)
  whole = jax.jit(merge, out_shardings=NamedSharding(mesh, spec))(replicas)
  return jax.device_put(whole, like.sharding)
