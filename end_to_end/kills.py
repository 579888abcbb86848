"""Kills a run at random moments and goes on with it, until it is finished."""

from __future__ import annotations

import dataclasses
import random
import time

from end_to_end.runs import Process, Run, check


@dataclasses.dataclass(frozen=True)
class Kill:
  """One SIGKILL: what the moment was, and where the run stood."""

  moment: str
  step: int  # the last one that was reported, -1 if none was
  checkpoints: tuple[str, ...]


def kill_and_resume(run: Run, kills: int, seed: int = 0) -> list[Kill]:
  """Kill the run this many times, each time in another life, then let it end.

  The moments are drawn from three kinds: any time since the start of the process, some steps after
  its first, and inside a save. Raises Failure if the run ends before its last kill, or ends badly.
  """
  chance, done = random.Random(seed), list[Kill]()
  kinds = [(_inside_a_save, _after_some_steps, _at_any_time)[i % 3] for i in range(kills)]
  chance.shuffle(kinds)
  for kind in kinds:
    process = run.start()
    moment = kind(run, process, chance)
    alive = process.popen.poll() is None
    process.kill()
    check(alive, f"the run ended before kill {len(done) + 1} of {kills}:\n{process.tail()}")
    done.append(Kill(moment, process.step(), tuple(sorted(run.checkpoints()))))
  run.train()
  return done


def _at_any_time(run: Run, process: Process, chance: random.Random) -> str:
  """While Python starts, the data is read, the step is compiled, or the first steps are made."""
  seconds = chance.uniform(0.0, 8.0)
  end = time.monotonic() + seconds
  process.until(lambda: time.monotonic() >= end or process.step() >= 0)
  return f"{seconds:.2f} s after the start, or at its first step"


def _after_some_steps(run: Run, process: Process, chance: random.Random) -> str:
  """After up to six steps, and a part of the next one."""
  steps, delay = chance.randint(1, 6), chance.uniform(0.0, 0.02)
  process.until(lambda: process.steps_completed() >= steps)
  time.sleep(delay)
  return f"{1e3 * delay:.0f} ms after {steps} steps"


def _inside_a_save(run: Run, process: Process, chance: random.Random) -> str:
  """Up to 60 ms after one to three new names stand in the checkpoints folder."""
  saves, delay = chance.randint(1, 3), chance.uniform(0.0, 0.06)
  process.until(lambda: process.steps_completed() > 0)
  seen = run.checkpoints()
  process.until(lambda: len(run.checkpoints() - seen) >= saves)
  time.sleep(delay)
  return f"{1e3 * delay:.0f} ms after save {saves} began"
