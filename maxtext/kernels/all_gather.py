"""Context parallelism in which every device gathers all keys and values for its own queries."""

from __future__ import annotations

import jax
from jax import lax

from maxtext.kernels import Scores
from maxtext.kernels.context import Inner, strategy
from maxtext.masks import Mask


@strategy("all_gather")
def all_gather(
  inner: Inner,
  axes: tuple[str, ...],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k], parts of the length -> [b t h k]; any inner kernel.

  A device holds all keys and values of its rows and heads, and the inner kernel's scores.
  """
  k, v, *marks = gathered(axes, (k, v, mask.kv_pos, mask.kv_seg, mask.kv_span))
  return inner(q, k, v, mask.over(*marks), scores, sink)


def gathered(axes: tuple[str, ...], parts: tuple) -> tuple:
  """[b s ...] of one device -> the same of the whole length, for every array among `parts`."""
  return jax.tree.map(lambda x: lax.all_gather(x, axes, axis=1, tiled=True), parts)
