"""The folder `<run>/checkpoints/`: which steps are whole, where new ones appear and old ones go.

Nothing here imports jax or Orbax. A step `40` is prepared as `40.saving`, appears by a rename and
leaves as `40.deleting`; both names are ours alone, and what a killed process left there is litter.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.manifest import Damage, Fingerprint, Manifest
from maxtext.errors import CheckpointError
from maxtext.log import log

STATE = "state"  # the part of a step folder that Orbax writes
FACTS, LOSS = "facts", "eval_loss"  # what a run notes beside it, and of that its evaluation
_LITTER = re.compile(r"\d+\.(saving|deleting)")


class Folder:
  """The steps under `path`. What was found whole is not read again until its files change."""

  def __init__(self, path: Path):
    self.path = path
    self._whole: dict[int, Fingerprint] = {}
    self._reported: set[str] = set()

  def step(self, step: int) -> Path:
    return self.path / str(step)

  def place(self, step: int) -> str:
    """Where a step is, for people."""
    return str(self.step(step))

  def manifest(self, step: int, content: bool = True) -> Manifest:
    """The manifest of a whole step; without `content` the files' bytes are taken on trust.

    Raises CheckpointError.
    """
    try:
      return self._check(step) if content else manifests.read(self.step(step))
    except Damage as damage:
      raise CheckpointError(f"{self.place(step)} {damage}") from None

  def whole(self, step: int) -> bool:
    """Whether a step is there, complete, and every byte of it as it was written."""
    return not self.problem(step)

  def problem(self, step: int) -> str:
    """Why a step is not whole; empty where it is."""
    try:
      self._check(step)
    except Damage as damage:
      return f"{self.place(step)} {damage}"
    return ""

  def remember(self, step: int, manifest: Manifest) -> None:
    """Take a step as whole: this process has written it and read it back just now."""
    self._whole[step] = manifests.fingerprint(self.step(step), manifest)

  def steps(self) -> tuple[int, ...]:
    """The whole steps, ascending."""
    return tuple(step for step in self.named() if self.whole(step))

  def newest(self) -> int | None:
    """The newest whole step; what had to be passed over is logged, in one line, once."""
    passed = []
    for step in reversed(self.named()):
      if problem := self.problem(step):
        if self._is_named(step):  # else another process has deleted it just now
          passed.append(problem)
        continue
      self.report(passed, f"using step {step}")
      return step
    self.report(passed, "no other checkpoint is there")
    return None

  def _is_named(self, step: int) -> bool:
    return self.step(step).is_dir()

  def named(self) -> list[int]:
    """The steps by the names of the folders alone, ascending."""
    try:
      names = [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
    except FileNotFoundError:
      return []
    except OSError as error:
      raise CheckpointError(f"{self.path}: cannot be listed: {error.strerror}") from error
    return sorted(int(n) for n in names if n.isascii() and n.isdecimal() and str(int(n)) == n)

  def clean(self) -> None:
    """Remove what killed saves and deletions left behind. Only for who writes here."""
    if self.path.is_dir():
      for entry in sorted(self.path.iterdir()):
        if _LITTER.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
          shutil.rmtree(entry)
          log.debug("removed %s, left behind by a stopped process", entry)

  def prepare(self, step: int) -> Path:
    """A new, empty folder in which to build a step. Raises OSError."""
    building = self.path / f"{step}.saving"
    if building.exists():
      shutil.rmtree(building)
    building.mkdir(parents=True)
    return building

  def publish(self, building: Path, step: int) -> None:
    """Give a sealed folder its name. What had it makes room, and is kept if it is not ours."""
    final = self.step(step)
    old = None
    if final.exists() or final.is_symlink():
      ours = (final / manifests.NAME).exists()
      old = self.path / f"{step}.deleting" if ours else _unused(self.path, f"{step}.replaced")
      final.rename(old)
      if not ours:
        log.warning("%s was no checkpoint of this program; it is now %s", final, old)
    building.rename(final)
    manifests.sync_folder(self.path)
    if old is not None and old.name.endswith(".deleting"):
      shutil.rmtree(old)

  def discard(self, building: Path) -> None:
    """Remove what a failed save has written, as far as that works."""
    shutil.rmtree(building, ignore_errors=True)

  def retire(self, keep: int, latest: int, period: int = -1, best: int = 0) -> None:
    """Delete complete steps but the newest `keep`, those that `period` divides, the `best` by their
    evaluation, and never `latest`, the one just written.

    What is damaged is neither counted nor deleted.
    """
    complete = [step for step in self.named() if self._complete(step)]
    losses = {step: self._loss(step) for step in complete} if best else {}
    kept = {latest, *sorted(losses, key=lambda step: (losses[step], -step))[:best]}
    for step in complete[:-keep]:
      if step not in kept and (period < 1 or step % period):
        self.drop(step)

  def drop(self, step: int) -> None:
    """Delete a step, as far as that works."""
    leaving = self.path / f"{step}.deleting"
    try:
      self.step(step).rename(leaving)
      shutil.rmtree(leaving)
    except OSError as error:
      log.warning("%s: cannot be deleted: %s", self.step(step), error.strerror)
    self._whole.pop(step, None)

  def _check(self, step: int) -> Manifest:
    folder = self.step(step)
    manifest = manifests.read(folder)
    prints = manifests.fingerprint(folder, manifest)
    if self._whole.get(step) != prints:
      manifests.check_content(folder, manifest)
      self._whole[step] = prints
    return manifest

  def _loss(self, step: int) -> float:
    """What an evaluation of just this step has found; infinity where there was none."""
    with contextlib.suppress(Damage, CheckpointError):
      extra = read_extra(self.step(step), manifests.read(self.step(step)))
      return float(extra.get(FACTS, {}).get(LOSS, math.inf))
    return math.inf

  def _complete(self, step: int) -> bool:
    """Whether every file of a step is there in its size; their content is not read."""
    with contextlib.suppress(Damage):
      manifests.fingerprint(self.step(step), manifests.read(self.step(step)))
      return True
    return False

  def report(self, passed: list[str], outcome: str) -> None:
    """What was passed over, and what is done instead, in one line, once."""
    line = "; ".join([*passed, outcome])
    if passed and line not in self._reported:
      self._reported.add(line)
      log.warning(line)


def read_extra(step_folder: Path, manifest: Manifest) -> dict[str, Any]:
  """What was saved beside the arrays, by name: JSON as values, all else as text."""
  extra = {}
  for name, file in manifest.extra.items():
    try:
      text = (step_folder / file).read_text()
    except OSError as error:
      raise CheckpointError(f"{step_folder} cannot be read: {file}: {error.strerror}") from error
    extra[name] = json.loads(text) if file.endswith(".json") else text
  return extra


def _unused(parent: Path, name: str) -> Path:
  names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
  return next(path for path in map(parent.joinpath, names) if not path.exists())
