"""Context parallelism in which keys and values go round the devices, and queries stay.

Ring attention (Liu et al. 2023) by true positions: parts of the result are put together by their
log-sums, whatever tokens stand where, so an order that balances the causal work needs no change.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, blockwise
from maxtext.kernels.context import Inner, strategy
from maxtext.kernels.options import Options
from maxtext.kernels.split import Split
from maxtext.masks import Mask


def _unfit(options: Options, split: Split, q: jax.Array, k: jax.Array) -> str | None:
  if options.kernel in ("autoselected", "blockwise"):
    return None
  return f"it computes by 'blockwise', not by {options.kernel!r}; use attention=autoselected"


@strategy("ring", _unfit)
def ring(
  inner: Inner,
  axes: tuple[str, ...],
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k], parts of the length -> [b t h k].

  A device holds two parts of the keys and values at a time; the backward pass sends them round
  again, and their gradients with them. Tiles in which nobody sees anybody cost nothing.
  """
  out, norm = _attention(axes, scores, q, k, v, mask)
  return out if sink is None else blockwise.with_sink(out, norm, sink)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(axes, scores: Scores, q, k, v, mask: Mask) -> tuple[jax.Array, jax.Array]:
  return _forward(axes, scores, q, k, v, mask)[0]


def _forward(axes, scores: Scores, q, k, v, mask: Mask):
  keys = (k, v, mask.kv_pos, mask.kv_seg, mask.kv_span)

  def part(keys):
    k, v, *marks = keys
    out, norm = blockwise.forward(scores, q, k, v, mask.over(*marks), None)
    return out.astype(jnp.float32), norm

  def step(carry, _):
    keys, out, norm = carry
    following = _sent(keys, axes)
    more, more_norm = part(keys)
    return (following, *_together(out, norm, more, more_norm)), None

  nothing = (
    jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32),
    jnp.full(q.shape[:-1], blockwise.FLOOR, jnp.float32),
  )
  (keys, out, norm), _ = lax.scan(step, (keys, *nothing), length=lax.axis_size(axes) - 1)
  out, norm = _together(out, norm, *part(keys))
  out, norm = checkpoint_name(out.astype(v.dtype), OUT), checkpoint_name(norm, OUT)
  return (out, norm), (q, k, v, mask, out, norm)


def _backward(axes, scores: Scores, saved, cotangents: tuple[jax.Array, jax.Array]):
  q, k, v, mask, out, norm = saved

  def part(keys, sums):
    k, v, *marks = keys
    tokens = (q, k, v, mask.over(*marks), None, out, norm)
    more = blockwise.backward(scores, tokens, cotangents)[:3]
    return tuple(x + y.astype(jnp.float32) for x, y in zip(sums, more, strict=True))

  def step(carry, _):
    keys, sums = carry
    following = _sent(keys, axes)
    dq, *others = part(keys, sums)
    return (following, (dq, *_sent(others, axes))), None

  keys = (k, v, mask.kv_pos, mask.kv_seg, mask.kv_span)
  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  (keys, sums), _ = lax.scan(step, (keys, start), length=lax.axis_size(axes) - 1)
  dq, *others = part(keys, sums)
  dk, dv = _sent(others, axes)  # home, after as many steps as there are devices
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _together(out, norm, more, more_norm) -> tuple[jax.Array, jax.Array]:
  """Two results [b t h k] over different keys, with their log-sums [b t h], as one over both."""
  both = jnp.logaddexp(norm, more_norm)
  weigh = lambda x, part: x * jnp.exp(part - both)[..., None]
  return weigh(out, norm) + weigh(more, more_norm), both


def _sent(parts, axes: tuple[str, ...]):
  """What the device before this one holds, for every array among `parts`."""
  ways = lax.axis_size(axes)
  following = [(i, (i + 1) % ways) for i in range(ways)]
  return jax.tree.map(lambda x: lax.ppermute(x, axes, following), parts)
