"""Sources -> tokens of documents in the order they are drawn in: here, or in worker processes.

The order is fixed before anything is read, so no number of workers changes it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from maxtext.data import prepared
from maxtext.data.errors import Damaged
from maxtext.data.kinds import given
from maxtext.data.records import Record
from maxtext.data.sections import Data
from maxtext.data.sources import Source
from maxtext.data.tokenizers import Tokenizer
from maxtext.errors import DataError, closest

CHUNK = 32  # documents that are read and tokenised at a time
Tokenised = list[np.ndarray | Damaged]


class Reader:
  """Tokens of the documents of sources, made by `grain_worker_count` processes if any."""

  def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, data: Data):
    self.sources, self._tokenizer, self._data = sources, tokenizer, data
    self.workers = data.grain_worker_count
    self._pool: ProcessPoolExecutor | None = None

  def submit(self, at: int, numbers: np.ndarray) -> Callable[[], Tokenised]:
    """Begin with documents of source `at`; what is returned waits for their tokens."""
    if not self.workers:
      return functools.cache(
        lambda: tokenised(self.sources[at], numbers, self._tokenizer, self._data)
      )
    if self._pool is None:
      self._pool = ProcessPoolExecutor(
        self.workers,
        multiprocessing.get_context("spawn"),
        _begin,
        (os.getpid(), self.sources, self._data),
      )
      weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
    return functools.partial(_result, self._pool.submit(_work, at, numbers))


def _result(future: Future[Tokenised]) -> Tokenised:
  try:
    return future.result()
  except BrokenProcessPool:
    raise DataError(
      "grain_worker_count: a worker process has ended, as it does when memory is short; "
      "start the run again, or set fewer workers"
    ) from None


_worker: tuple[Sequence[Source], Tokenizer, Data]


def _begin(parent: int, sources: Sequence[Source], data: Data) -> None:
  """Of a worker: it ends with its parent, whom signals are for."""
  global _worker
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  tokenizer = given(data)
  assert tokenizer is not None  # the section demands one
  _worker = sources, tokenizer, data


def _end_with(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(0.5)
  os._exit(0)


def _work(at: int, numbers: np.ndarray) -> Tokenised:
  sources, tokenizer, data = _worker
  return tokenised(sources[at], numbers, tokenizer, data)


def tokenised(source: Source, numbers: np.ndarray, tokenizer: Tokenizer, data: Data) -> Tokenised:
  """The ids of documents between bos and eos, or what is wrong with each."""
  found: Tokenised = []
  texts: list[str] = []
  places: list[int] = []
  files, rows = source.locate(numbers)
  for place, record in enumerate(source.read(numbers)):
    file = source.files[files[place]]
    try:
      if isinstance(record, Damaged):
        raise record
      content = _content(record, file.columns, tokenizer.vocab_size)
    except (Damaged, ValueError) as error:
      where = file.where(int(rows[place]))
      found.append(error if isinstance(error, Damaged) else Damaged(where, str(error)))
      continue
    if isinstance(content, str):
      texts.append(content)
      places.append(place)
    found.append(content if isinstance(content, np.ndarray) else np.zeros(0, np.int32))
  ids, lengths = tokenizer.encode_all(texts)
  ends = np.cumsum(lengths)
  before = np.array([tokenizer.bos] if data.add_bos else [], np.int32)
  after = np.array([tokenizer.eos] if data.add_eos else [], np.int32)
  for place, start, stop in zip(places, ends - lengths, ends):
    found[place] = np.concatenate([before, ids[start:stop], after])
  for place, each in enumerate(found):
    if isinstance(each, np.ndarray) and len(each) < 2:
      where = source.files[files[place]].where(int(rows[place]))
      found[place] = Damaged(where, "a single token, which leaves nothing to predict")
  return found


def _content(record: Record, columns: Sequence[str], vocab_size: int) -> str | np.ndarray:
  """What the columns of a document hold: texts, one below the other, or ids. Raises ValueError."""
  parts = []
  for column in columns:
    if column not in record:
      names = ", ".join(list(record)[:8]) or "none"
      hint = closest(column, record)
      raise ValueError(f"no column '{column}'{hint or ';'} set train_data_columns, of: {names}")
    value = record[column]
    if isinstance(value, bytes):
      try:
        value = value.decode()
      except UnicodeDecodeError as error:
        byte, at = value[error.start], error.start
        raise ValueError(f"'{column}': byte 0x{byte:02x} at {at} is not UTF-8") from None
    if isinstance(value, list) and len(columns) == 1:
      return _ids(value, column, vocab_size)
    if not isinstance(value, str):
      raise ValueError(f"'{column}' is a {type(value).__name__}, not text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
      raise ValueError(f"'{column}' has half of a surrogate pair, which no UTF-8 can hold")
    parts.append(value)
  text = "\n".join(parts)
  if not text.strip():
    raise ValueError("the document is empty")
  return text


def _ids(value: list, column: str, vocab_size: int) -> np.ndarray:
  if not all(type(each) is int and 0 <= each < vocab_size for each in value):
    raise ValueError(f"'{column}' is a list, and not of ids from 0 to {vocab_size - 1}")
  return np.array(value, np.int32)


class SourceFeed:
  """Documents of a source, pass after pass, each in another order if there is a seed."""

  def __init__(self, reader: Reader, at: int, seed: int | None, epochs: int | None):
    self._reader, self._at, self._seed, self._epochs = reader, at, seed, epochs
    self._source = reader.sources[at]
    self.name = self._source.name
    self._order = functools.lru_cache(maxsize=2)(self._permutation)
    self._chunks: dict[int, Callable[[], Tokenised]] = {}
    self._held: dict[int, np.ndarray | Damaged] = {}

  def __len__(self) -> int:
    return sys.maxsize if self._epochs is None else self._epochs * len(self._source)

  def take(self, number: int) -> tuple[int, Callable[[], np.ndarray]]:
    """pairs and read of a document; raises Damaged where it is to be passed over."""
    if self._source.index is not None:
      return self._prepared(number)
    chunk, place = divmod(number, CHUNK)
    for old in [old for old in self._chunks if old < chunk or old > chunk + self._ahead]:
      del self._chunks[old]
    for next in range(chunk, chunk + 1 + self._ahead):
      if next not in self._chunks and next * CHUNK < len(self):
        self._chunks[next] = self._reader.submit(self._at, self._numbers(next))
    ids = self._chunks[chunk]()[place]
    if isinstance(ids, Damaged):
      raise ids
    return len(ids) - 1, lambda: ids

  @property
  def _ahead(self) -> int:
    return 2 * self._reader.workers

  def _numbers(self, chunk: int) -> np.ndarray:
    """Which documents of the source a chunk of draws is."""
    draws = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self)))
    return np.array([self._place(number) for number in draws])

  def _place(self, number: int) -> int:
    """Which document of the source a draw is."""
    epoch, place = divmod(number, len(self._source))
    return int(self._order(epoch)[place])

  def _permutation(self, epoch: int) -> np.ndarray:
    if self._seed is None:
      return np.arange(len(self._source))
    return self._source.order(self._seed << 32 | epoch)

  def _prepared(self, number: int) -> tuple[int, Callable[[], np.ndarray]]:
    place, index = self._place(number), self._source.index
    assert index is not None
    length = int(index[self._source.kept[place], 0])
    if length < 2:
      raise Damaged(self._source.where(place), "a single token, which leaves nothing to predict")
    return length - 1, functools.partial(self._fetched, number)

  def _fetched(self, number: int) -> np.ndarray:
    if number not in self._held:
      self.fetch([number])
    ids = self._held[number]
    if isinstance(ids, Damaged):
      raise ids
    return ids

  def fetch(self, numbers: Sequence[int]) -> None:
    """Read prepared documents that are about to be asked for, all at once; forget the others."""
    self._held = {number: self._held[number] for number in numbers if number in self._held}
    wanted = [number for number in dict.fromkeys(numbers) if number not in self._held]
    if self._source.index is None or not wanted:
      return
    places = np.array([self._place(number) for number in wanted])
    said = self._source.index[self._source.kept[places]].tolist()
    for number, (length, crc), record in zip(wanted, said, self._source.read(places)):
      where = functools.partial(self._source.where, self._place(number))
      self._held[number] = prepared.tokens(record, length, crc, where)
