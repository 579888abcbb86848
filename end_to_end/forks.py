"""Training processes forked from one that has imported all they need, which saves most of a start.

Nothing else is shared: each has its own memory, devices and process group, and dies alone.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from end_to_end.runs import CONFIG, OURS, Process, Run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
  ["maxtext.train", "maxtext.trainer", "maxtext.checkpoints.storage", "maxtext.checkpoints.local"]
)


class Forked(Process):
  """As a Process that trains `run`, with further keys and environment."""

  def __init__(self, run: Run, *keys: str, environment: dict[str, str] | None = None):
    where = (f"run_name={run.name}", f"base_output_directory={run.base}")
    self.command = ["train", str(CONFIG), *where, *run.keys, *keys]
    self.lines: list[str] = []
    self._news = threading.Condition()
    ours, theirs = FORKS.Pipe(duplex=False)
    variables = OURS | {"JAX_COMPILATION_CACHE_DIR": str(run.parent / "xla")} | (environment or {})
    process = FORKS.Process(target=_train, args=(self.command, variables, theirs))
    process.start()
    theirs.close()
    self.popen = _Child(process)  # type: ignore[assignment]
    self._pipe = os.fdopen(os.dup(ours.fileno()), errors="replace")
    self._reader = threading.Thread(target=self._read, args=(self._pipe,), daemon=True)
    self._reader.start()


class _Child:
  """What Process asks of subprocess.Popen."""

  def __init__(self, process: ForkServerProcess):
    self._process, self.pid = process, process.pid or 0

  def poll(self) -> int | None:
    return self._process.exitcode

  def wait(self, seconds: float) -> int:
    self._process.join(seconds)
    if self._process.exitcode is None:
      raise subprocess.TimeoutExpired("train", seconds)
    return self._process.exitcode

  def send_signal(self, number: int) -> None:
    os.kill(self.pid, number)


def _train(argv: list[str], variables: dict[str, str], out: Connection) -> None:
  """In the child: be `python -m train` with these arguments and variables."""
  os.setsid()
  for number in (1, 2):
    os.dup2(out.fileno(), number)
  out.close()
  sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
  os.environ.clear()
  os.environ.update(variables)
  import jax

  from maxtext import train
  from maxtext.errors import run_cli

  # JAX has read its variables when it was imported
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", "JAX_PROCESS_ID" not in variables)
  jax.config.update("jax_compilation_cache_dir", variables["JAX_COMPILATION_CACHE_DIR"])
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  sys.argv = argv
  run_cli(train.main)
