"""How the values of an array are distributed, counted where the array lives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Two buckets to the octave, from 2^-24 to 2^8 either side of zero: where weights and gradients lie.
_POWERS = np.exp2(np.arange(-48, 17) / 2)
EDGES = np.concatenate([-_POWERS[::-1], [0.0], _POWERS]).astype(np.float32)


class Histogram(NamedTuple):
  """The finite values of an array: how many are at most each of EDGES, and their first moments."""

  at_most: jax.Array
  size: jax.Array
  least: jax.Array
  most: jax.Array
  total: jax.Array
  squares: jax.Array


def count(arrays: Mapping[str, jax.Array]) -> dict[str, Histogram]:
  """A histogram for each array, computed in one program without gathering any of them."""
  return _program(_everywhere(arrays))(arrays)


Count = Callable[[Mapping[str, jax.Array]], dict[str, Histogram]]


@functools.lru_cache
def _program(result: NamedSharding | None) -> Count:
  """The compiled function whose results stand at `result`."""
  each = lambda arrays: {name: _histogram(x) for name, x in arrays.items()}
  return jax.jit(each, out_shardings=result)


def _everywhere(arrays: Mapping[str, jax.Array]) -> NamedSharding | None:
  """Whole on each device of the arrays' mesh, for every process to read; None on no mesh."""
  for x in arrays.values():
    if isinstance(sharding := getattr(x, "sharding", None), NamedSharding):
      return NamedSharding(sharding.mesh, PartitionSpec())
  return None


def _histogram(x: jax.Array) -> Histogram:
  """Any shape -> its histogram; one pass per edge, so that sharded arrays stay where they are."""
  x = jnp.atleast_1d(x).astype(jnp.float32)
  finite = jnp.isfinite(x)
  at_most = jax.lax.map(lambda edge: _number_of(finite & (x <= edge)), jnp.asarray(EDGES))
  zeros = jnp.where(finite, x, 0.0)
  return Histogram(
    at_most,
    _number_of(finite),
    jnp.where(finite, x, jnp.inf).min(),
    jnp.where(finite, x, -jnp.inf).max(),
    zeros.sum(),
    jnp.square(zeros).sum(),
  )


def _number_of(condition: jax.Array) -> jax.Array:
  """How often it holds, float32; rows are counted in integers, as a large float loses ones."""
  return condition.sum(-1, dtype=jnp.int32).astype(jnp.float32).sum()
