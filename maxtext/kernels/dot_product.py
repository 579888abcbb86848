"""The reference kernel: plain einsums over all scores. Every other kernel is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, register
from maxtext.kernels.dropout import kept
from maxtext.masks import Mask


@register("dot_product")
def dot_product(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; holds the scores [b h t s] in float32.

  The softmax is float32. A row that may see nothing gives zeros.
  """
  b, t, h, d = q.shape
  s, g = k.shape[1:3]
  if scores.f32_product:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  q = q.reshape(b, t, g, h // g, d)
  logits = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scores.scale
  if scores.soft_cap is not None:
    logits = scores.soft_cap * jnp.tanh(logits / scores.soft_cap)
  seen = mask.dense()[:, None, None]  # [b 1 1 t s]
  logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
  top = logits.max(-1, keepdims=True)
  if sink is not None:
    bias = sink.astype(jnp.float32).reshape(g, h // g, 1, 1)
    top = jnp.maximum(top, bias)
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
  total = weights.sum(-1, keepdims=True)
  total = total if sink is None else total + jnp.exp(bias - top)
  weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
  if seed is not None and scores.dropout:
    keep = kept(seed, scores.dropout, (b, h), jnp.arange(t), jnp.arange(s))
    weights = weights * keep.reshape(weights.shape)
  y = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v).reshape(b, t, h, v.shape[-1])
  return checkpoint_name(y, OUT)
