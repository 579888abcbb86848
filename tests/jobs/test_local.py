"""Processes of this machine that are launched together: what they print, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from maxtext.jobs import local

TALK = "import os, sys; n = os.environ['JAX_PROCESS_ID']; print('I am', n); "
LOCAL = "import os, sys; from maxtext.jobs import local; sys.exit(local.run({}, {}))"


def started(code: str, count: int = 2) -> subprocess.Popen[str]:
  """Processes of a program, by the runner of local launches."""
  own = local.environments(count)
  program = LOCAL.format([sys.executable, "-uc", code], own)
  return subprocess.Popen([sys.executable, "-uc", program], stdout=subprocess.PIPE, text=True)


def test_local_processes_each_know_their_place_and_the_first_failure_counts():
  late = "import time; time.sleep(0.3 * (n == '0')); sys.exit(3 if n == '1' else 75)"
  process = started(TALK + late)
  said, _ = process.communicate(timeout=60)
  assert sorted(said.splitlines()) == ["[0] I am 0", "[1] I am 1"]
  assert process.returncode == 3


def test_a_line_that_begins_with_its_number_has_it_once():
  said, _ = started(TALK + "print(f'[{n}] process 0 ended')").communicate(timeout=60)
  assert sorted(said.splitlines())[1::2] == ["[0] process 0 ended", "[1] process 0 ended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_local_launch_comes_to_each_process(number):
  hear = f"import signal, time; signal.signal({int(number)}, lambda *_: sys.exit(9)); "
  process = started(
    TALK.replace("print", hear.replace("import", "import", 1) + "print") + "time.sleep(60)"
  )
  assert process.stdout is not None
  for _ in range(2):
    assert "I am" in process.stdout.readline()
  process.send_signal(number)
  assert process.wait(timeout=20) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_local_processes_are_told_to_stop_when_the_launch_is_killed(tmp_path, monkeypatch):
  """They are not its group, and nobody reads what they print any more."""
  monkeypatch.chdir(tmp_path)
  last = "signal.signal(15, lambda *_: (open(f'saved{n}', 'x'), os._exit(0))); "
  code = TALK.replace("print", f"import signal, time; {last}print") + "time.sleep(60)"
  process = started(code)
  assert process.stdout is not None
  for _ in range(2):
    assert "I am" in process.stdout.readline()
  process.kill()
  until = time.monotonic() + 20
  while len(list(tmp_path.glob("saved*"))) < 2:
    assert time.monotonic() < until
    time.sleep(0.05)
