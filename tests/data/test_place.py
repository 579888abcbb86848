"""Host rows on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext.data.pipeline import train_batches
from maxtext.data.place import host_rows, place
from maxtext.errors import DataError
from tests.data.cases import corpus_of, numbered, section


@pytest.mark.parametrize("spec", [P(), P("data"), P(("data", "fsdp")), P("fsdp", "data")])
def test_placed_columns_are_the_host_columns_split_as_asked(spec):
  devices = np.array(jax.devices()[:8]).reshape(2, 4)
  mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  sharding = NamedSharding(mesh, spec)
  batch = next(train_batches(corpus_of(numbered([90, 80])), section(), 8, 16))
  placed = place(batch, sharding, 8)
  assert placed.keys() == batch.keys()
  for name, column in placed.items():
    assert column.sharding.is_equivalent_to(sharding, 2)
    assert column.dtype == np.int32
    np.testing.assert_array_equal(column, batch[name])


class Host:
  """A sharding as one host of several sees it."""

  def __init__(self, *rows):
    self.rows = rows

  def addressable_devices_indices_map(self, shape):
    return {number: (rows, slice(None)) for number, rows in enumerate(self.rows)}


def test_a_host_has_the_rows_of_its_devices():
  assert host_rows(Host(slice(4, 6), slice(6, 8)), 8, 16) == slice(4, 8)
  assert host_rows(Host(slice(None), slice(None)), 8, 16) == slice(0, 8)
  assert host_rows(Host(slice(0, 1), slice(0, 1)), 2, 16) == slice(0, 1)


def test_rows_that_do_not_follow_each_other_are_refused():
  with pytest.raises(DataError, match=r"rows \[0, 1, 4, 5\] of 8.*put the axes"):
    host_rows(Host(slice(0, 2), slice(4, 6)), 8, 16)
