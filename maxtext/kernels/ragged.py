"""Attention over rows of different lengths: of a cache only the blocks that a query sees are read.

For decoding: few queries, and many slots of which most are empty, or out of a layer's window. Plain
JAX; per row a loop over that row's own blocks, with the running maximum and sum of FlashAttention
(Dao 2022).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxtext.errors import ConfigError
from maxtext.kernels import OUT, Scores, register
from maxtext.kernels.held import Held, block, step
from maxtext.masks import Mask

MOST = 1024  # queries of a row: all of them meet each block at once
_HIDDEN = float(jnp.finfo(jnp.float32).min)
_TINY = float(jnp.finfo(jnp.float32).tiny)


def _unfit(q: jax.Array, k, v, mask: Mask, scores: Scores, sink=None, seed=None) -> str | None:
  if q.shape[1] > MOST:
    return f"it is for decoding, with up to {MOST} queries at once, and these are {q.shape[1]}"
  return "it is for decoding, and has no dropout" if seed is not None else None


@register("ragged", _unfit, reads_held=True)
def ragged(
  q: jax.Array,
  k: jax.Array | Held,
  v: jax.Array | Held,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; reads only blocks that a query sees.

  Any mask over any slots. Scores, softmax and all sums are float32; the weights meet the values in
  the values' dtype. A row that may see nothing gives zeros. It has no gradient: ConfigError.
  """
  return checkpoint_name(_attention(scores, q, k, v, mask, sink), OUT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(scores: Scores, q, k, v, mask: Mask, sink) -> jax.Array:
  size = min(step(k), step(v))
  seen = mask.dense().any(1)  # [b s]
  order, count = _visits(seen, size)
  sides = _Sides(size, k.shape[1])

  def row(i: jax.Array) -> jax.Array:
    return _row(scores, q[i], (k, v), (i, order[i], count[i]), (mask, sides), sink)

  return lax.map(row, jnp.arange(q.shape[0], dtype=jnp.int32))


@_attention.defjvp
def _refuse(scores: Scores, primals, tangents):
  raise ConfigError("attention", "'ragged' has no gradient: it is for decoding; use 'autoselected'")


class _Sides:
  """Blocks of `size` slots among `slots`; the last begins earlier, so that it ends with them."""

  def __init__(self, size: int, slots: int):
    self.size, self.last = size, slots - size

  def at(self, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where block j begins, and which of its slots no block before it has: bool [size]."""
    begin = jnp.minimum(j * self.size, self.last).astype(jnp.int32)
    return begin, begin + jnp.arange(self.size) >= j * self.size


def _visits(seen: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """seen [b s] -> the blocks of each row [b n], first those `count` [b] in which a slot is seen."""
  slots = seen.shape[1]
  n = -(-slots // size)
  seen = jnp.pad(seen, [(0, 0), (0, n * size - slots)]).reshape(-1, n, size).any(-1)
  order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)
  return order, seen.sum(1, dtype=jnp.int32)


def _row(scores: Scores, q, kv, visits, tiles, sink) -> jax.Array:
  """q [t h k] of row i -> [t h k]."""
  (k, v), (i, order, count), (mask, sides) = kv, visits, tiles
  t, h, _ = q.shape
  g = k.shape[2]
  q = q.reshape(t, g, h // g, -1)

  def visit(n: jax.Array, carry):
    top, total, out = carry
    begin, own = sides.at(order[n])
    x = _scores(scores, q, block(k, i, begin, sides.size))
    seen = (_tile(mask, i, begin, sides.size).dense()[0] & own)[:, None, None]  # [t 1 1 s]
    x = jnp.where(seen, x, _HIDDEN)
    new_top = jnp.maximum(top, x.max(-1))
    weights = jnp.where(seen, jnp.exp(x - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    values = block(v, i, begin, sides.size)
    more = jnp.einsum(
      "tgrs,sgk->tgrk", weights.astype(v.dtype), values, preferred_element_type=jnp.float32
    )
    return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + more

  top, total = jnp.full(q.shape[:3], _HIDDEN), jnp.zeros(q.shape[:3])
  if sink is not None:  # one more score, seen by all, without a value
    top, total = top.at[:].set(sink.astype(jnp.float32).reshape(g, h // g)), total + 1
  start = (top, total, jnp.zeros((*q.shape[:3], v.shape[-1])))
  _, total, out = lax.fori_loop(0, count, visit, start)
  return (out / jnp.maximum(total, _TINY)[..., None]).astype(v.dtype).reshape(t, h, -1)


def _scores(scores: Scores, q: jax.Array, k: jax.Array) -> jax.Array:
  """q [t g r k], k [s g k] -> float32 [t g r s]."""
  if scores.f32_product:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  x = jnp.einsum("tgrk,sgk->tgrs", q, k, preferred_element_type=jnp.float32) * scores.scale
  return x if scores.soft_cap is None else scores.soft_cap * jnp.tanh(x / scores.soft_cap)


def _tile(mask: Mask, i: jax.Array, begin: jax.Array, size: int) -> Mask:
  """The mask of row i over `size` keys: its arrays are [1 t] and [1 size]."""
  parts: dict[str, Any] = {}
  for mark in ("pos", "seg", "span"):
    q, kv = getattr(mask, f"q_{mark}"), getattr(mask, f"kv_{mark}")
    parts[f"q_{mark}"] = None if q is None else lax.dynamic_slice_in_dim(q, i, 1)
    parts[f"kv_{mark}"] = None if kv is None else lax.dynamic_slice(kv, (i, begin), (1, size))
  return dataclasses.replace(mask, **parts)
