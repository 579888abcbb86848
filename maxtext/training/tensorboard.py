"""TensorBoard event files, written by a thread: neither the import nor the disk delays a step."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maxtext.errors import ConfigError
from maxtext.log import log
from maxtext.training.histograms import EDGES, Histogram

Job = Callable[[], None] | threading.Event  # something to write, or somebody who waits for a flush

PATIENCE = 30.0  # seconds that flush and close wait for a disk that hangs
INTERVAL = 10.0  # seconds after which a curve that is being watched goes on, if there are steps
PAGE = 110  # columns of text that fit beside TensorBoard's list of runs


class Events:
  """One process's event file in `folder`, holding a run from `first_step` on.

  Raises ConfigError without tensorboardX, OSError when the folder cannot be written. What fails
  later is logged once; from then on events are dropped, until a new file can be written.
  """

  def __init__(self, folder: Path, first_step: int):
    if importlib.util.find_spec("tensorboardX") is None:
      problem = "true, but tensorboardX is not installed; install it, or set this to false"
      raise ConfigError("enable_tensorboard", problem)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
      raise PermissionError(13, "Permission denied", str(folder))
    self._folder, self._first_step = folder, first_step
    self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    self._flushed = self._failed = -INTERVAL
    self._writer: Any = None
    self._suffix = ""  # what the name of its file ends with
    self._down = False  # since something failed
    self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
    self._thread.start()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    now, values = time.time(), dict(values)
    self._jobs.put(lambda: self._add(step, now, self._scalars(values)))

  def text(self, step: int, tag: str, text: str) -> None:
    """`text` as it stands, its long lines folded: a code block, so that nothing in it is markup."""
    now, block = time.time(), "".join(f"    {line}\n" for line in _folded(text))
    self._jobs.put(lambda: self._add(step, now, self._text(tag, block)))

  def histograms(self, step: int, counted: Mapping[str, Histogram]) -> None:
    now = time.time()
    self._jobs.put(lambda: self._add(step, now, *map(self._histogram, counted, counted.values())))

  def hparams(self, values: Mapping[str, Any]) -> None:
    """The run's hyperparameters, in the run's own file: an extra run would clutter every tab."""
    now, values = time.time(), {name: _plain(value) for name, value in values.items()}
    self._jobs.put(lambda: self._add(0, now, self._summary.hparams(values, {})[1]))

  def flush(self) -> None:
    """Return when all events so far are on the disk."""
    done = threading.Event()
    self._jobs.put(done)
    if not done.wait(PATIENCE):
      log.error(f"{self._folder}: no answer from the disk in {PATIENCE:.0f} s; the run goes on")

  def close(self, failed: bool) -> None:
    """Mark the session's end unless it failed, flush and stop the thread."""
    if not failed:
      now = time.time()
      self._jobs.put(lambda: self._add(0, now, self._summary.hparams({}, {})[2]))
    self._jobs.put(None)
    self._thread.join(PATIENCE)

  def _run(self) -> None:
    """The thread: write what comes; what fails, whatever it is, leaves nobody waiting unheard."""
    while (job := self._jobs.get()) is not None:
      try:
        if self._writer is not None or time.monotonic() >= self._failed + INTERVAL:
          self._do(job)
      except Exception as error:
        self._fail(error)
      finally:
        if isinstance(job, threading.Event):
          job.set()
    try:
      if self._writer is not None:
        self._writer.close()
    except Exception as error:
      self._fail(error)

  def _fail(self, error: Exception) -> None:
    """Give up this file, and delete it where it was only an attempt to go on after a failure."""
    if self._down and self._suffix:
      for path in self._folder.glob(f"*{self._suffix}"):
        with contextlib.suppress(OSError):
          path.unlink()
    else:
      reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
      log.error(f"{self._folder}: {reason}; the run goes on without TensorBoard")
    self._writer, self._suffix, self._down = None, "", True
    self._failed = time.monotonic()

  def _open(self) -> None:
    """A new event file, after all earlier ones; a process's first takes back their events from
    `first_step` on.
    """
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

    self._summary, self._event, self._values = summary, event_pb2.Event, summary_pb2.Summary
    # two starts in one second must not share a file
    self._suffix = f".{time.time_ns() % 10**9:09d}"
    self._writer = EventsWriter(str(self._folder / "events"), self._suffix)
    if self._down:
      self._writer.flush()
      self._down = False
      log.error(f"{self._folder}: written again")
    else:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      event = self._event(wall_time=time.time(), step=self._first_step, session_log=start)
      self._writer.write_event(event)

  def _do(self, job: Job) -> None:
    if self._writer is None:
      self._open()
    if not isinstance(job, threading.Event):
      job()
    if isinstance(job, threading.Event) or time.monotonic() > self._flushed + INTERVAL:
      self._writer.flush()
      self._flushed = time.monotonic()

  def _add(self, step: int, now: float, *summaries: Any) -> None:
    """One event of the values of all summaries."""
    event = self._event(wall_time=now, step=step)
    for one in summaries:
      event.summary.value.extend(one.value)
    self._writer.write_event(event)

  def _scalars(self, values: Mapping[str, float]) -> Any:
    """One summary of many values: a step is one record."""
    value = self._values.Value
    return self._values(
      value=[value(tag=tag, simple_value=number) for tag, number in values.items()]
    )

  def _text(self, tag: str, markdown: str) -> Any:
    one = self._summary.text(tag, markdown)
    one.value[0].tag = tag  # without the '/text_summary' that tensorboardX appends
    return one

  def _histogram(self, name: str, counted: Histogram) -> Any:
    """The buckets between the least and the most value, and an empty one to their left."""
    size, least, most, total, squares = (float(part) for part in counted[1:])
    if not size:
      return self._values()
    counts = np.diff(np.asarray(counted.at_most, np.float64), prepend=0.0, append=size)
    first, last = np.flatnonzero(counts)[[0, -1]]
    buckets = [0.0, *counts[first : last + 1].tolist()]
    limits = [least, *EDGES[first:last].tolist(), most]
    return self._summary.histogram_raw(name, least, most, size, total, squares, limits, buckets)


def _folded(text: str) -> Iterator[str]:
  """The lines of `text`, none wider than TensorBoard's page."""
  for line in text.splitlines():
    yield from textwrap.wrap(line, PAGE, expand_tabs=False, replace_whitespace=False) or [""]


def _plain(value: Any) -> bool | int | float | str:
  """A value that HParams can hold: lists and mappings as JSON, nothing as 'null'."""
  return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
