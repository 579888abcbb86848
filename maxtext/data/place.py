"""Host rows -> global arrays on the mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Sharding

from maxtext.errors import DataError


def host_rows(sharding: Sharding, batch: int, length: int) -> slice:
  """The rows of a global batch [batch length] that this host's devices hold. Raises DataError."""
  shards = sharding.addressable_devices_indices_map((batch, length)).values()
  held = np.zeros(batch, bool)
  for rows, _ in shards:
    held[rows] = True
  first, last = np.flatnonzero(held)[[0, -1]]
  if not held[first : last + 1].all():
    raise DataError(
      f"a host holds rows {np.flatnonzero(held).tolist()} of {batch}, which do not follow each other; "
      "put the mesh axes that split the batch first in mesh_axes"
    )
  return slice(int(first), int(last) + 1)


def place(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
  """Columns of this host's rows [r t] -> columns of all rows [b t], split as `sharding` says."""
  return {
    name: jax.make_array_from_process_local_data(sharding, column) for name, column in batch.items()
  }
