"""Real processes: killed at any moment they leave a whole checkpoint; what fails says one line."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from maxtext.checkpoints.folder import Folder
from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.sections import Checkpoint

PRELUDE = """
import dataclasses, os, resource, sys, threading
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
from pathlib import Path
from maxtext.checkpoints.manager import Checkpoints, preload
from maxtext.checkpoints.sections import Checkpoint
from maxtext.errors import run_cli

@jax.jit
def state(step):
  key = jax.random.fold_in(jax.random.key(7), step)
  w = lambda n: jax.random.normal(jax.random.fold_in(key, n), (64, 1024))
  return {"step": step, "params": {f"w{n}": w(n) for n in range(6)}, "opt_state": {"mu": w(9)}}

def checkpoints(**changes):
  section = Checkpoint(
    True, True, 1, 2, -1, 0, False, True, "", "", True, True, False, False, False, "", 0
  )
  return Checkpoints(Path(sys.argv[1]), dataclasses.replace(section, **changes))
"""

TRAIN = """
with checkpoints() as here:
  newest = here.newest()
  if newest is None:
    now = state(jnp.int32(0))
  else:
    now = here.restore(newest, jax.eval_shape(state, jnp.int32(0)))
    assert here.extra(newest) == {"data": {"at": newest}}
  assert newest is None or int(now["step"]) == newest
  print("from", newest, flush=True)
  for step in range(int(now["step"]) + 1, 100_000):
    here.save(step, state(jnp.int32(step)), {"data": {"at": step}})
"""


def start(directory, code: str) -> subprocess.Popen:
  pipe = subprocess.PIPE
  command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(directory)]
  return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def kills(directory, count: int, rng: random.Random) -> None:
  """Train, kill at a random moment, hold what is there against the truth; `count` times."""
  namespace: dict = {}
  exec(PRELUDE, namespace)
  state, section = (
    namespace["state"],
    Checkpoint(
      True, True, 1, 2, -1, 0, False, True, "", "", True, True, False, False, False, "", 0
    ),
  )
  reached = None
  for trial in range(count):
    process = start(directory, TRAIN)
    assert process.stdout.readline() == f"from {reached}\n", process.stderr.read()
    while trial == 0 and not Folder(directory).named() and process.poll() is None:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    process.kill()
    _, errors = process.communicate()
    assert errors == ""
    newest = Folder(directory).newest()
    assert newest is not None and newest >= (reached or 0)
    reached = newest
    target = jax.eval_shape(state, np.int32(0))
    restored = Checkpoints(directory, section).restore(reached, target)
    jax.tree.map(np.testing.assert_array_equal, restored, state(np.int32(reached)))


@pytest.mark.slow
def test_a_run_killed_at_thirty_random_moments_keeps_a_whole_checkpoint(tmp_path):
  kills(tmp_path / "checkpoints", 30, random.Random(4))


def test_a_save_that_fails_prints_one_line_and_exits_with_4(tmp_path):
  code = """
  def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, -1))
    with checkpoints() as here:
      here.save(1, state(jnp.int32(1)), {})
    return 0
  run_cli(main)
  """
  process = start(tmp_path / "checkpoints", code)
  output, errors = process.communicate()
  assert errors == f"{tmp_path}/checkpoints/1: cannot be saved: File too large\n"
  assert (process.returncode, output) == (4, "")


def test_an_error_of_orbax_that_nobody_asked_for_prints_nothing(tmp_path):
  """As asyncio logs it when one of several writes has failed before: by its traceback alone."""
  code = """
  import asyncio, logging
  from maxtext.checkpoints import storage

  def failed(path):
    try:
      exec(compile("raise ValueError('Error writing')", path, "exec"))
    except ValueError as error:
      logging.getLogger("asyncio").error("exception was never retrieved", exc_info=error)

  failed("/somewhere/orbax/serialization.py")
  failed("/somewhere/else.py")
  """
  _, errors = start(tmp_path / "checkpoints", code).communicate()
  assert "else.py" in errors and "/orbax/" not in errors


def test_orbax_is_imported_only_when_it_is_needed_and_in_the_background(tmp_path):
  code = """
  here = checkpoints()
  assert here.newest() is None and here.steps() == ()
  print("orbax" in sys.modules)
  preload().join()
  print("orbax" in sys.modules)
  """
  output, errors = start(tmp_path / "checkpoints", code).communicate()
  assert (output, errors) == ("False\nTrue\n", "")
