"""Steps that were not applied: what is written of them, and where the run goes on afterwards."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maxtext import hosts
from maxtext.checkpoints.manager import Checkpoints
from maxtext.errors import CheckpointError, Diverged
from maxtext.log import log
from maxtext.training.guardian import JUDGED, Guard
from maxtext.training.loop import Done
from maxtext.training.metrics_file import number
from maxtext.training.sections import Training

RECORD, FOLDER = "rollback.json", "incidents"  # in a run's folder
RECENT = 100  # steps before an incident that are written down with it


class Rollback(Exception):
  """The run goes on from an earlier checkpoint; which, its folder says."""


@dataclasses.dataclass(frozen=True)
class Past:
  """How often a run has gone back, the last time to `checkpoint`; since then step n has the data's
  batch n + `passed`.
  """

  checkpoint: int = -1
  passed: int = 0
  count: int = 0


@dataclasses.dataclass
class Incidents:
  """Of the run in `folder`; all its processes make the same calls.

  What a checkpoint says beside the state has `facts` among the `key` part, and `seeds` are written
  down with every incident.
  """

  folder: Path
  section: Training
  guard: Guard | None
  parameters: Mapping[str, Any]  # by name, with shapes
  seeds: Mapping[str, Any]
  checkpoints: Checkpoints | None
  key: str
  past: Past = Past()

  def __post_init__(self) -> None:
    self._recent: collections.deque[tuple] = collections.deque(maxlen=RECENT)
    self._batches: collections.deque[tuple[int, Mapping]] = collections.deque(maxlen=2)

  def seeing(self, batches: Iterable[Mapping], first: int) -> Iterator[Mapping]:
    """The same batches, of steps from `first` on; the last two are kept, for them to be named."""
    self._batches.clear()
    self._recent.clear()
    for step, batch in enumerate(batches, first):
      self._batches.append((step, batch))
      yield batch

  def heard(self, done: Done) -> None:
    """Of every finished step in turn. Raises Rollback or Diverged where the run cannot go on."""
    loss, norm = (float(done.metrics[name]) for name in ("loss", "raw_grad_norm"))
    self._recent.append((done.step, number(loss), number(norm)))
    if done.metrics["ok"]:
      return
    kind = "spike"
    if not math.isfinite(loss + norm):
      kind = "nan" if math.isnan(loss) or math.isnan(norm) else "infinite"
    judged = dict(zip(JUDGED, map(float, done.metrics.get("judged", ()))))
    what = f"step {done.step}: loss {loss:g}, gradient norm {norm:g}"
    if kind == "spike":
      scores = " and ".join(f"{judged[name]:.1f}" for name in JUDGED[:2])
      what += f", {scores} deviations above the median"
    section = self.section
    stops = {"nan": section.abort_on_nan_loss, "infinite": section.abort_on_inf_loss}
    limit, skips = section.skip_step_limit, int(judged.get("skips", 0))
    ends = stops.get(kind, False) or skips > limit
    target = self._target(done.step) if ends else None
    verdict = ("stopped" if target is None else "rolled back") if ends else "skipped"
    path = self._write(done, kind, verdict, judged)
    if target is not None:
      self._go_back(done.step, target, what)
    if not ends:
      window = f"{skips} of at most {limit} in {section.skip_step_interval} steps"
      log.warning(f"{what}: skipped, {window}; see {path}")
      return
    newest = self.checkpoints.newest() if self.checkpoints is not None else None
    kept = "no checkpoint was saved"
    if newest is not None:
      kept = f"the newest checkpoint is after step {newest - 1}"
    raise Diverged(f"{what}; it was not applied, {kept}; see {path}")

  def newest(self) -> int | None:
    """The newest checkpoint that the run has not gone back behind; those are deleted."""
    assert self.checkpoints is not None
    past = self._read()
    while (newest := self.checkpoints.newest()) is not None and newest > past.checkpoint:
      if self._of(self.checkpoints.extra(newest)).count >= past.count:
        break
      self.checkpoints.drop(newest)
    return newest

  def resume(self, newest: int | None, extra: Mapping[str, Any], batches: Iterator[Any]) -> None:
    """Have `batches`, which are where a checkpoint is, go on where the run does from there."""
    saved, past = self._of(extra), self._read()
    more = 0
    if newest is None:
      hosts.first(lambda: (self.folder / RECORD).unlink(missing_ok=True))
      past = Past()
    elif saved.count < past.count:  # older than the last time that the run went back
      more = past.passed - saved.passed + past.checkpoint - newest
      collections.deque(itertools.islice(batches, more), maxlen=0)
    self.past = dataclasses.replace(past, passed=saved.passed + more)

  def before(self, incident: Mapping[str, Any]) -> tuple[int | None, Past]:
    """The newest checkpoint from which an incident can be reached again, or None for the beginning,
    and how many batches are to be passed at which step. Raises CheckpointError.
    """
    there = Past(**{name: incident["batch"][name] for name in Past.__dataclass_fields__})
    steps = self.checkpoints.steps() if self.checkpoints is not None else ()
    for step in [*reversed([step for step in steps if step <= incident["step"]]), None]:
      extra = self.checkpoints.extra(step) if self.checkpoints and step is not None else {}
      saved, more = self._of(extra), there.count - self._of(extra).count
      passed = dataclasses.replace(there, passed=there.passed - saved.passed)
      begun = step or 0
      if (
        not more
        or (more == 1 and begun <= there.checkpoint)
        or (more > 0 and begun == there.checkpoint)
      ):
        return step, passed
    raise CheckpointError(f"{self.folder} has no checkpoint from before it any more")

  def digest(self, step: int) -> str:
    """The sha256 of this process's part of a batch that was seen just now."""
    digest = hashlib.sha256()
    for seen, columns in self._batches:
      if seen == step:
        for name in sorted(columns):
          digest.update(columns[name].tobytes())
    return digest.hexdigest()

  def facts(self) -> dict[str, int]:
    """What a checkpoint notes of this; nothing of a run that never went back."""
    return {"rollbacks": self.past.count, "passed": self.past.passed} if self.past.count else {}

  def _of(self, extra: Mapping[str, Any]) -> Past:
    facts = extra.get(self.key, {})
    return Past(-1, facts.get("passed", 0), facts.get("rollbacks", 0))

  def _read(self) -> Past:
    path = self.folder / RECORD
    read = lambda: path.read_text(errors="replace") if path.is_file() else "{}"
    text = hosts.first(read)
    try:
      past = Past(**json.loads(text))
      if not all(type(number) is int for number in dataclasses.astuple(past)):
        raise ValueError
      return past
    except (ValueError, TypeError, RecursionError):
      problem = "is not what a run that goes back writes; restore it"
      raise CheckpointError(f"{path} {problem}") from None

  def _target(self, step: int) -> int | None:
    """The checkpoint to go back to: the newest, but not the one from which this step was reached
    the last time too, if there is an older one.
    """
    if self.past.count >= self.section.rollback_limit or self.checkpoints is None:
      return None
    steps = [saved for saved in self.checkpoints.steps() if saved <= step]
    again = bool(self.past.count and steps and steps[-1] == self.past.checkpoint)
    return (steps[:-1] if again and steps[1:] else steps)[-1] if steps else None

  def _go_back(self, step: int, target: int, what: str) -> None:
    """Write where the run goes on before it does. Raises Rollback."""
    passed = self.past.passed + step + 1 - target
    self.past = Past(target, passed, self.past.count + 1)
    self._put(self.folder / RECORD, dataclasses.asdict(self.past))
    times = f"{self.past.count} of at most {self.section.rollback_limit} times"
    whence = f"going back to the checkpoint after {target} steps, past {step + 1 - target} batches"
    log.warning(f"{what}: {whence} ({times})")
    raise Rollback

  def _write(self, done: Done, kind: str, verdict: str, judged: Mapping[str, float]) -> Path:
    """Write an incident down; returns where."""
    batch = done.step + self.past.passed
    norms = {}
    if self.guard is not None:
      norms = self.guard.named(np.asarray(done.metrics["norms"]), self.parameters)
    steps, losses, sizes = zip(*self._recent)
    incident = {
      "step": done.step,
      "kind": kind,
      "verdict": verdict,
      **{name: number(float(done.metrics[name])) for name in ("loss", "raw_grad_norm")},
      **{name: number(value) for name, value in judged.items()},
      "batch": {"number": batch, "sha256": self.digest(done.step), **dataclasses.asdict(self.past)},
      "seeds": dict(self.seeds),
      "recent": {"step": steps, "loss": losses, "raw_grad_norm": sizes},
      "norms": {
        name: [*map(number, norm)] if isinstance(norm, list) else number(norm)
        for name, norm in norms.items()
      },
    }
    path = self.folder / FOLDER / f"step-{done.step}-batch-{batch}.json"
    try:
      self._put(path, incident)
    except CheckpointError as error:
      log.error(f"{error}; the run goes on without")
    return path

  def _put(self, path: Path, value: Mapping[str, Any]) -> None:
    """A file of JSON, whole or not at all, by process 0."""

    def put() -> None:
      try:
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".writing")
        lines = (f"{json.dumps(name)}: {json.dumps(part)}" for name, part in value.items())
        draft.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
        draft.replace(path)
      except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None

    hosts.first(put)
