"""Documents -> rows of `length` tokens, through Grain.

A document of n tokens is n - 1 pairs (input, target), the target being the token after the input:
no row has to look beyond its end, and no target belongs to another document. A row holds pairs:

    inputs     <bos> T   o   <bos> I   f   -      segments   1 1 1 2 2 2 0
    targets    T     o  <eos> I    f <eos> -      positions  0 1 2 0 1 2 0
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import grain
import numpy as np
from grain import experimental

from maxtext.data.batches import COLUMNS, Row, Stream
from maxtext.data.corpus import Tokens
from maxtext.data.permutation import permutation
from maxtext.data.sections import Data
from maxtext.data.synthetic import Noise

# Rows that first_fit and best_fit fill at a time. Not the batch: rows must not depend on its size.
BINS = 64


def training_rows(source: Tokens | Noise, data: Data, length: int) -> Stream:
  """Rows for `num_epoch` passes, each in another order when shuffling is on."""
  seed = data.data_shuffle_seed if data.enable_data_shuffling else None
  return _rows(source, data, length, Passes(seed, None if data.num_epoch == -1 else data.num_epoch))


def evaluation_rows(source: Tokens | Noise, data: Data, length: int) -> Stream:
  """One pass, always in the same order: shuffled, so that its first rows stand for all."""
  return _rows(source, data, length, Passes(0, 1))


def _rows(source: Tokens | Noise, data: Data, length: int, passes: Passes) -> Stream:
  if isinstance(source, Noise):
    return Indexed(grain.MapDataset.source(NoiseRows(source, length)))
  if data.packing and data.grain_packing_type == "concat_then_split":
    return Indexed(grain.MapDataset.source(Ordered(SplitRows(source, length), passes)))
  pieces = grain.MapDataset.source(Ordered(Pieces(source, length), passes))
  if not data.packing:
    return Indexed(pieces.map(lambda piece: _padded(piece["pairs"], length)))
  pack = {
    "first_fit": experimental.FirstFitPackIterDataset,
    "best_fit": experimental.BestFitPackIterDataset,
  }[data.grain_packing_type]
  unthreaded = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the tokens are in memory
  packed = pack(
    pieces.to_iter_dataset(unthreaded),
    length_struct={"pairs": length},
    num_packing_bins=BINS,
    seed=passes.seed or 0,
    shuffle_bins=passes.seed is not None,
    max_sequences_per_bin=None if data.max_segments_per_seq == -1 else data.max_segments_per_seq,
  )
  return Packed(packed)


@dataclasses.dataclass(frozen=True)
class Passes:
  """In which order the corpus is read, and how often."""

  seed: int | None  # None: as it stands
  epochs: int | None  # None: without end


class Ordered:
  """Grain source: another one, in as many passes as asked for, each in an order of its own."""

  def __init__(self, source: Pieces | SplitRows, passes: Passes):
    self._source, self._passes = source, passes
    self._order = functools.lru_cache(maxsize=2)(self._permutation)

  def __len__(self) -> int:
    epochs = self._passes.epochs
    return sys.maxsize if epochs is None else epochs * len(self._source)

  def __getitem__(self, index: int) -> Any:
    epoch, place = divmod(index, len(self._source))
    return self._source[place if self._passes.seed is None else int(self._order(epoch)[place])]

  def _permutation(self, epoch: int) -> np.ndarray:
    assert self._passes.seed is not None
    return permutation(self._passes.seed << 32 | epoch, len(self._source))


class Pieces:
  """Grain source: documents cut into pieces of at most `length` pairs, {"pairs": [n 2]}."""

  def __init__(self, tokens: Tokens, length: int):
    pairs = np.diff(tokens.starts) - 1
    self._tokens, self._length = tokens, length
    self._firsts = np.cumsum(np.r_[0, -(-pairs // length)])  # of each document: its first piece

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    document = self._firsts.searchsorted(index, side="right") - 1
    start = self._tokens.starts[document] + (index - self._firsts[document]) * self._length
    stop = min(start + self._length, self._tokens.starts[document + 1] - 1)
    ids = self._tokens.ids
    return {"pairs": np.stack([ids[start:stop], ids[start + 1 : stop + 1]], axis=1)}


class SplitRows:
  """Grain source: all documents one after the other, cut every `length` pairs; the last is short.

  `grain.experimental.ConcatThenSplitIterDataset` cuts the same rows, but as it goes, so that only
  documents can be shuffled, and a batch holds neighbouring rows of one document. With every row at
  hand the rows are shuffled, and a resumed run reads none of those before its own.
  """

  def __init__(self, tokens: Tokens, length: int):
    self._tokens, self._length = tokens, length
    self._firsts = tokens.starts - np.arange(len(tokens.starts))  # of each document: its first pair

  def __len__(self) -> int:
    return -(-int(self._firsts[-1]) // self._length)

  def __getitem__(self, index: int) -> Row:
    low = index * self._length
    high = min(low + self._length, int(self._firsts[-1]))
    first = int(self._firsts.searchsorted(low, side="right")) - 1
    last = int(self._firsts.searchsorted(high))
    edges = self._firsts[first : last + 1].copy()
    edges[0], edges[-1] = low, high
    pairs = np.arange(low, high)
    segments = np.arange(last - first).repeat(edges[1:] - edges[:-1])  # from 0
    place = pairs + segments + first
    return _row(
      self._length,
      self._tokens.ids[place],
      self._tokens.ids[place + 1],
      segments + 1,
      pairs - edges[segments],
    )


class NoiseRows:
  """Grain source: every row a document that goes on beyond it."""

  def __init__(self, noise: Noise, length: int):
    self._noise, self._length = noise, length

  def __len__(self) -> int:
    return self._noise.rows

  def __getitem__(self, index: int) -> Row:
    ids = self._noise.row(index, self._length + 1)
    return _padded(np.stack([ids[:-1], ids[1:]], axis=1), self._length)


class Indexed:
  """Rows of which any can be had at once: the state is a number, and a host makes only its own."""

  def __init__(self, rows: grain.MapDataset):
    self._rows, self._next = rows, 0

  def take(self, count: int, kept: slice) -> list[Row]:
    start, end = self._next, len(self._rows)
    if start >= end:
      raise StopIteration
    self._next = min(start + count, end)
    return [self._rows[index] for index in range(start + kept.start, min(start + kept.stop, end))]

  def get_state(self) -> dict[str, Any]:
    return {"row": self._next}

  def set_state(self, state: dict[str, Any]) -> None:
    if state["row"] > len(self._rows):
      raise IndexError(state["row"])
    self._next = state["row"]


class Packed:
  """Rows that a packer makes one after the other: every host makes all, and keeps its own."""

  def __init__(self, rows: grain.IterDataset):
    self._rows = iter(rows)

  def take(self, count: int, kept: slice) -> list[Row]:
    rows = []
    for index in range(count):
      try:
        packed = next(self._rows)
      except StopIteration:
        if index == 0:
          raise
        break
      if kept.start <= index < kept.stop:
        rows.append(packed)
    names = ("pairs_segment_ids", "pairs_positions")
    return [np.concatenate([row["pairs"].T, [row[name] for name in names]]) for row in rows]

  def get_state(self) -> dict[str, Any]:
    return self._rows.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._rows.set_state(state)


def _row(length: int, *columns: np.ndarray) -> Row:
  """Columns [n] -> a row, filled up with zeros."""
  row = np.zeros((len(COLUMNS), length), np.int32)
  for index, column in enumerate(columns):
    row[index, : column.size] = column
  return row


def _padded(pairs: np.ndarray, length: int) -> Row:
  """One piece [n 2] -> a row of its own."""
  size = len(pairs)
  return _row(length, *pairs.T, np.ones(size, np.int32), np.arange(size))
