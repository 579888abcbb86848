"""Attention in linear memory: blocks of queries meet, one by one, the blocks of keys they may see.

FlashAttention-2 (Dao 2023) in plain JAX. The forward pass carries each query's running maximum and
sum, and keeps the output and the log of the sum; the backward pass computes a tile's weights again
from those. Tiles in which no query may see a key are left out: they are found as the program runs,
from the true positions and segments, so this holds for packed, shuffled and cached tokens too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, register
from maxtext.masks import Mask

# A tile is _LEAST to _MOST tokens on a side; in between, as large as leaves its scores over all
# rows and heads in a processor's cache (on CPU 0.25 to 1 M scores take the same time, 2 M longer).
_LEAST, _MOST, _TILE = 128, 512, 2**19
_HIDDEN = float(jnp.finfo(jnp.float32).min)
_FLOOR = _HIDDEN / 2  # where a row's maximum starts: exp(_HIDDEN - _FLOOR) is 0, not 1
_TINY = float(jnp.finfo(jnp.float32).tiny)


@register("blockwise")
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scores: Scores) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; memory grows with t + s.

  Scores, softmax and all sums are float32; the weights meet the values in the values' dtype. A row
  that may see nothing gives zeros. Any mask, any lengths; differentiable once, in reverse mode.
  """
  return _attention(scores, q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scores: Scores, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
  return _forward(scores, q, k, v, mask)[0]


def _forward(scores: Scores, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask):
  plan = _Plan.of(q, k, mask)
  keys, values = plan.cut_keys(k), plan.cut_keys(v)

  def row(_, part):
    q, queries, order, count = part

    def tile(i, carry):
      top, total, out = carry
      j = order[i]
      x, _ = _scores(scores, q, keys[j], mask, queries, plan.keys.at(j))
      new_top = jnp.maximum(top, x.max(-1))
      weights = jnp.exp(x - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      more = _product("bgrts,bgsk->bgrtk", weights.astype(v.dtype), values[j])
      return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + more

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = (zeros + _FLOOR, zeros, jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32))
    top, total, out = lax.fori_loop(0, count, tile, start)
    total = jnp.maximum(total, _TINY)
    return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

  _, (out, norm) = lax.scan(row, None, (plan.cut_queries(q), plan.queries, plan.order, plan.count))
  out, norm = checkpoint_name(plan.join_queries(out), OUT), checkpoint_name(norm, OUT)
  return out, (q, k, v, mask, out, norm)


def _backward(scores: Scores, saved, d_out: jax.Array):
  """One sweep over the tiles: queries carry their gradient, the keys' is added up in place."""
  q, k, v, mask, out, norm = saved
  plan = _Plan.of(q, k, mask)
  keys, values = plan.cut_keys(k), plan.cut_keys(v)
  # sum over s of weight * its gradient = out . d_out, for every query
  share = jnp.einsum("bthk,bthk->bth", out, d_out, preferred_element_type=jnp.float32)
  share = plan.cut_queries(share[..., None])[..., 0]

  def row(carry, part):
    q, d_out, share, norm, queries, order, count = part

    def tile(i, carry):
      dq, dk, dv = carry
      j = order[i]
      x, slope = _scores(scores, q, keys[j], mask, queries, plan.keys.at(j))
      weights = jnp.exp(x - norm[..., None])
      dx = weights * (_product("bgrtk,bgsk->bgrts", d_out, values[j]) - share[..., None]) * slope
      dx = dx.astype(jnp.float32 if scores.f32_product else q.dtype)
      dq = dq + _product("bgrts,bgsk->bgrtk", dx, keys[j])
      dk = _add_at(dk, j, _product("bgrts,bgrtk->bgsk", dx, q))
      dv = _add_at(dv, j, _product("bgrts,bgrtk->bgsk", weights.astype(v.dtype), d_out))
      return dq, dk, dv

    dq, dk, dv = lax.fori_loop(0, count, tile, (jnp.zeros(q.shape, jnp.float32), *carry))
    return (dk, dv), dq.astype(q.dtype)

  blocks = (plan.cut_queries(q), plan.cut_queries(d_out), share, norm)
  start = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
  (dk, dv), dq = lax.scan(row, start, (*blocks, plan.queries, plan.order, plan.count))
  dk, dv = plan.join_keys(dk), plan.join_keys(dv)
  return plan.join_queries(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _scores(
  scores: Scores, q: jax.Array, k: jax.Array, mask: Mask, queries: _Tokens, keys: _Tokens
) -> tuple[jax.Array, jax.Array | float]:
  """q [b g r t k], k [b g s k] -> a tile's scores [b g r t s], and their derivative by q.k."""
  if scores.f32_product:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  x = _product("bgrtk,bgsk->bgrts", q, k) * scores.scale
  slope: jax.Array | float = scores.scale
  if scores.soft_cap is not None:
    bent = jnp.tanh(x / scores.soft_cap)
    x, slope = scores.soft_cap * bent, scores.scale * (1 - jnp.square(bent))
  tile = dataclasses.replace(
    mask,
    q_pos=queries.positions,
    kv_pos=keys.positions,
    q_seg=queries.segments,
    kv_seg=keys.segments,
  )
  return jnp.where(tile.dense()[:, None, None], x, _HIDDEN), slope


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """The einsum, summed in float32."""
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _add_at(total: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(total, total[j] + x, j, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tokens:
  """Blocks of tokens: positions and segments [n b l]."""

  positions: jax.Array
  segments: jax.Array | None

  @classmethod
  def of(cls, positions: jax.Array, segments: jax.Array | None, side: int) -> _Tokens:
    """Cut [b t] into blocks; what fills the last one is padding, segment 0."""
    if segments is None and positions.shape[1] % side:
      segments = jnp.ones_like(positions)
    return cls(_cut(positions, side), None if segments is None else _cut(segments, side))

  def at(self, j: jax.Array) -> _Tokens:
    """Block j: [b l]."""
    return jax.tree.map(lambda x: x[j], self)

  def ranges(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest of `values` [n b l] that are not padding, per block: [n b]."""
    true = True if self.segments is None else self.segments != 0
    end = jnp.iinfo(values.dtype).max
    return jnp.where(true, values, end).min(-1), jnp.where(true, values, -end).max(-1)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How tokens are cut into blocks, and which tiles are visited.

  For every block of queries, `order` [n m] lists first the `count` [n] blocks of keys to visit.
  """

  queries: _Tokens
  keys: _Tokens
  order: jax.Array
  count: jax.Array
  lengths: tuple[int, int]
  sides: tuple[int, int]
  groups: int

  @classmethod
  def of(cls, q: jax.Array, k: jax.Array, mask: Mask) -> _Plan:
    """The plan for q [b t h k], k [b s g k]."""
    b, t, h, _ = q.shape
    s, g = k.shape[1:3]
    sides = _side(t, b * h), _side(s, b * h)
    q_seg, kv_seg = mask.q_seg, mask.kv_seg
    if q_seg is None and (t % sides[0] or s % sides[1]):
      q_seg, kv_seg = jnp.ones_like(mask.q_pos), jnp.ones_like(mask.kv_pos)
    queries = _Tokens.of(mask.q_pos, q_seg, sides[0])
    keys = _Tokens.of(mask.kv_pos, kv_seg, sides[1])
    seen = _visible(mask, queries, keys)
    order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)
    return cls(queries, keys, order, seen.sum(1, dtype=jnp.int32), (t, s), sides, g)

  def cut_queries(self, x: jax.Array) -> jax.Array:
    """[b t h k] -> [n b g r l k]."""
    x = _cut(x, self.sides[0])
    n, b, side, h, k = x.shape
    return jnp.einsum("nblgrk->nbgrlk", x.reshape(n, b, side, self.groups, h // self.groups, k))

  def join_queries(self, x: jax.Array) -> jax.Array:
    """[n b g r l k] -> [b t h k]."""
    n, b, g, r, side, k = x.shape
    x = jnp.einsum("nbgrlk->bnlgrk", x).reshape(b, n * side, g * r, k)
    return x[:, : self.lengths[0]]

  def cut_keys(self, x: jax.Array) -> jax.Array:
    """[b s g k] -> [n b g l k]."""
    return jnp.einsum("nblgk->nbglk", _cut(x, self.sides[1]))

  def join_keys(self, x: jax.Array) -> jax.Array:
    """[n b g l k] -> [b s g k]."""
    n, b, g, side, k = x.shape
    return jnp.einsum("nbglk->bnlgk", x).reshape(b, n * side, g, k)[:, : self.lengths[1]]


def _visible(mask: Mask, queries: _Tokens, keys: _Tokens) -> jax.Array:
  """[n m]: False only where no query of block n can see a key of block m, in any row of the batch.

  Ranges are compared, so that it may be True for an empty tile; this costs time, not truth.
  """

  def between(name: str) -> tuple[jax.Array, ...]:
    q, k = queries.ranges(getattr(queries, name)), keys.ranges(getattr(keys, name))
    return (*(x[:, None] for x in q), *(x[None] for x in k))

  q_least, q_most, k_least, k_most = between("positions")
  seen = (q_least <= q_most) & (k_least <= k_most)
  if mask.causal:
    seen &= q_most >= k_least
  if mask.window is not None:
    seen &= q_least - k_most < mask.window
  if queries.segments is not None:
    q_least, q_most, k_least, k_most = between("segments")
    seen &= (q_least <= k_most) & (k_least <= q_most)
  return seen.any(-1)


def _side(length: int, rows: int) -> int:
  """How many of `length` tokens make a block, for `rows` = batch x heads."""
  side = _LEAST
  while side < _MOST and 8 * side <= length and 4 * side * side * rows <= _TILE:
    side *= 2
  if length <= side:
    return length
  even = -(-length // -(-length // side))  # the same number of blocks, all of nearly the same size
  return -(-even // 8) * 8


def _cut(x: jax.Array, side: int) -> jax.Array:
  """[b t ...] -> [n b l ...], the last block filled with zeros."""
  n = -(-x.shape[1] // side)
  x = jnp.pad(x, [(0, 0), (0, n * side - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], n, side, *x.shape[2:]), 1, 0)
