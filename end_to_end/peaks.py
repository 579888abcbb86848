"""Processes and the most memory that each had."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from end_to_end.runs import OURS, check


def run(*words: str | Path, environment: Mapping[str, str] | None = None) -> tuple[str, str]:
  """`python words`, which has to end with 0 -> what it printed, and a line of what it took."""
  begun = time.monotonic()
  command = [sys.executable, *map(str, words)]
  with open(os.devnull, "rb") as nothing:
    process = subprocess.Popen(
      command, stdin=nothing, stdout=subprocess.PIPE, env=OURS | dict(environment or {})
    )
  assert process.stdout is not None
  printed = process.stdout.read().decode()
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  check(process.returncode == 0, f"{command[1:4]} ended with {process.returncode}:\n{printed}")
  seconds, cpu = time.monotonic() - begun, usage.ru_utime + usage.ru_stime
  return printed, f"{usage.ru_maxrss / 1e6:.2f} GB at most, {seconds:.0f} s, {cpu:.0f} CPU s"


def gigabytes(line: str) -> float:
  """The memory that a line of `run` names."""
  return float(line.partition(" ")[0])
