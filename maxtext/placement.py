"""Where the parameters of a run stand, for people, and what about it deserves a warning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from maxtext.sharding import Declared, Layout, names_of


@dataclasses.dataclass(frozen=True)
class Placed:
  """One parameter: the mesh axes that split each dimension, its bytes in all and on a device."""

  name: str
  declared: Declared
  split: tuple[tuple[str, ...], ...]
  whole: int
  here: int


def placed(params: Mapping[str, Declared], layout: Layout) -> list[Placed]:
  """Every parameter in its place."""
  found, sizes = [], layout.mesh.shape
  for name, p in params.items():
    split = tuple(map(names_of, layout.rules.spec(p.axes, sizes, p.shape, name)))
    whole = math.prod(p.shape) * p.dtype.itemsize
    ways = math.prod(sizes[m] for names in split for m in names)
    found.append(Placed(name, p, split, whole, whole // ways))
  return found


def table(params: Mapping[str, Declared], layout: Layout) -> str:
  """A line per parameter, and their sum."""
  rows = [("parameter", "shape", "logical axes", "split over", "bytes per device")]
  every = placed(params, layout)
  for one in every:
    split = " ".join("+".join(names) or "-" for names in one.split)
    axes = " ".join(map(str, one.declared.axes))
    rows.append((one.name, str(list(one.declared.shape)), axes, split, f"{one.here:,}"))
  rows.append(("all", "", "", "", f"{sum(one.here for one in every):,}"))
  widths = [max(len(row[i]) for row in rows) for i in range(5)]
  line = lambda row: "  ".join(c.ljust(w) for c, w in zip(row[:4], widths))
  return "\n".join(f"{line(row)}  {row[4]:>{widths[4]}}" for row in rows)


def warnings(params: Mapping[str, Declared], layout: Layout, tolerance: float) -> Iterator[str]:
  """Parameters that stand whole on every device, where others are split, though they are more than
  `tolerance` of all bytes; and mesh axes that split nothing.
  """
  every, sizes = placed(params, layout), layout.mesh.shape
  used = {m for one in every for names in one.split for m in names}
  total = sum(one.whole for one in every)
  for one in every if used else ():
    if not any(one.split) and one.whole > tolerance * total:
      axes = ", ".join(axis for axis in one.declared.axes if axis)
      yield (
        f"{one.name} stands whole on every device, {one.whole / total:.1%} of all parameters; no "
        f"rule splits {axes} here (sharding_tolerance={tolerance:g})"
      )
  used |= {*layout.token_axes, *layout.splits("activation_norm_length")}
  for axis, size in sizes.items():
    if size > 1 and axis not in used:
      yield (
        f"mesh axis {axis!r} of size {size} splits nothing: {size} devices each do the same work; "
        f"make its size 1, or name it in logical_axis_rules"
      )
