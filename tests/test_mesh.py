"""Sizes of mesh axes from ICI and DCN parallelism."""

from __future__ import annotations

import dataclasses
import math

import pytest

from maxtext.config import load
from maxtext.errors import ConfigError
from maxtext.mesh import AXES, Mesh


def mesh(**changes: object) -> Mesh:
  return dataclasses.replace(load([], {}).mesh, **changes)


def test_an_axis_is_its_share_within_a_slice_times_its_share_over_slices():
  sizes = mesh(
    num_slices=4, dcn_data_parallelism=2, dcn_fsdp_parallelism=-1, ici_tensor_parallelism=2
  ).sizes(32)
  assert sizes["data"] == 2 and sizes["fsdp"] == 2 * 4 and sizes["tensor"] == 2
  assert math.prod(sizes.values()) == 32 and tuple(sizes) == AXES


def test_minus_one_takes_what_is_left():
  assert mesh(ici_tensor_parallelism=2).ici(8)["fsdp"] == 4
  assert mesh(ici_data_parallelism=-1, ici_fsdp_parallelism=2).ici(8)["data"] == 4
  assert mesh().sizes(1) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
  "changes, devices, says",
  [
    ({"ici_tensor_parallelism": 3}, 8, "ici_tensor_parallelism: 8 devices .* a divisor of 8"),
    ({"ici_fsdp_parallelism": 2}, 8, "ici_fsdp_parallelism: 8 devices .* the product 8"),
    ({"ici_fsdp_parallelism": 1}, 8, "ici_fsdp_parallelism: 8 devices cannot be arranged as 1"),
    ({"num_slices": 3}, 8, "num_slices: 8 devices do not make 3 equal slices"),
    ({"num_slices": 2, "dcn_data_parallelism": 3}, 8, "dcn_data_parallelism: num_slices=2 cannot"),
  ],
)
def test_devices_that_do_not_fit_are_refused_by_name(changes, devices, says):
  with pytest.raises(ConfigError, match=says):
    mesh(**changes).sizes(devices)


def test_a_logical_axis_is_split_by_the_product_of_its_axes():
  section = mesh(ici_fsdp_parallelism=2, ici_data_parallelism=2, ici_tensor_parallelism=2)
  sizes = section.sizes(8)
  assert section.ways("activation_batch", sizes) == 4 and section.ways("mlp", sizes) == 2
  assert section.ways("norm", sizes) == 1
