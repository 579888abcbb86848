"""A run that is stopped or killed goes on as if nothing had happened; end_to_end/ does more."""

from __future__ import annotations

import random

import pytest

from end_to_end import chaos, sigterm
from end_to_end.forks import Forked
from end_to_end.runs import Run
from maxtext.training.hooks import Save


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
  """One folder for all runs: the compiled step is kept there."""
  return tmp_path_factory.mktemp("runs")


def test_in_continuous_mode_a_save_begins_when_the_last_is_whole_and_none_before():
  class Slow:
    under_way = None
    saves: list[int] = []

    def save(self, step, *_, force):
      assert self.under_way is None
      self.saves.append(step)
      self.under_way = step, 0.0

  checkpoints = Slow()
  save = Save(checkpoints, period=0, beside=lambda finished: {})
  for finished in range(1, 30):
    if save.due(finished):
      save(finished, {})
    if finished % 7 == 0:
      checkpoints.under_way = None
  assert Slow.saves == [1, 8, 15, 22, 29]


ENDS = {
  "corpus-first_fit-evaluating-by1": (
    chaos.kill_at_any_time,
    chaos.kill_in_an_evaluation,
    chaos.disk_read_only,
    chaos.sigterm,
  ),
  "mixture-unpacked-continuous-by1": (
    chaos.kill_some_steps_in,
    chaos.kill_in_a_save,
    chaos.disk_full,
    chaos.disk_unplugged,
  ),
  "mixture-concat-copies-by2": (chaos.kill_in_a_save, chaos.one_dies),
  "corpus-concat-copies-bucket-by2": (chaos.kill_in_a_save, chaos.one_dies),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_that_ends_at_random_moments_equals_one_that_was_left_alone(parent, name):
  case = next(case for case in chaos.cases(parent) if case.name == name)
  kinds = ENDS[name]
  assert chaos.kill_and_resume(case, len(kinds), random.Random(5), kinds).total() == len(kinds)


def test_sigterm_saves_and_the_same_command_goes_on(parent):
  sigterm.stopped_run_goes_on(parent)


def test_a_second_sigterm_ends_at_once_and_costs_no_checkpoint(parent):
  sigterm.second_signal_ends_at_once(parent)


def test_a_run_that_reached_its_target_has_ended_until_the_target_is_lowered(parent):
  run = Run(parent, "target", ("steps=4", "eval_interval=2"))
  target = "target_eval_loss=100"
  assert f"{target} is reached after 2 steps" in Forked(run, target).ends(0)
  again = Forked(run, target)
  assert f"has reached {target} after 2 steps" in again.ends(0)
  assert again.steps_completed() == 0
  lower = Forked(run, "target_eval_loss=0.1")
  lower.ends(0)
  assert lower.steps_completed() == 2
