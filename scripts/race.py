"""Interleaved timing: contestants take turns, so that a busy machine is as busy for each."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass
class Laps:
  """Wall and CPU seconds of a contestant's laps; CPU seconds are those of all its threads."""

  wall: list[float] = dataclasses.field(default_factory=list)
  cpu: list[float] = dataclasses.field(default_factory=list)

  def over(self, other: Laps, kind: str) -> float:
    """The median over rounds of this one's seconds by the other's in the same round."""
    pairs = zip(getattr(self, kind), getattr(other, kind), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def race(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Laps]:
  """Let each contestant run once per round, and once before to warm up; each returns when done."""
  laps = {name: Laps() for name in contestants}
  for lap in contestants.values():
    lap()
  for turn in range(rounds):
    names = list(contestants)
    for name in names if turn % 2 else reversed(names):
      wall, cpu = time.perf_counter(), time.process_time()
      contestants[name]()
      laps[name].wall.append(time.perf_counter() - wall)
      laps[name].cpu.append(time.process_time() - cpu)
  return laps
