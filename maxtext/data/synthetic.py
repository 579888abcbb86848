"""Random tokens that cost nothing to make: for speed and memory, where the text does not matter."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np


@dataclasses.dataclass(frozen=True)
class Noise:
  """Rows of tokens drawn uniformly: no model gets below a loss of ln(vocab_size)."""

  vocab_size: int
  stream: int  # different streams have nothing in common
  rows: int = sys.maxsize

  def row(self, index: int, length: int) -> np.ndarray:
    """[length] int32, below vocab_size: a pure function of stream, index and place in the row."""
    place = np.arange(length, dtype=np.uint64) + np.uint64(index << 32)
    word = _mixed(place ^ _mixed(np.full(1, self.stream, np.uint64)))
    return ((word >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int32)


def _mixed(x: np.ndarray) -> np.ndarray:
  """SplitMix64 (Steele, Lea, Flood 2014): integers only, so the same on every machine."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
