"""Attention in linear memory: blocks of queries meet, one by one, the blocks of keys they may see.

FlashAttention-2 (Dao 2023) in plain JAX. The forward pass carries each query's running maximum and
sum, and keeps the output and the log of the sum; the backward pass computes a tile's weights again
from those. Tiles in which no query may see a key are left out: they are found as the program runs,
from the true positions and segments, so this holds for packed, shuffled and cached tokens too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, register
from maxtext.kernels.dropout import kept
from maxtext.masks import Mask

# A tile is _LEAST to _MOST tokens on a side; in between, as large as leaves its scores over all
# rows and heads in a processor's cache (on CPU 0.25 to 1 M scores take the same time, 2 M longer).
_LEAST, _MOST, _TILE = 128, 512, 2**19
_HIDDEN = float(jnp.finfo(jnp.float32).min)
FLOOR = _HIDDEN / 2  # where a row's maximum starts: exp(_HIDDEN - FLOOR) is 0, not 1
_TINY = float(jnp.finfo(jnp.float32).tiny)


@register("blockwise")
def blockwise(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; memory grows with t + s.

  Scores, softmax and all sums are float32; the weights meet the values in the values' dtype. A row
  that may see nothing gives zeros. Any mask, any lengths; differentiable once, in reverse mode.
  """
  out, norm = partial(q, k, v, mask, scores, seed)
  return out if sink is None else with_sink(out, norm, sink)


def partial(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  seed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """As `blockwise`, and the log of each query's sum of exponentials, float32 [b t h].

  Where no key is seen it is far below any score, so that parts can be put together.
  """
  return _attention(scores, q, k, v, mask, seed)


def with_sink(out: jax.Array, norm: jax.Array, sink: jax.Array) -> jax.Array:
  """out [b t h k] of queries with sums norm [b t h], once score sink [h] is among their keys."""
  share = jax.nn.sigmoid(norm - sink.astype(jnp.float32))
  return (out * share[..., None]).astype(out.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scores: Scores, q, k, v, mask: Mask, seed) -> tuple[jax.Array, jax.Array]:
  return _forward(scores, q, k, v, mask, seed)[0]


def _forward(scores: Scores, q, k, v, mask: Mask, seed):
  out, norm = (checkpoint_name(x, OUT) for x in forward(scores, q, k, v, mask, seed))
  return (out, norm), (q, k, v, mask, seed, out, norm)


def forward(scores: Scores, q, k, v, mask: Mask, seed) -> tuple[jax.Array, jax.Array]:
  """As `partial`, without names for what it finds and without a gradient."""
  plan = _Plan.of(q, k, mask)
  keys, values = plan.cut_keys(k), plan.cut_keys(v)
  drop = _dropout(plan, scores, seed)

  def row(_, part):
    i, q, queries, order, count = part

    def tile(n, carry):
      top, total, out = carry
      j = order[n]
      x, _ = _scores(scores, q, keys[j], mask, queries, plan.keys.at(j))
      new_top = jnp.maximum(top, x.max(-1))
      weights = jnp.exp(x - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      more = _product("bgrts,bgsk->bgrtk", drop(weights, i, j).astype(v.dtype), values[j])
      return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + more

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = (zeros + FLOOR, zeros, jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32))
    top, total, out = lax.fori_loop(0, count, tile, start)
    total = jnp.maximum(total, _TINY)
    return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

  _, (out, norm) = lax.scan(row, None, plan.rows(plan.cut_queries(q)))
  return plan.join_queries(out), plan.join_queries(norm[..., None])[..., 0]


def backward(scores: Scores, saved, cotangents: tuple[jax.Array, jax.Array]):
  """The gradients by q, k, v (mask and seed have none), from what the forward pass found.

  `saved` is q, k, v, mask, seed, out, norm; out and norm may be those of a softmax over more keys
  than k, then these are its gradients. One sweep over the tiles: queries carry their gradient, the
  keys' is added up in place.
  """
  (q, k, v, mask, seed, out, norm), (d_out, d_norm) = saved, cotangents
  plan = _Plan.of(q, k, mask)
  keys, values = plan.cut_keys(k), plan.cut_keys(v)
  drop = _dropout(plan, scores, seed)
  # sum over s of weight * its gradient = out . d_out, for every query
  share = jnp.einsum("bthk,bthk->bth", out, d_out, preferred_element_type=jnp.float32) - d_norm
  share, norm = (plan.cut_queries(x[..., None])[..., 0] for x in (share, norm))

  def row(carry, part):
    i, q, queries, order, count, d_out, share, norm = part

    def tile(n, carry):
      dq, dk, dv = carry
      j = order[n]
      x, slope = _scores(scores, q, keys[j], mask, queries, plan.keys.at(j))
      weights = jnp.exp(x - norm[..., None])
      dweights = drop(_product("bgrtk,bgsk->bgrts", d_out, values[j]), i, j)
      dx = weights * (dweights - share[..., None]) * slope
      dx = dx.astype(jnp.float32 if scores.f32_product else q.dtype)
      dq = dq + _product("bgrts,bgsk->bgrtk", dx, keys[j])
      dk = _add_at(dk, j, _product("bgrts,bgrtk->bgsk", dx, q))
      weights = drop(weights, i, j).astype(v.dtype)
      dv = _add_at(dv, j, _product("bgrts,bgrtk->bgsk", weights, d_out))
      return dq, dk, dv

    dq, dk, dv = lax.fori_loop(0, count, tile, (jnp.zeros(q.shape, jnp.float32), *carry))
    return (dk, dv), dq.astype(q.dtype)

  blocks = plan.rows(plan.cut_queries(q), plan.cut_queries(d_out), share, norm)
  start = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
  (dk, dv), dq = lax.scan(row, start, blocks)
  dk, dv = plan.join_keys(dk), plan.join_keys(dv)
  return plan.join_queries(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, backward)


def _dropout(plan: _Plan, scores: Scores, seed: jax.Array | None) -> Callable:
  """(weights [b g r t s] of tile i, j) -> those that are kept, scaled."""
  if seed is None or not scores.dropout:
    return lambda weights, i, j: weights

  def drop(weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    b, g, r, t, s = weights.shape
    queries, keys = i * t + jnp.arange(t), j * s + jnp.arange(s)
    return weights * kept(seed, scores.dropout, (b, g * r), queries, keys).reshape(weights.shape)

  return drop


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
    q_span=queries.spans,
    kv_span=keys.spans,
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
  """Blocks of tokens: positions, segments and spans [n b l]."""

  positions: jax.Array
  segments: jax.Array | None
  spans: jax.Array | None

  @classmethod
  def of(cls, side: int, positions: jax.Array, *marks: jax.Array | None) -> _Tokens:
    """Cut positions, segments, spans [b t] into blocks; padding fills the last one, segment 0."""
    segments, spans = (None if mark is None else _cut(mark, side) for mark in marks)
    return cls(_cut(positions, side), segments, spans)

  def at(self, j: jax.Array) -> _Tokens:
    """Block j: [b l]."""
    return jax.tree.map(lambda x: x[j], self)

  def ranges(self, name: str) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest positions, segments or spans of each block [n b].

    Of tokens that are not padding; of spans, those of tokens that are in one.
    """
    values = getattr(self, name)
    true = True if self.segments is None else self.segments != 0
    true &= True if name != "spans" else values != 0
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
    queries = _Tokens.of(sides[0], mask.q_pos, q_seg, mask.q_span)
    keys = _Tokens.of(sides[1], mask.kv_pos, kv_seg, mask.kv_span)
    seen = _visible(mask, queries, keys)
    order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)
    return cls(queries, keys, order, seen.sum(1, dtype=jnp.int32), (t, s), sides, g)

  def rows(self, q: jax.Array, *more: jax.Array) -> tuple:
    """What is scanned over: the block's number, queries, marks, the tiles to visit, and `more`."""
    return jnp.arange(q.shape[0]), q, self.queries, self.order, self.count, *more

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
    q, k = queries.ranges(name), keys.ranges(name)
    return (*(x[:, None] for x in q), *(x[None] for x in k))

  q_least, q_most, k_least, k_most = between("positions")
  real = (q_least <= q_most) & (k_least <= k_most)
  seen = real
  if mask.block is not None:
    seen &= q_most // mask.block >= k_least // mask.block
  elif mask.causal:
    seen &= q_most >= k_least
  if mask.window is not None:
    seen &= q_least - k_most < mask.window
  if (chunk := mask.chunk) is not None:
    seen &= (q_least // chunk <= k_most // chunk) & (k_least // chunk <= q_most // chunk)
  if queries.spans is not None:
    q_least, q_most, k_least, k_most = between("spans")
    seen |= real & (q_least <= k_most) & (k_least <= q_most)
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
