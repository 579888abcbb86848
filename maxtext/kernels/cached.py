"""Attention over a cache whose slots are split over devices: each attends its own, and what they
find is put together by the log-sums of their softmax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from maxtext import sharding
from maxtext.errors import ConfigError
from maxtext.kernels import blockwise
from maxtext.kernels.split import Split

KERNELS = ("autoselected", "blockwise")


def attend_cached(kernel: str, case: tuple) -> jax.Array:
  """The case (q [b t h k], k, v [b s g k], mask, scores, sink, seed) -> [b t h k], by blockwise.

  What crosses the mesh is as large as q, however many slots there are. It has no gradient. Raises
  ConfigError for another kernel by name.
  """
  q, k, v, mask, scores, sink, _ = case
  split = Split.of(q, k, sharding.SLOTS)
  assert split is not None
  axes, crossed = sharding.names_of(split.kv[1]), k.shape[2] > 1 and split.crossed
  if kernel not in KERNELS or crossed:
    why = crossed or f"it is computed by 'blockwise', not by {kernel!r}; use autoselected"
    raise ConfigError("attention", f"over a cache that a mesh splits: {why}")

  def part(q, k, v, mask, sink):
    out, norm = blockwise.forward(scores, q, k, v, mask, None)
    weight = jnp.exp(norm - lax.pmax(norm, axes))
    total = lax.psum(weight, axes)
    out = lax.psum(out.astype(jnp.float32) * weight[..., None], axes) / total[..., None]
    norm = lax.pmax(norm, axes) + jnp.log(total)
    return (out if sink is None else blockwise.with_sink(out, norm, sink)).astype(v.dtype)

  return split.run(part, q, k, v, mask, sink)
