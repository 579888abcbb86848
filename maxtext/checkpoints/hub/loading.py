"""Parameters born sharded from a model of the hub, tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxtext.checkpoints.hub.model import Model
from maxtext.checkpoints.tables import Index

Params = dict[str, jax.Array]


def load(model: Model, target: Mapping[str, Any], stages: Sequence[tuple[int, int]]) -> Params:
  """The parameters that `target` describes by ShapeDtypeStruct; `stages` as for `slots`.

  The host holds a tensor at a time. Raises CheckpointError as Model.fitted does.
  """
  params: Params = {}
  for slot, tensor in model.fitted({path: like.shape for path, like in target.items()}, stages):
    for (path, index, _), piece in zip(slot.parts, slot.split(tensor.read()), strict=True):
      like = target[path]
      piece = np.ascontiguousarray(piece.astype(like.dtype))
      if index is None:
        params[path] = _placed(piece, like.sharding)
        continue
      if path not in params:
        params[path] = _empty(like.shape, like.dtype, like.sharding)()
      part = _placed(piece, _inner(like.sharding, len(like.shape) - piece.ndim))
      params[path] = _put(like.sharding)(params[path], part, index).block_until_ready()
  return params


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
  """On the devices, also of other processes that call this too."""
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _inner(sharding: Any, leading: int) -> Any:
  """The sharding of what stands at an index of the `leading` axes."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[leading:]))


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
  return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.cache
def _put(sharding: Any) -> Any:
  """(whole, part, index of its leading axes) -> whole, in the same memory."""

  def put(whole: jax.Array, part: jax.Array, index: Index) -> jax.Array:
    return whole.at[index].set(part)

  return jax.jit(put, donate_argnums=0, out_shardings=sharding)
