"""The one loop: fetch, step, and between steps whatever hooks are due."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from maxtext.training.phases import Phases
from maxtext.training.state import State
from maxtext.training.step import Batch

Step = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Done:
  """A finished step: its index, metrics as numbers, and its seconds, `data_wait` of them for data.

  What hooks take is not part of a step's time.
  """

  step: int
  metrics: dict[str, Any]
  seconds: float
  data_wait: float


class Hook(Protocol):
  """Something that needs the state between two steps: an evaluation, a checkpoint."""

  phase: str  # of PHASES, that it is

  def due(self, finished: int) -> bool:
    """Whether to run once `finished` steps are done."""

  def __call__(self, finished: int, state: State) -> bool:
    """Run; true ends the training."""


@dataclasses.dataclass(frozen=True)
class End:
  """Where a loop ended: the state, how many steps are finished, and why: 'steps', 'data', 'hook' or
  'stop'.
  """

  state: State
  finished: int
  why: str


def loop(
  step: Step,
  state: State,
  batches: Iterator[Batch],
  span: range,
  report: Callable[[Done], None],
  hooks: Sequence[Hook] = (),
  stop: Callable[[int], bool] = lambda finished: False,
  phases: Phases | None = None,
) -> End:
  """Run steps `span`; `report` hears of each once it is finished, in order.

  The next step is given to the device before the last one's numbers are fetched, so the device
  never waits for a log line. Before hooks run, everything is finished and reported. `stop` is asked
  once after each step.
  """
  phases = phases or Phases()
  mark = time.monotonic()  # when the step before was finished, and its hooks
  pending: tuple[int, dict[str, jax.Array], float] | None = None

  def settle() -> None:
    nonlocal pending, mark
    if pending is not None:
      (index, metrics, wait), pending = pending, None
      with phases.during("step", index):
        numbers = jax.device_get(metrics)
      before, mark = mark, time.monotonic()
      report(Done(index, numbers, mark - before, wait))

  for index in span:
    start = time.monotonic()
    with phases.during("data", index):
      batch = next(batches, None)
    if batch is None:
      settle()
      return End(state, index, "data")
    wait = time.monotonic() - start
    with phases.during("step", index):
      state, metrics = step(state, batch)
    settle()
    pending = index, metrics, wait
    finished = index + 1
    due = [hook for hook in hooks if hook.due(finished)]
    stopped = stop(finished)
    if due or stopped:
      settle()
      ended = []
      for hook in due:
        with phases.during(hook.phase, finished):
          ended.append(hook(finished, state))
      mark = time.monotonic()
      if stopped:
        return End(state, finished, "stop")
      if any(ended):
        return End(state, finished, "hook")
  settle()
  return End(state, span.stop, "steps")
