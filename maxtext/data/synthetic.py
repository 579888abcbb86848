"""Random tokens that cost nothing to make: for speed and memory, where the text does not matter."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from maxtext.data.permutation import noise


@dataclasses.dataclass(frozen=True)
class Noise:
  """Rows of tokens drawn uniformly: no model gets below a loss of ln(vocab_size)."""

  vocab_size: int
  stream: int  # different streams have nothing in common
  rows: int = sys.maxsize

  def row(self, index: int, length: int) -> np.ndarray:
    """[length] int32, below vocab_size: a pure function of stream, index and place in the row."""
    word = noise(self.stream, index << 32, length) >> np.uint64(32)
    return (word * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int32)
