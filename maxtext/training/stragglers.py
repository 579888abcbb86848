"""Which of several processes keeps the others waiting, by what each of them does between steps."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from collections.abc import Iterator, Mapping
from typing import Self

from maxtext import hosts
from maxtext.log import log
from maxtext.training.phases import PHASES, Phases

WINDOW = 30.0  # seconds that are compared
SHARE = 0.1  # of a step's time that is worth a line
OWN = tuple(name for name in PHASES if name not in ("compile", "step"))


class Stragglers:
  """A thread of each process that puts its seconds a step on the board; process 0 compares them.

  The step itself is no part: in it all wait for the slowest.
  """

  def __init__(self, phases: Phases, wanted: bool):
    self._phases, self._wanted = phases, wanted and not hosts.alone()
    self._over = threading.Event()
    self._steps, self._before = 0, phases.seconds()

  def __enter__(self) -> Self:
    if self._wanted:
      threading.Thread(target=self._run, name="stragglers", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()

  def _run(self) -> None:
    with contextlib.suppress(RuntimeError):  # process 0 is gone, which is said elsewhere
      while not self._over.wait(WINDOW):
        seconds, steps = self._phases.seconds(), self._phases.counts["data"]
        if count := steps - self._steps:
          own = {name: (seconds[name] - self._before[name]) / count for name in PHASES}
          board = hosts.board("pace", json.dumps(own))
          if hosts.is_first():
            for line in slow({process: json.loads(said) for process, said in board.items()}):
              log.warning(line)
        self._steps, self._before = steps, seconds


def slow(paces: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
  """A line for each process that is, by its seconds a step in some phase, above all others."""
  whole = statistics.median(sum(pace.values()) for pace in paces.values())
  for name in OWN:
    for process, pace in paces.items():
      others = [other[name] for number, other in paces.items() if number != process]
      if others and pace[name] - max(others) > SHARE * whole:
        middle = statistics.median(others)
        yield (
          f"{hosts.named(process)} takes {pace[name]:.3f} s a step for {name}, the others "
          f"{middle:.3f}: {(pace[name] - middle) / whole:.0%} of a step's time"
        )
