"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from maxtext.errors import CheckpointError, ConfigError

_building: set[Path] = set()  # what this process is making


def check_free(out: Path) -> None:
  """Whether a folder can appear at `out`. Raises ConfigError."""
  if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
    raise ConfigError("command line", f"{out} exists; name a folder that does not, or is empty")
  if out.is_mount():
    raise ConfigError("command line", f"{out} is where a file system begins; name a folder in it")


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
  """A new folder beside `out`, which becomes `out` when all that is done with it is done.

  What a killed process has left there is removed. Raises ConfigError where something is already,
  CheckpointError for what the file system refuses.
  """
  check_free(out)
  building = out.parent / f"{out.name}.converting"
  lock = None
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    building.mkdir(exist_ok=True)
    lock = os.open(building, os.O_RDONLY)
    _lock(lock, building)
    _building.add(building)
    for left in building.iterdir():
      shutil.rmtree(left) if left.is_dir() else left.unlink()
    yield building
    if out.is_dir():
      out.rmdir()
    building.rename(out)
  except OSError as error:
    raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
  finally:
    if building in _building:
      abandon()
    if lock is not None:
      os.close(lock)


def abandon() -> None:
  """Remove what is not finished: for a process that ends without coming back to where it began."""
  for building in tuple(_building):
    for _ in range(3):  # other threads may be writing
      shutil.rmtree(building, ignore_errors=True)
  _building.clear()


def _lock(descriptor: int, folder: Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    problem = "is being written by another process; wait for it, or name another folder"
    raise ConfigError("command line", f"{folder} {problem}") from None
