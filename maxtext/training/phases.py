"""What a run is at, and where its time has gone."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator

PHASES = ("compile", "data", "step", "checkpoint", "eval", "idle")
LATELY = 50  # durations of a phase that are remembered


@dataclasses.dataclass(frozen=True)
class Phase:
  """One of PHASES, the step that it belongs to (-1: none), and its begin by time.monotonic()."""

  name: str
  step: int
  since: float


class Phases:
  """A clock that is in one phase at a time: from `started` on in 'compile', which is all that comes
  before the first step. Only the thread that trains moves it; others may look.
  """

  def __init__(self, started: float | None = None):
    self.now = Phase("compile", -1, time.monotonic() if started is None else started)
    self.lately = {name: collections.deque[float](maxlen=LATELY) for name in PHASES}
    self.counts = dict.fromkeys(PHASES, 0)
    self._seconds = dict.fromkeys(PHASES, 0.0)

  @contextlib.contextmanager
  def during(self, name: str, step: int = -1) -> Iterator[None]:
    """Inside, the run is in this phase, then in the one before again."""
    before = self._move(name, step)
    since = self.now.since
    try:
      yield
    finally:
      self._move(before.name, before.step)
      self.lately[name].append(self.now.since - since)
      self.counts[name] += 1

  def seconds(self) -> dict[str, float]:
    """The seconds of each phase so far; together all that have passed."""
    now = self.now
    passed = {now.name: self._seconds[now.name] + time.monotonic() - now.since}
    return self._seconds | passed

  def line(self, goodput: float, lost: float = 0.0) -> str:
    """Where the time went, the largest parts first; `goodput` is the share of it that has trained,
    `lost` the seconds of steps from before the run went back.
    """
    seconds = self.seconds()
    whole = max(sum(seconds.values()), 1e-9)
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name} {part / whole:.1%}" for name, part in parts if part / whole >= 5e-4)
    back = f", {lost:.1f} s lost by going back" if lost else ""
    return f"time: {whole:.1f} s, of which {shares}; goodput {goodput:.1%}{back}"

  def _move(self, name: str, step: int) -> Phase:
    """Go on in another phase; returns the one that was left."""
    before, now = self.now, time.monotonic()
    self._seconds[before.name] += now - before.since
    self.now = Phase(name, step, now)
    return before
