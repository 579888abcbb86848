"""Items made in a thread before they are asked for, and the state after the last one taken."""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any, Protocol


class Source(Protocol):
  """An iterator that can say, and be told, where it stands."""

  def __next__(self) -> Any: ...

  def get_state(self) -> dict[str, Any]:
    """The state after the last item: a value of its own, that going on does not change."""

  def set_state(self, state: dict[str, Any]) -> None: ...


class Ahead:
  """`source` read ahead by up to `size` items, for one thread to take them.

  The thread is joined by `close`, when the object is forgotten, and before the interpreter ends: a
  thread that is then inside C++ code takes the whole process down.
  """

  def __init__(self, source: Source, size: int):
    self._source, self._size = source, size
    self._state = source.get_state()
    self._worker: _Worker | None = None

  def __next__(self) -> Any:
    if self._worker is None:
      self._worker = _Worker(self._source, self._size)
      self._forgotten = weakref.finalize(self, self._worker.end)
    item, state, error = self._worker.made.get()
    if error is not None:
      self.close()
      raise error
    self._state = state
    return item

  def get_state(self) -> dict[str, Any]:
    """The source's state after the last item that was taken from here."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    self.close()
    self._source.set_state(state)
    self._state = state

  def close(self) -> None:
    """End the thread and forget what it has made ahead; the next item is made again."""
    if self._worker is not None:
      self._forgotten()
      self._worker = None
      self._source.set_state(self._state)


class _Worker:
  """The thread, which knows nothing of its owner, so that the owner can be forgotten."""

  def __init__(self, source: Source, size: int):
    self.made: queue.Queue[tuple[Any, Any, Exception | None]] = queue.Queue(size)
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=_fill, args=(source, self.made, self._stop), name="batches", daemon=True
    )
    self._thread.start()

  def end(self) -> None:
    self._stop.set()
    while self._thread.is_alive() and self._thread is not threading.current_thread():
      try:
        self.made.get_nowait()  # it may be waiting for room
      except queue.Empty:
        self._thread.join(0.01)


def _fill(source: Source, made: queue.Queue, stop: threading.Event) -> None:
  try:
    while not stop.is_set():
      item = next(source)
      made.put((item, source.get_state(), None))
  except Exception as error:  # raised again where the item is asked for, StopIteration too
    made.put((None, None, error))
