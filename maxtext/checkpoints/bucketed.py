"""A run's checkpoints in a bucket, to which each process copies the part that it has written."""

from __future__ import annotations

import errno
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from maxtext import hosts
from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.manifest import Manifest
from maxtext.checkpoints.remote import Steps
from maxtext.checkpoints.sections import Checkpoint
from maxtext.hosts.mirror import Mirror


class Bucketed(Checkpoints):
  """The steps of the run of a mirror; before one is there, all else of the run is."""

  def __init__(self, mirror: Mirror, section: Checkpoint):
    super().__init__(mirror.folder / "checkpoints", section)
    self._mirror = mirror
    self._steps = self._folder = Steps(self.directory, mirror.bucket.below("checkpoints"))
    self._seals, self._saves = True, 0
    self.place = self._steps.bucket.url

  def keep_up(self) -> None:
    self._mirror.try_push()

  def _begin(self, step: int) -> Path:
    try:
      if self._writer is None:
        self._folder.clean()
      return self._folder.prepare(step)
    except OSError as error:
      raise self._trouble(step, error) from error

  def _make_writer(self) -> Any:
    storage = importlib.import_module("maxtext.checkpoints.storage")  # imports Orbax
    return storage.Writer(self._section, apart=not hosts.alone())

  def _seal(
    self, building: Path, step: int, arrays: tuple[Array, ...], files: dict[str, tuple[str, bytes]]
  ) -> int:
    """Copy what this process has written; process 0 says that it is a checkpoint when all have."""
    self._saves += 1
    name = f"save {self._saves} {step}"
    if hosts.is_first():
      self._mirror.check()
      self._steps.begin(step)
      for file, content in files.values():
        (building / file).write_bytes(content)
    parts = _gathered(f"{name} written", lambda: manifests.measured(building))
    owners = {file: process for process in reversed(range(len(parts))) for file in parts[process]}
    mine = [file for file, process in owners.items() if process == hosts.number()]
    _gathered(f"{name} copied", lambda: self._put(step, mine, building))
    whole = {file: tuple(parts[process][file]) for file, process in sorted(owners.items())}
    manifest = Manifest(step, arrays, {key: file for key, (file, _) in files.items()}, whole)
    if hosts.is_first():
      self._mirror.check()
      self._steps.commit(step, manifest)
      self._retire(step)
    self._folder.discard(building)
    return manifest.size

  def _put(self, step: int, names: list[str], building: Path) -> None:
    self._mirror.push()  # a checkpoint must not know of steps that the metrics there have lost
    self._steps.bucket.below(str(step)).put(names, building)


def _gathered(name: str, act: Callable[[], Any]) -> list[Any]:
  """What `act` returned in each process, in each; from any thread. Raises OSError."""
  try:
    value, failed = act(), None
  except OSError as error:
    value, failed = None, error
  if hosts.alone():
    if failed is not None:
      raise failed
    return [value]
  said = json.dumps([value, failed and (failed.strerror or str(failed))])
  while len(board := hosts.board(name, said)) < jax.process_count():
    time.sleep(0.1)
  if failed is not None:
    raise failed
  found = [json.loads(board[process]) for process in range(len(board))]
  for process, (_, problem) in enumerate(found):
    if problem:
      raise OSError(errno.EIO, f"{hosts.named(process)}: {problem}")
  return [value for value, _ in found]


def opened(home: hosts.Home, section: Checkpoint) -> Checkpoints:
  """The checkpoints of the run that is at home there."""
  if home.mirror:
    return Bucketed(home.mirror, section)
  return Checkpoints(home.folder / "checkpoints", section)
