"""Files whose records can be had in any order: ArrayRecord, Parquet, Arrow, JSON lines, text."""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maxtext.data import examples
from maxtext.data.errors import Damaged, brief
from maxtext.errors import DataError, closest

Record = dict[str, Any]  # a column's value: text, bytes, or a list of token ids
EDGE = 2**16  # bytes at a file's begin and end that tell it from another of its size
FAILURES = (OSError, ValueError, RuntimeError, LookupError, MemoryError, OverflowError)
HELD = 4  # groups of rows that are kept decoded


class File(abc.ABC):
  """A file of `count` records. Each process opens it for itself; copies of it are small."""

  unit = "record"
  group_sizes: Sequence[int] = ()  # where records are decoded a group at a time: their sizes
  far = True  # whether records of far groups are had as fast as those of one

  def __init__(self, path: str, shown: str, columns: Sequence[str]):
    """`path` is local, `shown` how messages name it. Raises DataError for what is no such file."""
    self.path, self.shown, self.columns = path, shown, tuple(columns)
    try:
      self.stamp = self._stamp()
      self.count = self._open()
    except OSError as error:
      raise DataError(f"{shown}: cannot be read: {error.strerror or brief(error)}") from None

  def digest(self) -> str:
    """Tells the file from others: of its name, its size, its first and its last bytes."""
    total = hashlib.sha256(f"{os.path.basename(self.shown)} {self.count} {self.stamp[0]}".encode())
    with open(self.path, "rb") as file:
      total.update(file.read(EDGE))
      file.seek(max(0, self.stamp[0] - EDGE))
      total.update(file.read(EDGE))
    return total.hexdigest()

  def where(self, row: int) -> str:
    return f"{self.shown}: {self.unit} {row}"

  def read(self, rows: Sequence[int]) -> list[Record | Damaged]:
    """The records of these rows, or what is wrong with each."""
    problem = ""
    try:
      if self._stamp() != self.stamp:
        problem = "the file is not the one that was opened: it was replaced or written to"
    except OSError as error:
      problem = f"the file cannot be read any more: {error.strerror}"
    if problem:
      return [Damaged(self.where(row), problem) for row in rows]
    return self._records(rows)

  def _records(self, rows: Sequence[int]) -> list[Record | Damaged]:
    return [self._tried(row, self._row, row) for row in rows]

  def _tried(self, row: int, made: Callable[[Any], Record], of: Any) -> Record | Damaged:
    try:
      return made(of)
    except FAILURES as error:
      return Damaged(self.where(row), brief(error))

  def _stamp(self) -> tuple[int, int, int]:
    stat = os.stat(self.path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino

  @abc.abstractmethod
  def _open(self) -> int:
    """Look at the file; how many records it has. Raises OSError or DataError."""

  @abc.abstractmethod
  def _row(self, row: int) -> Record:
    """A record. Raises some of FAILURES."""

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name != "_handle"}


class ArrayRecords(File):
  """Records of bytes, read as Grain reads them: JSON, tf.Example, or, if `raw`, what they are."""

  raw = False

  def _open(self) -> int:
    try:
      reader = self._reader()
      count = int(reader.num_records())
      reader.close()  # raises where it is none
      return count
    except RuntimeError as error:
      raise DataError(f"{self.shown}: is no whole ArrayRecord file: {brief(error)}") from None

  def _reader(self) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(self.path, "readahead_buffer_size:0", file_reader_buffer_size=2**15)

  @functools.cached_property
  def _handle(self) -> Any:
    return self._reader()

  def _records(self, rows: Sequence[int]) -> list[Record | Damaged]:
    """All in one call, which takes a fraction of the time; one that is damaged fails them all."""
    try:
      found = self._handle.read(rows)
    except FAILURES:
      return super()._records(rows)
    return [self._tried(row, self._decoded, record) for row, record in zip(rows, found)]

  def _row(self, row: int) -> Record:
    return self._decoded(self._handle.read([row])[0])

  def _decoded(self, record: bytes) -> Record:
    return {"record": record} if self.raw else examples.columns(record)


class Lines(File):
  """A JSON object a line."""

  unit = "line"

  def where(self, row: int) -> str:
    return f"{self.shown}:{row + 1} (byte {self._starts[row]})"

  def _open(self) -> int:
    starts, at = [np.zeros(1, np.int64)], 0
    with open(self.path, "rb") as file:
      while block := file.read(2**24):
        starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at + 1)
        at += len(block)
    found = np.concatenate(starts)
    self._starts = found if found[-1] == at else np.append(found, at)
    count = len(self._starts) - 1
    while count and not self._line(count - 1).strip():
      count -= 1
    return count

  @functools.cached_property
  def _handle(self) -> Any:
    return open(self.path, "rb")

  def _line(self, row: int) -> bytes:
    start, stop = self._starts[row : row + 2].tolist()
    self._handle.seek(start)
    return self._handle.read(stop - start)

  def _row(self, row: int) -> Record:
    line = self._line(row)
    line = line.removeprefix(b"\xef\xbb\xbf") if row == 0 else line
    if not line.strip():
      raise ValueError("the line is empty")
    return examples.columns(line.strip())


class Text(File):
  """A document of text, whatever the columns are called."""

  unit = "document"

  def _open(self) -> int:
    return 1

  def _row(self, row: int) -> Record:
    with open(self.path, "rb") as file:
      return {self.columns[0]: file.read().removeprefix(b"\xef\xbb\xbf")}


class Groups(File):
  """Rows of columns that are read a group at a time."""

  unit = "row"

  def _open(self) -> int:
    arrow = package("pyarrow", "Parquet and Arrow files")
    try:
      names = self._look()
    except (OSError, ValueError, arrow.ArrowException) as error:
      raise DataError(f"{self.shown}: is no whole {self.kind} file: {brief(error)}") from None
    for column in self.columns:
      if column not in names:
        listed = ", ".join(list(names)[:8])
        hint = closest(column, names)
        raise DataError(
          f"{self.shown}: no column '{column}'{hint or ';'} "
          f"set train_data_columns or eval_data_columns to some of: {listed}"
        )
    self._firsts = np.cumsum([0, *self.group_sizes])
    return int(self._firsts[-1])

  kind = ""

  @abc.abstractmethod
  def _look(self) -> Sequence[str]:
    """Sets `group_sizes`; the names of the columns."""

  def _row(self, row: int) -> Record:
    group = int(self._firsts.searchsorted(row, side="right")) - 1
    try:
      table = self._held(group)
      return {name: table[name][row - int(self._firsts[group])].as_py() for name in self.columns}
    except package("pyarrow", "").ArrowException as error:
      raise ValueError(brief(error)) from None

  @abc.abstractmethod
  def _held(self, number: int) -> Any:
    """A group, as a table of the columns."""


class Parquet(Groups):
  kind = "Parquet"
  far = False

  def _look(self) -> Sequence[str]:
    with self._parquet() as file:
      meta = file.metadata
      self.group_sizes = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]
      if min(self.group_sizes, default=0) < 0 or sum(self.group_sizes) != meta.num_rows:
        raise ValueError("its groups do not have the rows that the file has")
      return file.schema_arrow.names

  def _held(self, number: int) -> Any:
    """A group, of which the last few are kept, or what is wrong with it."""
    if number not in self._handle:
      while len(self._handle) >= HELD:
        del self._handle[next(iter(self._handle))]
      self._handle[number] = self._group(number)
    if isinstance(self._handle[number], Exception):
      raise self._handle[number]
    return self._handle[number]

  @functools.cached_property
  def _handle(self) -> dict[int, Any]:
    return {}

  def _group(self, number: int) -> Any:
    try:
      with self._parquet() as file:
        table = file.read_row_group(number, columns=list(self.columns), use_threads=False)
    except (OSError, package("pyarrow", "").ArrowException) as error:
      return ValueError(f"group {number} of the file: {brief(error)}")
    if table.num_rows != self.group_sizes[number]:
      return ValueError(f"group {number} has {table.num_rows} rows, not those that the file says")
    return table

  def _parquet(self) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(self.path, page_checksum_verification=True)


class Arrow(Groups):
  """What `datasets` saves: a stream of record batches, or a file of them."""

  kind = "Arrow"

  def _look(self) -> Sequence[str]:
    batches, names = self._batches()
    self.group_sizes = [batch.num_rows for batch in batches]
    return names

  def _held(self, number: int) -> Any:
    batches, sound = self._handle
    if number not in sound:  # damaged offsets would be followed out of the file
      batches[number].validate(full=True)
      sound.add(number)
    return batches[number]

  @functools.cached_property
  def _handle(self) -> tuple[list[Any], set[int]]:
    return self._batches()[0], set()

  def _batches(self) -> tuple[list[Any], Sequence[str]]:
    import pyarrow

    source = pyarrow.memory_map(self.path)
    whole = pyarrow.ipc.open_file if source.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
    source.seek(0)
    reader = whole(source)
    if hasattr(reader, "get_batch"):
      return [reader.get_batch(n) for n in range(reader.num_record_batches)], reader.schema.names
    return list(reader), reader.schema.names


KINDS: dict[str, type[File]] = {
  "arrayrecord": ArrayRecords,
  "parquet": Parquet,
  "arrow": Arrow,
  "jsonl": Lines,
  "text": Text,
}
ENDINGS = {
  r"\.(array_?record|riegeli|arecord)(-\d+-of-\d+)?": "arrayrecord",
  r"\.parquet": "parquet",
  r"\.arrow": "arrow",
  r"\.jsonl?": "jsonl",
  r"\.(txt|md|py)": "text",
}


def kind_of(name: str) -> str | None:
  """The kind of file that a name says."""
  return next((kind for end, kind in ENDINGS.items() if re.search(end + "$", name)), None)


def package(name: str, what: str) -> Any:
  """A package that only some data need. Raises DataError where it is missing."""
  try:
    return importlib.import_module(name)
  except ImportError:
    raise DataError(
      f"{what} need the package {name}, which is not installed; pip install {name}"
    ) from None
