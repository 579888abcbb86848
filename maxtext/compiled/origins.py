"""Where the arrays of a compiled program come from: the line of ours that made one, and the logical
axes of its dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from jax.sharding import NamedSharding

from maxtext import sharding
from maxtext.hlo import Line
from maxtext.sharding import Declared, Layout

HOUSE = "/maxtext/"
_PASSING = ("sharding.py", "collectives.py", "layers/local.py")  # of what others make


@dataclasses.dataclass(frozen=True)
class Noting(Layout):
  """A layout that notes the logical axes of all that it places, by the shape that a device has."""

  noted: dict[tuple[int, ...], tuple[str | None, ...]] = dataclasses.field(
    default_factory=dict, compare=False
  )

  def sharding(self, axes: sharding.Axes, shape: Sequence[int], name: str = "") -> NamedSharding:
    place = super().sharding(axes, shape, name)
    if not str(axes[0] if axes else "").startswith("activation"):  # parameters have names
      return place
    here = place.shard_shape(tuple(shape))
    self.noted.setdefault(_squeezed(here), tuple(axes))
    if len(here) > 2:  # products take rows and their tokens for one dimension
      rows = (here[0] * here[1], *here[2:])
      self.noted.setdefault(_squeezed(rows), (f"{axes[0]}*{axes[1]}", *axes[2:]))
    return place


class Origins:
  """Of one program's text."""

  def __init__(self, text: str, layout: Layout, declared: Mapping[str, Declared]):
    self.noted = layout.noted if isinstance(layout, Noting) else {}
    self.declared = declared
    self._like = _parameters(declared, layout)
    self._files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.MULTILINE))
    places = r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+)"
    found = re.findall(places, _table(text, "FileLocations"), re.MULTILINE)
    self._places = {number: (file, line) for number, file, line in found}
    frames = r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}"
    self._frames = {
      number: (place, str(int(parent) - 1))
      for number, place, parent in re.findall(frames, _table(text, "StackFrames"), re.MULTILINE)
    }

  def source(self, line: Line) -> str:
    """file:line of ours, below maxtext/, that the instruction was traced from; '' if none."""
    found = re.search(r"stack_frame_id=(\d+)", line.rest)
    frame, passed = found[1] if found else "", ""
    while frame in self._frames:
      place, frame = self._frames[frame]
      file, number = self._places.get(place, ("", ""))
      name = self._files.get(file, "")
      if HOUSE in name:
        where = f"{name.rpartition(HOUSE)[2]}:{number}"
        if not where.startswith(_PASSING):
          return where
        passed = passed or where
    return passed

  def axes(self, line: Line, shape: tuple[int, ...]) -> str:
    """The logical axes of what it makes, as far as something of this shape was placed by name."""
    name = self.parameter(line)
    if name in self.declared:
      return " ".join(axis or "-" for axis in self.declared[name].axes)
    for dropped in range(max(len(shape) - 1, 1)):  # loops stack what they keep
      if axes := self.noted.get(_squeezed(shape[dropped:])):
        return " ".join([*["layers"] * (dropped > 0), *(axis or "-" for axis in axes)])
    return self._like.get(_squeezed(shape), "")  # a gradient, an update, what was gathered

  def parameter(self, line: Line) -> str:
    """The name of the parameter that an argument is, or belongs to."""
    found = re.search(r"op_name=\"state\.[\w\[\].]*?\[\\?'(.*?)\\?'\]", line.rest)
    return found[1] if found else ""


def _parameters(declared: Mapping[str, Declared], layout: Layout) -> dict[tuple[int, ...], str]:
  """The axes of parameters by their shapes, of all layers and of one, each dimension in part or
  whole, as it is gathered; but for shapes that parameters with other axes have too.
  """
  found: dict[tuple[int, ...], set[str]] = {}
  for p in declared.values():
    here = layout.sharding(p.axes, p.shape).shard_shape(p.shape)
    for begin in range(1 + p.stacked):
      axes = " ".join(axis or "-" for axis in p.axes[begin:])
      for shape in itertools.product(*zip(here[begin:], p.shape[begin:])):
        found.setdefault(_squeezed(shape), set()).add(axes)
  return {shape: axes.pop() for shape, axes in found.items() if len(axes) == 1 and len(shape) > 1}


def name_of(line: Line) -> str:
  """What the instruction is for, as traced, without what surrounds all of them."""
  found = re.search(r'op_name="([^"]*)"', line.rest)
  name = (found[1] if found else line.name).replace("\\'", "'")
  return re.sub(r"^jit\(\w+\)/|\b(while/body|closed_call|checkpoint)/", "", name)[-60:]


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
  return tuple(size for size in shape if size > 1)


def _table(text: str, name: str) -> str:
  found = re.search(rf"^{name}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
  return found[1] if found else ""
