"""SIGTERM saves and ends with 0, or as asked, and the same command goes on; a second one ends at
once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from end_to_end.forks import Forked
from end_to_end.runs import Run, check, report

NEVER = ("checkpoint_period=1000000", "steps=1000000")


def stopped_run_goes_on(parent: Path) -> None:
  run = Run(parent, "stopped", NEVER)
  process = Forked(run)
  process.reach(5)
  process.send(signal.SIGTERM)
  output, last = process.ends(0), process.step()
  check("resume" in output.splitlines()[-1], f"no word of how to go on:\n{process.tail()}")
  check(run.checkpoints() == {str(last + 1)}, f"after step {last}: saved {run.checkpoints()}")
  again = Forked(run, "exit_code_when_stopped=75")
  again.reach(0)
  first = next(line for line in again.lines if line.startswith("completed step: "))
  again.send(signal.SIGTERM)
  again.ends(75)
  check(first.startswith(f"completed step: {last + 1},"), f"stopped after {last}, then: {first}")
  print(f"  SIGTERM: saved after step {last}, went on with {last + 1}")


def stopped_while_it_starts(parent: Path) -> None:
  """Whenever it comes once Python is there, the run ends as asked and soon, and can start again."""
  run = Run(parent, "early", NEVER)
  begun = time.monotonic()
  subprocess.run([sys.executable, "-m", "train", "--help"], stdout=subprocess.DEVNULL, check=True)
  first = 2 * (time.monotonic() - begun)  # for what is imported before anything is asked
  for seconds in (first + later for later in (0.2, 0.5, 1.0, 2.0, 3.0, 5.0)):
    process = run.start("exit_code_when_stopped=75")
    time.sleep(seconds)
    process.send(signal.SIGTERM)
    begun = time.monotonic()
    process.ends(75)
    took = time.monotonic() - begun
    check("resume" in process.lines[-1], f"SIGTERM {seconds:.1f} s in:\n{process.output}")
    stepped = "before the first step" not in process.lines[-1]
    check(stepped or took < 2.0, f"SIGTERM {seconds:.1f} s in: {took:.1f} s")
    what = f"after {process.step() + 1} steps" if stepped else "before the first step"
    print(f"  SIGTERM {seconds:.1f} s after the start: gone {took:.2f} s later, {what}")


def second_signal_ends_at_once(parent: Path) -> None:
  run = Run(parent, "twice")
  process = run.start(*NEVER)
  process.reach(5)
  process.send(signal.SIGTERM)
  process.until(lambda: any("SIGTERM" in line for line in process.lines))
  start = time.monotonic()
  process.send(signal.SIGTERM)
  code = process.wait()
  seconds = time.monotonic() - start
  check(seconds < 1.0, f"the second SIGTERM took {seconds:.1f} s")
  check(code in (0, -signal.SIGTERM), f"the second SIGTERM: exit code {code}\n{process.tail()}")
  Forked(run, "steps=20", "resume_changes=[steps]").ends(0)
  print(f"  second SIGTERM: gone in {seconds:.2f} s with {code}, and the run can still be finished")


def main() -> None:
  with tempfile.TemporaryDirectory() as parent:
    stopped_run_goes_on(Path(parent))
    stopped_while_it_starts(Path(parent))
    second_signal_ends_at_once(Path(parent))


if __name__ == "__main__":
  report(main)
