"""One logger: process 0 speaks, the others only of errors."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

log = logging.getLogger("maxtext")


class _Lines(logging.Handler):
  """Writes each record as one line to what is standard output now, or to the sink of `above`.

  One that comes while another is being written, from a handler of signals, is written after it.
  """

  def __init__(self) -> None:
    super().__init__()
    self.sink: Callable[[str], None] | None = None
    self.broken = False
    self._waiting: list[str] = []
    self._writing = False

  def emit(self, record: logging.LogRecord) -> None:
    if self.broken:
      return
    self._waiting.append(self.format(record))
    if self._writing:
      return
    self._writing = True
    try:
      while self._waiting:
        line = self._waiting.pop(0)
        self._write(line)
    except OSError as error:  # no reader any more (`| head`), no space: neither ends a training
      self.broken = True
      with contextlib.suppress(OSError):
        print(f"standard output: {error.strerror}; the run goes on in silence", file=sys.stderr)
    except RuntimeError as error:  # a signal has interrupted others that write there
      if "reentrant" in str(error):
        self._waiting.insert(0, line)
      else:
        self.handleError(record)
    except Exception:
      self.handleError(record)
    finally:
      self._writing = False

  def _write(self, line: str) -> None:
    if self.sink is not None:
      self.sink(line)
    else:
      sys.stdout.write(line + "\n")
      sys.stdout.flush()


_lines = _Lines()


def start(process: int = 0, debug: bool = False) -> None:
  """Send the log to standard output, bare lines; processes above 0 report errors only."""
  _lines.setFormatter(logging.Formatter(f"[{process}] %(message)s" if process else "%(message)s"))
  _lines.broken = False
  log.handlers[:] = [_lines]
  log.propagate = False
  log.setLevel(logging.ERROR if process else logging.DEBUG if debug else logging.INFO)


def keep_native_off() -> None:
  """Leave standard output to Python: gloo greets each of its peers there, in C++."""
  sys.stdout.flush()
  sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def above(sink: Callable[[str], None]) -> Iterator[None]:
  """While inside, lines go to `sink`: what draws at the foot of a terminal prints them above."""
  before, _lines.sink = _lines.sink, sink
  try:
    yield
  finally:
    _lines.sink = before
