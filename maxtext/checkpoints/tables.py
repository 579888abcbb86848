"""How our parameters are named and laid out elsewhere: a table that is read in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
Index = int | tuple[int, ...]  # of the leading axes of an array

AHEAD = "mtp."  # before the number of a block of multi-token prediction


@dataclasses.dataclass(frozen=True)
class Map:
  """One or several of our parameters as one tensor of theirs.

  `ours` are dotted paths, within a block where `theirs` has {l}, the number of a layer. `form` says
  how the dimensions of one layer's parameter become those of the tensor, as 'd h k -> (h k) d', and
  several are joined along `axis` of it; then `whole` says how the dimensions of all together become
  the tensor's. A () after an arrow is a new dimension. Where `theirs` has {e} too, each expert, the
  first dimension of a layer's parameter, is a tensor. A map holds where its parameters exist.
  """

  ours: str | tuple[str, ...]
  theirs: str
  form: str = ""
  axis: int = 0
  whole: str = ""

  @property
  def parts(self) -> tuple[str, ...]:
    """The paths, always several."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True)
class Slot:
  """One tensor of theirs, `name`, and the parameters that it is made of.

  Each part is (path, index into the leading layers axis or None, shape of that layer's parameter).
  """

  name: str
  form: str
  axis: int
  parts: tuple[tuple[str, Index | None, tuple[int, ...]], ...]
  whole: str = ""

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the tensor."""
    return formed(self._joined, self.whole)

  @property
  def _joined(self) -> tuple[int, ...]:
    """The shape of all parts together, before they are the tensor."""
    shapes = [formed(shape, self.form) for _, _, shape in self.parts]
    first = list(shapes[0])
    if len(shapes) > 1:
      first[self.axis] = sum(shape[self.axis] for shape in shapes)
    return tuple(first)

  def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Our layers' parameters, in the order of `parts` -> the tensor."""
    import numpy as np  # which a configuration, that reads only names, need not wait for

    made = [applied(array, self.form) for array in arrays]
    return applied(made[0] if len(made) == 1 else np.concatenate(made, self.axis), self.whole)

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """The tensor -> our layers' parameters, in the order of `parts`."""
    sizes = [formed(shape, self.form) for _, _, shape in self.parts]
    tensor = undone(tensor, self.whole, self._joined)
    pieces, begin = [], 0
    for size in sizes:
      end = begin + size[self.axis] if size else 0
      pieces.append(tensor[(slice(None),) * self.axis + (slice(begin, end),)] if size else tensor)
      begin = end
    return [undone(piece, self.form, part[2]) for piece, part in zip(pieces, self.parts)]


def slots(table: Sequence[Map], shapes: Shapes, stages: Sequence[tuple[int, int]]) -> list[Slot]:
  """Every tensor that parameters of these `shapes` make, in the table's order, layer by layer.

  `stages` are (blocks, repeats). Raises KeyError with the path of a parameter that no map names.
  """
  found, used = [], set()
  further = len({path.split(".")[1] for path in shapes if path.startswith(AHEAD)})
  for entry in table:
    places = _layers(stages, further) if "{l}" in entry.theirs else iter([(None, "", None)])
    for number, prefix, index in places:
      paths = [prefix + part for part in entry.parts]
      if not all(path in shapes for path in paths):
        continue
      used.update(paths)
      layer = [shapes[path] if index is None else shapes[path][1:] for path in paths]
      experts = range(layer[0][0]) if "{e}" in entry.theirs else [None]
      for e in experts:
        at: Index | None = index
        if e is not None:
          at = (e,) if index is None else (index, e)
        each = layer if e is None else [shape[1:] for shape in layer]
        parts = tuple((path, at, shape) for path, shape in zip(paths, each))
        name = entry.theirs.format(l=number, e=e)
        found.append(Slot(name, entry.form, entry.axis, parts, entry.whole))
  for path in shapes:
    if path not in used:
      raise KeyError(path)
  return found


def _layers(
  stages: Sequence[tuple[int, int]], further: int
) -> Iterator[tuple[int | None, str, int | None]]:
  """(number, prefix of its paths, place in the stacked parameters) of every layer, in order, and of
  those of multi-token prediction, which are numbered on and stand alone.
  """
  number = 0
  for s, (blocks, repeats) in enumerate(stages):
    for r in range(repeats):
      for b in range(blocks):
        yield number, f"stages.{s}.blocks.{b}.", r
        number += 1
  for k in range(further):
    yield number + k, f"{AHEAD}{k}.", None


def _read(form: str) -> tuple[list[str], list[list[str]]]:
  """'d h k -> (h k) d' -> [d, h, k] and [[h, k], [d]]."""
  before, after = form.split("->")
  groups: list[list[str]] = []
  inside = False
  for word in after.replace("(", " ( ").replace(")", " ) ").split():
    if word in "()":
      inside = word == "("
      groups += [[]] if inside else []
    elif inside:
      groups[-1].append(word)
    else:
      groups.append([word])
  return before.split(), groups


def formed(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
  """What a parameter's shape becomes."""
  if not form:
    return shape
  names, groups = _read(form)
  sizes = dict(zip(names, shape, strict=True))
  return tuple(math.prod(sizes[name] for name in group) for group in groups)


def applied(array: np.ndarray, form: str) -> np.ndarray:
  """The parameter as they have it."""
  if not form:
    return array
  names, groups = _read(form)
  order = [names.index(name) for group in groups for name in group]
  return array.transpose(order).reshape(formed(array.shape, form))


def undone(tensor: np.ndarray, form: str, shape: tuple[int, ...]) -> np.ndarray:
  """The parameter of this shape from what they have."""
  if not form:
    return tensor
  names, groups = _read(form)
  sizes = dict(zip(names, shape, strict=True))
  flat = [name for group in groups for name in group]
  whole = tensor.reshape([sizes[name] for name in flat])
  return whole.transpose([flat.index(name) for name in names])
