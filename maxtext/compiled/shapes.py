"""What an instruction of a compiled program makes: arrays, their bytes as they are laid out, and
the kind of memory that they are in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from maxtext.hlo import bits

HBM, HOST = 0, 5  # memory spaces, as XLA numbers them


@dataclasses.dataclass(frozen=True)
class Array:
  """One array on a device."""

  dtype: str
  shape: tuple[int, ...]
  size: int
  space: int = HBM


Made = Array | list["Made"]
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")


def read(text: str) -> Made:
  """The array, or the tuple of them, that is written so."""
  made: list[Made] = []
  inside = [made]
  position = 0
  while position < len(text):
    if text[position] == "(":
      deeper: list[Made] = []
      inside[-1].append(deeper)
      inside.append(deeper)
    elif text[position] == ")":
      inside.pop()
    elif found := _ARRAY.match(text, position):
      inside[-1].append(_array(*found.groups()))
      position = found.end()
      continue
    position += 1
  return made[0] if made else []


def arrays(made: Made) -> Iterator[Array]:
  """All arrays of it."""
  if isinstance(made, Array):
    yield made
  else:
    for one in made:
      yield from arrays(one)


def _array(dtype: str, dims: str, order: str | None, layout: str | None) -> Array:
  shape = tuple(int(n.strip("<=")) for n in dims.split(",") if n)
  space = re.search(r"S\((\d+)\)", layout or "")
  padded = list(shape)
  if (tile := re.match(r"T\(([\d,]+)\)", layout or "")) and order:
    minor = [int(n) for n in order.split(",")]
    for dim, size in zip(minor, reversed([int(n) for n in tile[1].split(",")])):
      padded[dim] = -(-padded[dim] // size) * size
  size = math.prod(padded) * bits(dtype) // 8
  return Array(dtype, shape, size, int(space[1]) if space else HBM)
