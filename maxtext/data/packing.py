"""Documents -> rows of `length` tokens.

A document of n tokens is n - 1 pairs (input, target), the target being the token after the input:
no row has to look beyond its end, and no target belongs to another document. A row holds pairs:

    inputs     <bos> T   o   <bos> I   f   -      segments   1 1 1 2 2 2 0
    targets    T     o  <eos> I    f <eos> -      positions  0 1 2 0 1 2 0
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maxtext.data import plans
from maxtext.data.batches import COLUMNS, Row, Stream
from maxtext.data.corpus import Tokens
from maxtext.data.errors import Budget, Damaged
from maxtext.data.feeds import SourceFeed
from maxtext.data.mixtures import Mixture
from maxtext.data.permutation import permutation
from maxtext.data.plans import Draws, Span
from maxtext.data.sections import Data
from maxtext.data.synthetic import Noise


def training_rows(
  source: Tokens | Noise | Mixture, data: Data, length: int, batch: int = 1
) -> Stream:
  """Rows for `num_epoch` passes, each in another order when shuffling is on; `batch` a step."""
  seed = data.data_shuffle_seed if data.enable_data_shuffling else None
  passes = Passes(seed, None if data.num_epoch == -1 else data.num_epoch)
  return _rows(source, data, length, passes, batch)


def evaluation_rows(source: Tokens | Noise | Mixture, data: Data, length: int) -> Stream:
  """One pass, always in the same order: shuffled, so that its first rows stand for all."""
  return _rows(source, data, length, Passes(0, 1))


def _rows(
  source: Tokens | Noise | Mixture, data: Data, length: int, passes: Passes, batch: int = 1
) -> Stream:
  if isinstance(source, Noise):
    return Indexed(NoiseRows(source, length))
  if isinstance(source, Mixture):
    draws = _draws(source, data, passes, length if data.use_truncation else sys.maxsize)
    return Planned(draws, _packer(data, passes.seed), length, batch)
  source = source.truncated(length + 1) if data.use_truncation else source
  if data.packing and data.grain_packing_type == "concat_then_split":
    return Indexed(Ordered(SplitRows(source, length), passes))
  pieces = Ordered(Pieces(source, length), passes)
  if not data.packing:
    return Indexed(Padded(pieces, length))
  return Planned(Draws([PieceFeed(pieces)]), _packer(data, passes.seed), length)


def _draws(source: Mixture, data: Data, passes: Passes, most: int = sys.maxsize) -> Draws:
  feeds = [
    SourceFeed(source.reader, source.first + at, passes.seed, passes.epochs)
    for at in range(source.count)
  ]
  weights = None if source.schedules is None else source.weights
  return Draws(feeds, weights, Budget(data.data_errors, len(source)), most)


def every_document(source: Tokens | Noise | Mixture, data: Data) -> Iterator[np.ndarray]:
  """The ids of all documents, in the order they stand in. Raises DataError."""
  if isinstance(source, Tokens):
    yield from (source.ids[a:b] for a, b in zip(source.starts, source.starts[1:]))
  elif isinstance(source, Mixture):
    draws = _draws(dataclasses.replace(source, schedules=None), data, Passes(None, 1))
    while document := draws.next(0):
      yield document.read()


def _packer(data: Data, seed: int | None) -> plans.Packer:
  if not data.packing:
    return plans.alone
  if data.grain_packing_type == "concat_then_split":
    return plans.split
  most = None if data.max_segments_per_seq == -1 else data.max_segments_per_seq
  return plans.Fit(data.grain_packing_type == "best_fit", most, seed)


@dataclasses.dataclass(frozen=True)
class Passes:
  """In which order the corpus is read, and how often."""

  seed: int | None  # None: as it stands
  epochs: int | None  # None: without end


class Ordered:
  """Another sequence, in as many passes as asked for, each in an order of its own."""

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
  """Documents cut into pieces of at most `length` pairs; one of n pairs is [n + 1] ids."""

  def __init__(self, tokens: Tokens, length: int):
    pairs = np.diff(tokens.starts) - 1
    self._tokens, self._length = tokens, length
    self._firsts = np.cumsum(np.r_[0, -(-pairs // length)])  # of each document: its first piece

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, index: int) -> np.ndarray:
    document = self._firsts.searchsorted(index, side="right") - 1
    start = self._tokens.starts[document] + (index - self._firsts[document]) * self._length
    stop = min(start + self._length, self._tokens.starts[document + 1] - 1)
    return self._tokens.ids[start : stop + 1]


class SplitRows:
  """All documents one after the other, cut every `length` pairs; the last is short.

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
  """Every row a document that goes on beyond it."""

  def __init__(self, noise: Noise, length: int):
    self._noise, self._length = noise, length

  def __len__(self) -> int:
    return self._noise.rows

  def __getitem__(self, index: int) -> Row:
    return _padded(self._noise.row(index, self._length + 1), self._length)


class Indexed:
  """Rows of which any can be had at once: the state is a number, and a host makes only its own."""

  def __init__(self, rows: Ordered | NoiseRows | Padded):
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


class Padded:
  """Every piece a row of its own."""

  def __init__(self, pieces: Ordered, length: int):
    self._pieces, self._length = pieces, length

  def __len__(self) -> int:
    return len(self._pieces)

  def __getitem__(self, index: int) -> Row:
    return _padded(self._pieces[index], self._length)


class PieceFeed:
  """Pieces as the documents of a plan."""

  name = "pieces"

  def __init__(self, pieces: Ordered):
    self._pieces = pieces

  def __len__(self) -> int:
    return len(self._pieces)

  def take(self, number: int) -> tuple[int, Callable[[], np.ndarray]]:
    ids = self._pieces[number]
    return len(ids) - 1, lambda: ids

  def fetch(self, numbers: Sequence[int]) -> None:
    """They are there."""


class Planned:
  """Rows that are planned block by block: every host plans all, and makes its own.

  The state is the place where a block begins, and how many of its rows are given.
  """

  def __init__(self, draws: Draws, packer: plans.Packer, length: int, batch: int = 1):
    """`batch` rows are a step, to the weights of a mixture."""
    self._draws, self._packer, self._length, self._batch = draws, packer, length, batch
    self._places = np.arange(length, dtype=np.int32)
    self._go_on({"row": 0, "given": 0, **draws.get_state()})

  def take(self, count: int, kept: slice) -> list[Row]:
    rows = list(itertools.islice(iter(self._next, None), count))
    if not rows:
      raise StopIteration
    self._draws.fetch(rows[kept])
    return [self._made(spans) for spans in rows[kept]]

  def get_state(self) -> dict[str, Any]:
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    self._draws.set_state(state)
    self._go_on(state)

  def _go_on(self, state: dict[str, Any]) -> None:
    self._state = state
    self._block: list[list[Span]] | None = None
    self._begun: plans.Document | None = None

  def _next(self) -> Sequence[Span] | None:
    """The next row; None at the end."""
    if self._block is None:
      self._block = self._plan()
    given = self._state["given"]
    if given == len(self._block):
      return None
    self._state = {**self._state, "given": given + 1}
    row = self._block[given]
    if given + 1 == len(self._block):
      rest = self._begun
      after = {"row": self._state["row"] + given + 1, "given": 0, **self._draws.get_state()}
      if rest is not None:
        after["begun"] = [self._draws.feeds[rest.feed].name, rest.number, rest.begun]
      self._state, self._block = after, None
    return row

  def _plan(self) -> list[list[Span]]:
    if self._begun is None and "begun" in self._state:
      self._begun = self._draws.again(*self._state["begun"])
    first = self._state["row"]
    rows, self._begun = self._packer(self._draws, self._begun, self._length, first // self._batch)
    if isinstance(self._packer, plans.Fit) and self._packer.seed is not None:
      order = np.random.default_rng(self._packer.seed + first).permuted(range(len(rows)))
      rows = [rows[index] for index in order]
    return rows

  def _made(self, spans: Sequence[Span]) -> Row:
    """A row; where a document turns out to be damaged, padding."""
    row = np.zeros((len(COLUMNS), self._length), np.int32)
    at = 0
    for segment, span in enumerate(spans, 1):
      size = span.stop - span.start
      part = row[:, at : at + size]
      at += size
      try:
        ids = span.document.read()
      except Damaged as error:
        self._draws.budget.skip(error, span.document.number + 1, blanked=True)
        continue
      part[0], part[1] = ids[span.start : span.stop], ids[span.start + 1 : span.stop + 1]
      part[2], part[3] = segment, self._places[:size]
    return row


def _row(length: int, *columns: np.ndarray) -> Row:
  """Columns [n] -> a row, filled up with zeros."""
  row = np.zeros((len(COLUMNS), length), np.int32)
  for index, column in enumerate(columns):
    row[index, : column.size] = column
  return row


def _padded(ids: np.ndarray, length: int) -> Row:
  """One piece [n + 1] -> a row of its own."""
  size = len(ids) - 1
  return _row(length, ids[:-1], ids[1:], np.ones(size, np.int32), np.arange(size))
