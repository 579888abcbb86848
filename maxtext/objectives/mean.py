"""A mean that can still be added to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A sum and its weight, kept apart until the end: so parts add up to what one big batch would
  give.
  """

  total: jax.Array
  weight: jax.Array

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.weight + other.weight)

  @property
  def value(self) -> jax.Array:
    """total / weight; 0 where nothing has been weighed."""
    return self.total / jnp.maximum(self.weight, 1)
