"""Context parallelism that exchanges lengths for heads: each device attends whole rows.

DeepSpeed-Ulysses (Jacobs et al. 2023).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.kernels import Scores
from maxtext.kernels.all_gather import gathered
from maxtext.kernels.context import Inner, strategy
from maxtext.kernels.options import Options
from maxtext.kernels.split import Split
from maxtext.masks import Mask


def _unfit(options: Options, split: Split, q: jax.Array, k: jax.Array) -> str | None:
  ways = split.ways(1)
  heads, groups = (x.shape[2] // split.ways(2) for x in (q, k))
  if heads % ways:
    return f"{heads} query heads on a device do not divide by the {ways} parts of the length"
  if groups % ways and ways % groups:
    return (
      f"{groups} key heads on a device and {ways} parts of the length do not divide one another"
    )
  return None


@strategy("ulysses", _unfit)
def ulysses(
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

  Key heads that are fewer than the parts go to several devices.
  """
  ways = lax.axis_size(axes)
  copies = max(1, ways // k.shape[2])
  q, k, v = (_to_heads(x, axes) for x in (q, *(jnp.repeat(x, copies, axis=2) for x in (k, v))))
  names = [f"{side}_{mark}" for side in ("q", "kv") for mark in ("pos", "seg", "span")]
  marks = gathered(axes, tuple(getattr(mask, name) for name in names))
  mask = dataclasses.replace(mask, **dict(zip(names, marks, strict=True)))
  if sink is not None:
    here = q.shape[2]
    sink = lax.dynamic_slice_in_dim(sink, lax.axis_index(axes) * here, here)
  out = inner(q, k, v, mask, scores, sink)
  return lax.all_to_all(out, axes, split_axis=1, concat_axis=2, tiled=True)


def _to_heads(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """All heads of a part of the length -> a part of the heads over the whole length."""
  return lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)
