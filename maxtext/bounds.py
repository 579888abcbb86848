"""The numbers that a setting may be, as type hints: `steps: Count`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

LARGEST = 2**31 - 1  # steps, sizes and seeds are 32-bit integers on the device


@dataclasses.dataclass(frozen=True)
class Bound:
  """`low <= x <= high`, or `low < x` where `above`; or x is `special`, with a meaning apart."""

  low: float = -math.inf
  high: float = math.inf
  above: bool = False
  special: float | None = None

  def admits(self, x: float) -> bool:
    if x == self.special:
      return True
    return (self.low < x if self.above else self.low <= x) and x <= self.high

  @property
  def words(self) -> str:
    """`at least 1, or -1`; the largest of all integers goes without saying."""
    low = (
      "" if self.low == -math.inf else f"{'above' if self.above else 'at least'} {_spelt(self.low)}"
    )
    high = "" if self.high in (math.inf, LARGEST) else f"at most {_spelt(self.high)}"
    special = "" if self.special is None else f", or {_spelt(self.special)}"
    return " and ".join(filter(None, (low, high))) + special


def _spelt(x: float) -> str:
  return str(int(x)) if x == int(x) else f"{x:g}"


Count = Annotated[int, Bound(1, LARGEST)]
CountOrOff = Annotated[int, Bound(1, LARGEST, special=-1)]
Whole = Annotated[int, Bound(0, LARGEST)]
Fraction = Annotated[float, Bound(0, 1)]
Positive = Annotated[float, Bound(0, above=True)]
NotNegative = Annotated[float, Bound(0)]
