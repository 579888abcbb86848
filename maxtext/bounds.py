"""The numbers that a setting may be, as type hints: `steps: Count`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

LARGEST = 2**31 - 1  # steps, sizes and seeds are 32-bit integers on the device


@dataclasses.dataclass(frozen=True)
class Bound:
  """`low <= x <= high`, or `low < x` where `above`; or x is `special`, which means something apart."""

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
    """`at least 1, or -1`."""
    low = "" if self.low == -math.inf else f"{'above' if self.above else 'at least'} {self.low:g}"
    high = "" if self.high in (math.inf, LARGEST) else f"at most {self.high:g}"
    special = "" if self.special is None else f", or {self.special:g}"
    return " and ".join(filter(None, (low, high))) + special


Count = Annotated[int, Bound(1, LARGEST)]
CountOrOff = Annotated[int, Bound(1, LARGEST, special=-1)]
Whole = Annotated[int, Bound(0, LARGEST)]
Fraction = Annotated[float, Bound(0, 1)]
Positive = Annotated[float, Bound(0, above=True)]
NotNegative = Annotated[float, Bound(0)]
