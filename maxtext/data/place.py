"""Host rows -> global arrays on the mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Sharding

from maxtext.errors import DataError


def host_rows(sharding: Sharding, batch: int, length: int) -> slice:
  """The rows of a global batch [batch length] that this host's devices hold. Raises DataError."""
  held = np.zeros(batch, bool)
  for index in sharding.addressable_devices_indices_map((batch, length)).values():
    assert index is not None  # it is of this host
    held[index[0]] = True
  mine = np.flatnonzero(held).tolist()
  if mine != list(range(mine[0], mine[-1] + 1)):
    raise DataError(
      f"mesh_axes: this host has rows {mine} of {batch}, which do not follow each other; "
      "put the axes that split the batch first"
    )
  return slice(mine[0], mine[-1] + 1)


def place(
  batch: dict[str, np.ndarray], sharding: Sharding, rows: int, first: int = 0
) -> dict[str, jax.Array]:
  """Columns [r t] of this host's rows, which begin at `first` -> columns of all `rows` [b t], split
  as `sharding` says; hosts that share rows hold parts of their length.
  """

  def placed(column: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # it is of this host
      begin, end, _ = index[0].indices(rows)
      return column[begin - first : end - first, index[1]]

    return jax.make_array_from_callback((rows, column.shape[1]), sharding, part)

  return {name: placed(column) for name, column in batch.items()}
