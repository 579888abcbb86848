"""A run that trains can be looked at, and does not notice."""

from __future__ import annotations

import os
import signal
import time

import pytest

from end_to_end.runs import Run, module

FOREVER = ("steps=1000000", "enable_continuous_checkpointing=true", "resume_changes=[steps]")


def contents(folder):
  """Every file with its bytes and the time of its last change."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_a_run_is_evaluated_and_decoded_while_it_trains(tmp_path):
  run = Run(tmp_path, "live", ("steps=6", "eval_interval=6", "enable_tensorboard=false"))
  said = [line for line in run.train().splitlines() if line.startswith("Completed eval")]
  assert module("maxtext.evaluate", run.folder).ends(0).splitlines()[-1] == said[-1]
  process = Run(
    tmp_path, "live", ("eval_interval=-1", "enable_tensorboard=false", *FOREVER)
  ).start()
  try:
    looked_at(run, process)
  finally:
    process.kill()


def looked_at(run, process):
  process.reach(12)
  os.kill(process.popen.pid, signal.SIGSTOP)
  time.sleep(0.5)
  before = contents(run.folder)
  module("maxtext.evaluate", run.folder, "eval_steps=2").ends(0)
  module("decode", run.folder, "prompt=Once", "decode_length=4").ends(0)
  assert contents(run.folder) == before
  os.kill(process.popen.pid, signal.SIGCONT)
  last = module("maxtext.evaluate", run.folder, "eval_steps=2").ends(0).splitlines()[-1]
  assert last.startswith("Completed eval after train step ")
  step = process.step()
  process.until(lambda: process.step() > step)
  process.send(signal.SIGTERM)
  process.ends(0)
