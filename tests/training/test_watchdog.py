"""A run that stands still says where; one that others wait for is named; all time is accounted
for.
"""

import threading
import time

import pytest

from maxtext import hosts
from maxtext.training import watchdog as watchdogs
from maxtext.training.loop import loop
from maxtext.training.phases import PHASES, Phase, Phases
from maxtext.training.stragglers import slow
from maxtext.training.watchdog import WATCHED, Watchdog

SHORTEST = 0.3  # seconds


class Section:
  watchdog_timeout_seconds = SHORTEST
  watchdog_restart = False


class Restarting(Section):
  watchdog_restart = True


def soon(holds):
  end = time.monotonic() + 20
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def stand_still(phases, saving, name, until):
  """As a run that is in a phase for too long; all phases took no time before."""
  for each in PHASES:
    with phases.during(each, 6):
      pass
  if name == "save":
    saving.append(Phase("save", 7, time.monotonic()))
    soon(until)
    saving.clear()
  else:
    with phases.during(name, 7):
      soon(until)


@pytest.mark.parametrize("name", WATCHED)
def test_a_stall_is_named_within_the_limit_and_all_stacks_are_written(tmp_path, capfd, name):
  phases, saving = Phases(), []
  watchdog = Watchdog(Section(), tmp_path, phases, lambda: saving[0] if saving else None)
  watchdog._saves.append(0.0)
  begun, stacks = time.monotonic(), tmp_path / "stalls"
  with watchdog:
    dumped = lambda: any("in stand_still" in path.read_text() for path in stacks.glob("*"))
    stand_still(phases, saving, name, dumped)
    seconds = time.monotonic() - begun
    soon(lambda: not watchdog._told)
  [path] = stacks.iterdir()
  said = capfd.readouterr().err
  assert seconds < 20 * SHORTEST and said.count("\n") == 1
  assert said.startswith(WATCHED[name].format(7)) and f"{path}\n" in said
  text = path.read_text()
  assert " MainThread" in text and " watchdog" in text


def test_a_wait_to_save_names_the_save_that_it_waits_for(tmp_path, capfd):
  phases, saving = Phases(), [Phase("save", 5, time.monotonic())]
  with Watchdog(Section(), tmp_path, phases, lambda: saving[0]):
    stand_still(phases, [], "checkpoint", lambda: list(tmp_path.glob("stalls/*")))
  assert "wait to save after 7 steps, behind that after 5, takes" in capfd.readouterr().err


def test_the_limit_follows_from_what_the_run_has_taken_of_late(tmp_path):
  phases = Phases()
  watchdog = Watchdog(Section(), tmp_path, phases, lambda: None)
  assert watchdog.limit("step") == watchdogs.UNKNOWN * SHORTEST
  phases.lately["step"].extend([0.01, 0.02])
  assert watchdog.limit("step") == SHORTEST
  phases.lately["step"].append(5.0)
  assert watchdog.limit("step") == watchdogs.FACTOR * 5.0
  phases.lately["step"].extend([0.01] * 100)
  assert watchdog.limit("step") == SHORTEST


def test_a_stall_ends_the_process_with_the_code_to_start_it_again(tmp_path, monkeypatch):
  ends, phases = [], Phases()
  monkeypatch.setattr(hosts, "end", lambda line, code: ends.append((line, code)))
  with Watchdog(Restarting(), tmp_path, phases, lambda: None):
    stand_still(phases, [], "data", lambda: ends)
  assert ends[0][1] == 75 and ends[0][0].endswith("start again, and the run goes on")


def test_what_takes_no_longer_than_the_limit_is_not_spoken_of(tmp_path, capfd):
  phases = Phases()
  with Watchdog(Section(), tmp_path, phases, lambda: None):
    for _ in range(12):
      with phases.during("step", 1):
        time.sleep(SHORTEST / 6)
  assert capfd.readouterr().err == "" and not (tmp_path / "stalls").exists()


def test_every_second_of_a_run_is_in_one_phase():
  started = time.monotonic() - 0.5
  phases = Phases(started)

  class Slow:
    phase = "eval"
    due = lambda self, finished: finished == 3
    __call__ = lambda self, finished, state: bool(time.sleep(0.2))

  def batches():
    for _ in range(4):
      time.sleep(0.03)
      yield {}

  step = lambda state, batch: (time.sleep(0.05), (state, {}))[1]
  loop(step, None, batches(), range(4), lambda done: None, [Slow()], phases=phases)
  seconds = phases.seconds()
  assert sum(seconds.values()) == pytest.approx(time.monotonic() - started, abs=0.02)
  least = {"compile": 0.5, "data": 0.12, "step": 0.2, "eval": 0.2, "checkpoint": 0.0}
  for name, expected in least.items():
    assert seconds[name] >= expected and (expected or not seconds[name])
  assert phases.line(0.25, 1.5).endswith("; goodput 25.0%, 1.5 s lost by going back")
  assert threading.active_count() < 50


def test_the_process_that_others_wait_for_is_named():
  pace = lambda **own: dict.fromkeys(PHASES, 0.0) | own
  even = {n: pace(data=0.02, step=0.9 + n / 100) for n in range(4)}
  assert not [*slow(even)] and not [*slow({0: pace(data=5.0)})]
  late = even | {2: pace(data=0.5, step=0.42), 3: pace(data=0.02, step=0.8, checkpoint=0.15)}
  first, second = slow(late)
  assert first == (
    "process 2 takes 0.500 s a step for data, the others 0.020: 52% of a step's time"
  )
  assert second.startswith("process 3 takes 0.150 s a step for checkpoint, the others 0.000")
