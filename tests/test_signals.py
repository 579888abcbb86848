"""What SIGTERM and Ctrl-C do, before there is anything to save and afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

# A call that neither ends nor lets Python's own handlers run, as that of a compiler.
LONG = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
SETTING = """
import os, signal, time
from maxtext import log, signals
log.start()
with signals.Early({code}):
  {before}
  print("ready", flush=True)
  {during}
{after}
"""


def ended(number: int, **parts: str) -> tuple[int, str, float]:
  """The exit code, what was printed after `ready`, and the seconds it took from the signal on."""
  script = SETTING.format(**{"before": "", "during": "", "after": "", "code": ""} | parts)
  with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    begun = time.monotonic()
    run.send_signal(number)
    said = run.stdout.read()
  return run.returncode, said, time.monotonic() - begun


@pytest.mark.parametrize("number, asked", [(signal.SIGTERM, 75), (signal.SIGINT, 0)])
def test_before_the_first_step_a_signal_ends_the_process_as_asked_and_at_once(number, asked):
  """Even from the middle of a compiler."""
  code, said, seconds = ended(number, during=LONG, code=str(asked))
  assert code == asked and seconds < 20
  assert said == (
    f"stopped by {signal.Signals(number).name} before the first step, with nothing to save; "
    "the same command resumes it\n"
  )


def test_from_the_first_step_on_a_run_is_asked_and_the_second_time_ended():
  before, steps = "stop = signals.Stop().__enter__()", "while not stop(0): time.sleep(0.01)"
  code, said, _ = ended(signal.SIGTERM, before=before, during=f"{steps}\n  print('saved')")
  assert code == 0 and said.endswith("once more ends the process at once\nsaved\n")
  again = f"{steps}\n  os.kill(os.getpid(), signal.SIGTERM)\n  print('never')"
  code, said, _ = ended(signal.SIGTERM, before=before, during=again)
  assert code == -signal.SIGTERM and said.endswith("once more ends the process at once\n")


def test_after_the_last_step_a_signal_ends_the_process_as_usual():
  parts = {"before": "with signals.Stop(): pass", "during": "time.sleep(60)"}
  code, said, seconds = ended(signal.SIGTERM, **parts)
  assert (code, said) == (-signal.SIGTERM, "") and seconds < 20
