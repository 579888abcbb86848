"""One residual block: the wiring that a BlockSpec names, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.grouped import C, GroupedAttention
from maxtext.layers.latent import LatentAttention
from maxtext.layers.mlp import Mlp
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.sharding import constrain
from maxtext.specs import BlockSpec


class Block(nnx.Module):
  """x [b t d] -> [b t d]: x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, spec: BlockSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec = spec
    self.attention_norm = make_norm(spec.norm, width, compute, rngs)
    layer = LatentAttention if spec.attention.latent else GroupedAttention
    self.attention = layer(spec.attention, width, compute, rngs)
    self.mlp_norm = make_norm(spec.norm, width, compute, rngs)
    self.mlp = Mlp(spec.mlp, width, compute, rngs)

  def __call__(
    self, x: jax.Array, mask: Mask, cache: C | None = None, key: jax.Array | None = None
  ) -> tuple[jax.Array, C | None]:
    """`key` draws dropout; without it there is none."""
    keys = (None, None) if key is None else jax.random.split(key)
    seed = None
    if key is not None and self.spec.attention.dropout:
      seed = jax.random.bits(jax.random.fold_in(key, 2), (2,), jnp.uint32)
    y, cache = self.attention(self.attention_norm(x), mask, cache, seed)
    x = _place(x + drop(y, self.spec.dropout, keys[0]))
    x = _place(x + drop(self.mlp(self.mlp_norm(x)), self.spec.dropout, keys[1]))
    return x, cache


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """x with a share `rate` of its elements zeroed and the rest scaled to keep the mean; x without a
  key.
  """
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _place(x: jax.Array) -> jax.Array:
  return constrain(x, "activation_batch", "activation_length", "activation_embed")
