"""Dropout of attention weights that does not depend on how a kernel cuts its work."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def kept(
  seed: jax.Array, rate: float, shape: tuple[int, int], queries: jax.Array, keys: jax.Array
) -> jax.Array:
  """What a weight is multiplied with, 0 or 1 / (1 - rate): [b h t s] for shape = (b, h).

  A function of seed [2] and of the weight's row, head, query [t] and key [s] alone: two rounds of
  MurmurHash3's finaliser over those numbers (Appleby 2011), so that every kernel drops the same.
  """
  row = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
  row = _mix(row * jnp.uint32(0x9E3779B9) ^ seed[0])
  query = _mix(row[..., None] + queries.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))
  key = keys.astype(jnp.uint32) * jnp.uint32(0xC2B2AE35) + seed[1]
  bits = _mix(query[..., None] ^ _mix(key))
  return jnp.where(bits >= jnp.uint32(int(rate * 2**32)), 1 / (1 - rate), 0.0)


def _mix(x: jax.Array) -> jax.Array:
  """A permutation of uint32 in which every bit depends on every other."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
