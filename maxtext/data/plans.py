"""Which part of which document stands in which row, decided from lengths alone.

So a host knows of all rows what they hold, and fetches only what its own hold.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from maxtext.data.errors import Budget, Damaged
from maxtext.errors import DataError

BINS = 64  # rows that first_fit and best_fit fill at a time: not the batch, on which no row depends


@dataclasses.dataclass(frozen=True)
class Document:
  """The `number`-th document drawn from a feed, of which `pairs` tokens are to be predicted."""

  feed: int
  number: int
  pairs: int
  read: Callable[[], np.ndarray]  # -> [pairs + 1] int32; raises Damaged
  begun: int = 0  # so many pairs stand in rows already


@dataclasses.dataclass(frozen=True)
class Span:
  """Pairs `start` to `stop` of a document."""

  document: Document
  start: int
  stop: int


class Feed(Protocol):
  """Documents in the order they are drawn in, pass after pass."""

  name: str

  def __len__(self) -> int:
    """How many may be drawn."""

  def take(self, number: int) -> tuple[int, Callable[[], np.ndarray]]:
    """pairs and read of a document; raises Damaged where it is to be passed over."""

  def fetch(self, numbers: Sequence[int]) -> None:
    """Make ready for the `read` of these documents, which all belong to one batch."""


class Draws:
  """Documents of several feeds: a feed's share of those drawn is within one document of its weight.

  Without weights the feeds are drawn from one after the other. What is damaged is passed over
  within its feed, so that it changes no share.
  """

  def __init__(
    self,
    feeds: Sequence[Feed],
    weights: Callable[[int], Sequence[float]] | None = None,
    budget: Budget | None = None,
    most: int = sys.maxsize,
  ):
    """Documents are cut at `most` pairs."""
    self.feeds, self._weights, self._most = feeds, weights, most
    self.budget = budget or Budget()
    self._drawn = [0] * len(feeds)
    self._credit = [0.0] * len(feeds)

  def next(self, step: int) -> Document | None:
    """The next document, by the weights of a step; None from when a feed has no more, or, without
    weights, all have none.
    """
    left = [at for at, feed in enumerate(self.feeds) if self._drawn[at] < len(feed)]
    if not left or (self._weights is not None and len(left) < len(self.feeds)):
      return None
    if self._weights is None:
      at = left[0]
    else:
      self._credit = [sum(each) for each in zip(self._credit, self._weights(step))]
      at = self._credit.index(max(self._credit))
      self._credit[at] -= 1.0
    tried = 0
    while (number := self._drawn[at]) < len(self.feeds[at]):
      self._drawn[at] += 1
      try:
        return self._drawn_from(at, number)
      except Damaged as error:
        self.budget.skip(error, sum(self._drawn))
        tried += 1
        if tried > self.budget.documents:  # a pass and more: it would go on for ever
          name = self.feeds[at].name
          raise DataError(f"{name}: none of {tried} documents can be used; mend them") from None
    return self.next(step)

  def again(self, name: str, number: int, begun: int) -> Document:
    """A document that was drawn before, and has pairs left."""
    (at,) = (at for at, feed in enumerate(self.feeds) if feed.name == name)
    return self._drawn_from(at, number, begun)

  def _drawn_from(self, at: int, number: int, begun: int = 0) -> Document:
    pairs, read = self.feeds[at].take(number)
    return Document(at, number, min(pairs, self._most), read, begun)

  def fetch(self, rows: Sequence[Sequence[Span]]) -> None:
    """Make ready for the `read` of the documents of these rows."""
    documents = [span.document for row in rows for span in row]
    for at, feed in enumerate(self.feeds):
      feed.fetch([document.number for document in documents if document.feed == at])

  def get_state(self) -> dict[str, Any]:
    names = [feed.name for feed in self.feeds]
    state: dict[str, Any] = {"drawn": dict(zip(names, self._drawn))}
    if self._weights is not None:
      state["credit"] = dict(zip(names, self._credit))
    return state | ({"skipped": self.budget.skipped} if self.budget.skipped else {})

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises IndexError for more documents than there are."""
    self._drawn = [state["drawn"][feed.name] for feed in self.feeds]
    if any(drawn > len(feed) for drawn, feed in zip(self._drawn, self.feeds)):
      raise IndexError(self._drawn)
    self._credit = [state.get("credit", {}).get(feed.name, 0.0) for feed in self.feeds]
    self.budget.skipped = state.get("skipped", 0)


# The rows of a block, and the document that it has begun and not ended.
Block = tuple[list[list[Span]], Document | None]
# (draws, the document begun, length of rows, step) -> block; no rows when the documents end.
Packer = Callable[[Draws, Document | None, int, int], Block]


def alone(draws: Draws, begun: Document | None, length: int, step: int) -> Block:
  """A document, each piece of it in a row of its own."""
  document = begun or draws.next(step)
  if document is None:
    return [], None
  starts = range(document.begun, document.pairs, length)
  return [[Span(document, low, min(low + length, document.pairs))] for low in starts], None


def split(draws: Draws, begun: Document | None, length: int, step: int) -> Block:
  """A row of documents one after the other, cut where it is full."""
  spans: list[Span] = []
  while length and (document := begun or draws.next(step)):
    stop = min(document.begun + length, document.pairs)
    spans.append(Span(document, document.begun, stop))
    length -= stop - document.begun
    begun = dataclasses.replace(document, begun=stop) if stop < document.pairs else None
  return [spans] if spans else [], begun


@dataclasses.dataclass(frozen=True)
class Fit:
  """Pieces of documents where they fit, until one does not: the rows of Grain's packers."""

  best: bool  # into the row that it leaves least room in, else into the first
  segments: int | None = None  # most pieces in a row
  seed: int | None = None  # of the order of the rows; None: as they were begun

  def __call__(self, draws: Draws, begun: Document | None, length: int, step: int) -> Block:
    free, left = np.full(BINS, length), np.full(BINS, self.segments or sys.maxsize)
    rows: list[list[Span]] = [[] for _ in range(BINS)]
    while document := begun or draws.next(step):
      begun = None
      for low in range(document.begun, document.pairs, length):
        size = min(length, document.pairs - low)
        fits = (free >= size) & (left > 0)
        row = int(np.where(fits, free, length + 1).argmin() if self.best else fits.argmax())
        if not fits[row]:
          return rows, dataclasses.replace(document, begun=low)
        rows[row].append(Span(document, low, low + size))
        free[row] -= size
        left[row] -= 1
    return [row for row in rows if row], None
