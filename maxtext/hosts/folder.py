"""The folder of a run, which all its processes share and no other run has."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from maxtext.errors import ConfigError
from maxtext.hosts.group import first

LATE = 10.0  # seconds until what one host has written is there for another


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """A run's folder, made if need be, which is this run's alone while it trains.

  All its processes have to see it. Raises ConfigError.
  """
  with contextlib.ExitStack() as files:

    def take() -> None:
      try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = files.enter_context((folder / ".lock").open("w"))
      except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror}); name a folder that can"
        raise ConfigError("base_output_directory", problem) from None
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        what = "is being trained by another process in"
        problem = f"{folder.name!r} {what} {folder}; name another"
        raise ConfigError("run_name", problem) from None

    first(take)  # processes that train together have one folder
    if not _appears(folder / ".lock"):
      problem = f"{folder} is not there, where process 0 has made it; name one that all hosts share"
      raise ConfigError("base_output_directory", problem)
    yield


def _appears(path: Path) -> bool:
  """Whether a file that another process has made is here; a shared file system may be late."""
  end = time.monotonic() + LATE
  while not path.exists():
    if time.monotonic() > end:
      return False
    time.sleep(0.5)
  return True
