"""A run that is killed goes on as if nothing had happened; end_to_end/ does it at length."""

from __future__ import annotations

from end_to_end.kills import kill_and_resume
from end_to_end.runs import Run

STEPS = 30
KEYS = (f"steps={STEPS}", "eval_interval=15")


def test_a_run_killed_three_times_equals_one_that_was_left_alone(tmp_path):
  whole, killed = Run(tmp_path, "whole", KEYS), Run(tmp_path, "killed", KEYS)
  whole.train()
  kill_and_resume(killed, kills=3)
  assert killed.hashes() == whole.hashes()
  assert killed.losses() == whole.losses()
  assert {step for step, *_ in whole.losses()} == set(range(STEPS))
