"""Rotary position embedding (Su et al. 2021), from true positions; angles are float32 always."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maxtext.specs import RopeSpec


def rotate(x: jax.Array, positions: jax.Array, spec: RopeSpec) -> jax.Array:
  """x [b t h k], positions [b t] -> [b t h k]: channels i and i + k/2 turn by position /
  timescale_i.

  timescale_i = min * (max / min) ** (2i / k) * factor.
  """
  half = x.shape[-1] // 2
  ratio = (spec.max_timescale / spec.min_timescale) ** (np.arange(half) / half)
  angle = positions[:, :, None, None] / jnp.asarray(
    spec.min_timescale * ratio * spec.factor, jnp.float32
  )
  sin, cos = jnp.sin(angle), jnp.cos(angle)  # [b t 1 k/2]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
