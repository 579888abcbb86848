"""What happens between steps: evaluations, checkpoints, histograms."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any

import jax

from maxtext import hosts
from maxtext.checkpoints.manager import Checkpoints
from maxtext.log import log
from maxtext.training.metrics import Metrics, due, eval_scalars, format_eval
from maxtext.training.progress import Progress
from maxtext.training.sections import Eval, Observe
from maxtext.training.state import Params, State, tree
from maxtext.training.step import Batch


def average(
  evaluate: Callable[[Params, Batch], dict[str, Any]], params: Params, batches: Iterable[Batch]
) -> dict[str, float]:
  """The scalars of an evaluation of all `batches`."""
  sums = [evaluate(params, batch)["lm_loss"] for batch in batches]
  entropy = jax.device_get(reduce(add, sums))
  return eval_scalars(entropy.total, entropy.weight)


@dataclasses.dataclass
class Evaluate:
  """Every `eval_interval` steps and after the last: the loss on held-out text, and a sample of
  text.

  `batches` opens one pass over the held-out batches; `write` makes the sample. True, to end the
  training, once the loss reaches `target_eval_loss`.
  """

  section: Eval
  steps: int
  evaluate: Callable[[Params, Batch], dict[str, Any]]
  batches: Callable[[], Iterable[Batch]]
  write: Callable[[Params], str] | None
  metrics: Metrics
  progress: Progress
  last: float | None = None  # the newest average loss
  at: int = -1  # the number of finished steps that it belongs to
  phase: str = "eval"

  def due(self, finished: int) -> bool:
    interval = self.section.eval_interval
    return interval > 0 and (finished % interval == 0 or finished == self.steps)

  def __call__(self, finished: int, state: State) -> bool:
    with self.progress.doing("evaluating"):
      scalars = average(self.evaluate, state.params, self.batches())
      sample = self.write(state.params) if self.write is not None else ""
    self.last, self.at = scalars["eval/avg_loss"], finished
    log.info(format_eval(finished - 1, scalars))
    self.metrics.scalars(finished - 1, scalars)
    if sample:
      self.metrics.text(finished - 1, "sample", sample)
    target = self.section.target_eval_loss
    if target and self.last <= target:
      log.info(f"target_eval_loss={target:g} is reached after {finished} steps")
      return True
    return False


@dataclasses.dataclass
class Save:
  """Every `period` steps, or where that is 0 whenever no save is under way: the state, and beside
  it what `beside` says after so many steps.
  """

  checkpoints: Checkpoints
  period: int
  beside: Callable[[int], dict[str, Any]]
  saved: int = -1  # the newest step that was given to be saved
  waited: float = 0.0
  phase: str = "checkpoint"

  def due(self, finished: int) -> bool:
    if self.period:
      return finished % self.period == 0
    return all(hosts.each(self.checkpoints.under_way is None))

  def __call__(self, finished: int, state: State) -> bool:
    if finished != self.saved:
      begun = time.monotonic()
      self.checkpoints.save(finished, tree(state), self.beside(finished), force=True)
      self.saved = finished
      self.waited += time.monotonic() - begun
    return False

  def wait(self) -> float:
    """The seconds that training stood still for saves since this was last asked."""
    waited, self.waited = self.waited, 0.0
    return waited


@dataclasses.dataclass
class Histograms:
  """At every step that has a line: the distribution of each parameter."""

  metrics: Metrics
  section: Observe
  steps: int
  phase: str = "idle"

  def due(self, finished: int) -> bool:
    return due(finished - 1, self.section, self.steps)

  def __call__(self, finished: int, state: State) -> bool:
    self.metrics.histograms(finished - 1, {f"params/{name}": x for name, x in state.params.items()})
    return False
