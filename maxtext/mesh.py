"""The `mesh` section: how devices are arranged, and which mesh axes split which logical axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, get_args

from maxtext.bounds import LARGEST, Bound, Count, Fraction
from maxtext.errors import ConfigError

Ways = Annotated[int, Bound(1, LARGEST, special=-1)]

Axis = Literal[
  "diloco",
  "data",
  "stage",
  "fsdp",
  "fsdp_transpose",
  "sequence",
  "context",
  "context_autoregressive",
  "tensor",
  "tensor_transpose",
  "tensor_sequence",
  "expert",
  "autoregressive",
]
AXES: tuple[str, ...] = get_args(Axis)
WORKING = (
  "data",
  "stage",
  "fsdp",
  "fsdp_transpose",
  "sequence",
  "context",
  "context_autoregressive",
  "tensor",
  "tensor_transpose",
  "tensor_sequence",
  "expert",
  "autoregressive",
)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """A mesh axis's size is its ICI parallelism, within slices, times its DCN parallelism, over them.

  Of each kind one may be -1: what is left of the devices, or of the slices.
  """

  custom_mesh_and_rule: str
  mesh_axes: tuple[Axis, ...]
  logical_axis_rules: Mapping[str, tuple[Axis, ...]]
  override_logical_axis_rules: bool
  ici_diloco_parallelism: Ways
  ici_data_parallelism: Ways
  ici_pipeline_parallelism: Ways
  ici_fsdp_parallelism: Ways
  ici_fsdp_transpose_parallelism: Ways
  ici_sequence_parallelism: Ways
  ici_context_parallelism: Ways
  ici_context_autoregressive_parallelism: Ways
  ici_tensor_parallelism: Ways
  ici_tensor_transpose_parallelism: Ways
  ici_tensor_sequence_parallelism: Ways
  ici_expert_parallelism: Ways
  ici_autoregressive_parallelism: Ways
  dcn_diloco_parallelism: Ways
  dcn_data_parallelism: Ways
  dcn_pipeline_parallelism: Ways
  dcn_fsdp_parallelism: Ways
  dcn_fsdp_transpose_parallelism: Ways
  dcn_sequence_parallelism: Ways
  dcn_context_parallelism: Ways
  dcn_context_autoregressive_parallelism: Ways
  dcn_tensor_parallelism: Ways
  dcn_tensor_transpose_parallelism: Ways
  dcn_tensor_sequence_parallelism: Ways
  dcn_expert_parallelism: Ways
  dcn_autoregressive_parallelism: Ways
  shard_mode: Literal["auto", "explicit"]
  num_slices: Count
  allow_split_physical_axes: bool
  shard_optimizer_over_data: bool
  sharding_tolerance: Fraction
  debug_sharding: bool

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if not self.mesh_axes:
      yield "mesh_axes", "is empty; name at least one axis, as [data, fsdp, tensor]"
    if repeated := [a for a in self.mesh_axes if self.mesh_axes.count(a) > 1]:
      yield "mesh_axes", f"{repeated[0]!r} stands twice; name each axis once"
    if self.override_logical_axis_rules and not any(self.logical_axis_rules.values()):
      yield "override_logical_axis_rules", "leaves no rule at all; write logical_axis_rules too"
    for name, axes in self.logical_axis_rules.items():
      if repeated := [a for a in axes if axes.count(a) > 1]:
        yield "logical_axis_rules", f"{name} names {repeated[0]!r} twice; name each mesh axis once"
    for kind in ("ici", "dcn"):
      if len(free := self._free(kind)) > 1:
        which = f"{' and '.join(free)} are {'both' if len(free) == 2 else 'all'} -1"
        yield free[-1], f"{which}; only one may take the rest", *free[:-1]
      for axis in AXES:
        yield from self._axis_complaints(_key(kind, axis), axis)

  def _axis_complaints(self, key: str, axis: str) -> Iterator[tuple[str, ...]]:
    ways = getattr(self, key)
    if axis not in WORKING and ways != 1:
      working = ", ".join(WORKING)
      yield key, f"{ways}: parallelism over {axis!r} is not there yet; use 1 (there are {working})"
    elif self.mesh_axes and axis not in self.mesh_axes and ways != 1:
      yield (
        key,
        f"{key}={ways}, but mesh_axes does not name {axis!r}; add it there, or set {key}=1",
        "mesh_axes",
      )

  def sizes(self, devices: int) -> dict[str, int]:
    """Mesh axis -> size on this many devices; raises ConfigError where that cannot be."""
    ici, dcn = self.ici(devices), self.dcn()
    return {axis: ici[axis] * dcn[axis] for axis in self.mesh_axes}

  def ici(self, devices: int) -> dict[str, int]:
    """Mesh axis -> size within a slice."""
    each, left = divmod(devices, self.num_slices)
    if left:
      fit = ", ".join(str(n) for n in range(1, min(devices, 64) + 1) if devices % n == 0)
      problem = f"{devices} devices do not make {self.num_slices} equal slices; use {fit}"
      raise ConfigError("num_slices", problem)
    slices = "" if self.num_slices == 1 else " of each slice"
    return self._fill("ici", each, f"{each} device{'s' * (each > 1)}{slices}")

  def dcn(self) -> dict[str, int]:
    """Mesh axis -> size over slices."""
    return self._fill("dcn", self.num_slices, f"num_slices={self.num_slices}")

  def ways(self, logical: str, sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these sizes splits the logical axis."""
    return math.prod(sizes.get(axis, 1) for axis in self.logical_axis_rules.get(logical, ()))

  def keys(self, axis: str) -> tuple[str, str]:
    """The keys that set an axis's size."""
    return _key("ici", axis), _key("dcn", axis)

  def _free(self, kind: str) -> list[str]:
    keys = [_key(kind, axis) for axis in WORKING]
    return [key for key in keys if getattr(self, key) == -1]

  def _fill(self, kind: str, total: int, what: str) -> dict[str, int]:
    sizes = {axis: getattr(self, _key(kind, axis)) for axis in self.mesh_axes}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest, left = divmod(total, fixed)
    if left or (rest > 1 and -1 not in sizes.values()):
      split = [axis for axis, size in sizes.items() if size not in (-1, 1)]
      product = " x ".join(f"{axis} {sizes[axis]}" for axis in split) or "1"
      wanted = f"a divisor of {total}" if -1 in sizes.values() else str(total)
      key = _key(kind, split[-1] if split else "fsdp")
      others = fixed // (sizes[split[-1]] if split else 1)
      wanted += f", as {key}={total // others}" if total % others == 0 else ""
      wanted += "" if -1 in sizes.values() else ", or one of the sizes -1"
      raise ConfigError(key, f"{what} cannot be arranged as {product}; make the product {wanted}")
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


def _key(kind: str, axis: str) -> str:
  return f"{kind}_{'pipeline' if axis == 'stage' else axis}_parallelism"
