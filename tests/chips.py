"""Programs that the TPU's own compiler compiles here, for chips that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maxtext import topology

FOUR = ("v5e:2x2", "v5p:2x2x1")  # topologies of four chips, as libtpu calls them


def printed(program: str, *arguments: str) -> list[str]:
  """The lines that a program prints which compiles for TPUs. Skips the test without libtpu."""
  pytest.importorskip("libtpu")
  environ = {**os.environ, **topology.ENVIRONMENT, "JAX_PLATFORMS": "cpu"}
  environ.pop("XLA_FLAGS", None)
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), *arguments],
    cwd=Path(__file__).parents[1],
    env=environ,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.splitlines()
