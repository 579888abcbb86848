"""Learning rate by step."""

from __future__ import annotations

import optax

from maxtext.training.sections import Optimizer


def make_schedule(section: Optimizer, steps: int) -> optax.Schedule:
  """The learning rate at each step: linear warm-up from 0, then the named shape, then its final
  value.

  `learning_rate_schedule_steps` (-1: the run's `steps`) is the whole length, warm-up included.
  """
  length = (
    steps if section.learning_rate_schedule_steps == -1 else section.learning_rate_schedule_steps
  )
  peak = section.learning_rate
  warm = round(length * section.warmup_steps_fraction)
  final = peak * section.learning_rate_final_fraction
  rest = max(length - warm, 1)
  kind = section.lr_schedule_type
  if kind == "cosine":
    parts = [(optax.cosine_decay_schedule(peak, rest, section.learning_rate_final_fraction), rest)]
  elif kind == "linear":
    parts = [(optax.linear_schedule(peak, final, rest), rest)]
  elif kind == "wsd":
    decay = round(length * section.wsd_decay_steps_fraction)
    parts = [(optax.constant_schedule(peak), rest - decay)]
    parts += [(optax.linear_schedule(peak, final, max(decay, 1)), decay)]
  else:
    parts = [(optax.constant_schedule(peak), rest)]
  if warm:  # the first step already moves: step 0 has 1/(warm + 1) of the peak
    parts.insert(0, (optax.linear_schedule(peak / (warm + 1), peak, warm), warm))
  ends = [sum(n for _, n in parts[: i + 1]) for i in range(len(parts) - 1)]
  return optax.join_schedules([schedule for schedule, _ in parts], ends)
