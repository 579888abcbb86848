"""The reference kernel: plain einsums over all scores. Every other kernel is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxtext.kernels import OUT, Scores, register
from maxtext.masks import Mask


@register("dot_product")
def dot_product(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scores: Scores) -> jax.Array:
  """q [b t h k], k [b s g k], v [b s g k] -> [b t h k]; holds the scores [b h t s] in float32.

  The softmax is float32. A row that may see nothing gives zeros.
  """
  b, t, h, d = q.shape
  g = k.shape[2]
  if scores.f32_product:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  q = q.reshape(b, t, g, h // g, d)
  logits = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scores.scale
  if scores.soft_cap is not None:
    logits = scores.soft_cap * jnp.tanh(logits / scores.soft_cap)
  seen = mask.dense()[:, None, None]  # [b 1 1 t s]
  logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  weights = jnp.where(seen, weights, 0.0)
  weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  y = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v).reshape(b, t, h, v.shape[-1])
  return checkpoint_name(y, OUT)
