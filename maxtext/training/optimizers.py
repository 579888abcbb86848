"""From the optimizer section to an optax transformation."""

from __future__ import annotations

import re

import jax.numpy as jnp
import optax

from maxtext.training.sections import Optimizer
from maxtext.training.state import Params


def make_optimizer(section: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The named optimizer at the schedule's rate; clipping is the step's."""
  if section.opt_type == "adamw":
    return optax.adamw(
      schedule,
      b1=section.adam_b1,
      b2=section.adam_b2,
      eps=section.adam_eps,
      weight_decay=section.adam_weight_decay,
      mask=lambda params: decayed(params, section.adamw_mask),
      mu_dtype=jnp.dtype(section.mu_dtype) if section.mu_dtype else None,
    )
  return optax.sgd(schedule)


def decayed(params: Params, spared: tuple[str, ...]) -> dict[str, bool]:
  """Which parameters weight decay pulls at: all but those whose path a pattern finds."""
  return {name: not any(re.search(pattern, name) for pattern in spared) for name in params}
