"""One residual block: the wiring that a BlockSpec names, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.delta import DeltaNet
from maxtext.layers.grouped import C, GroupedAttention, Pair
from maxtext.layers.latent import LatentAttention
from maxtext.layers.mlp import Mlp
from maxtext.layers.moe import Moe
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute
from maxtext.layers.routing import Routed
from maxtext.masks import Mask
from maxtext.sharding import STREAM, constrain, joined
from maxtext.specs import BlockSpec


class Block(nnx.Module):
  """x [b t d] -> [b t d]: x + mixer(norm(x)), then x + mlp(norm(x)), as the spec varies it."""

  def __init__(self, spec: BlockSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec = spec
    norm = lambda wanted: make_norm(spec.norm, width, compute, rngs) if wanted else None
    self.attention_norm = norm(spec.pre_norm)
    self.delta = spec.delta and DeltaNet(spec.delta, width, compute, rngs)
    layer = LatentAttention if spec.attention and spec.attention.latent else GroupedAttention
    self.attention = spec.attention and layer(spec.attention, width, compute, rngs)
    self.post_attention_norm = norm(spec.post_attention_norm)
    self.mlp_norm = norm(spec.pre_norm)
    self.mlp = None if spec.mlp is None else Mlp(spec.mlp, width, compute, rngs)
    self.moe = None if spec.moe is None else Moe(spec.moe, width, compute, rngs)
    self.post_mlp_norm = norm(spec.post_mlp_norm)

  def __call__(
    self,
    x: jax.Array,
    mask: Mask,
    cache: C | None = None,
    key: jax.Array | None = None,
    taken: Pair | None = None,
  ) -> tuple[jax.Array, C | None, Routed | None]:
    """x, the cache with its tokens, and what a mixture of experts says of its routing. `key` draws
    dropout; without it there is none. With a cache no expert drops a token. `taken` are keys and
    values that attention does not make, as keys_values does.
    """
    spec = self.spec
    keys = (None, None) if key is None else jax.random.split(key)
    seed = None
    if key is not None and spec.attention is not None and spec.attention.dropout:
      seed = jax.random.bits(jax.random.fold_in(key, 2), (2,), jnp.uint32)
    mixer = self.attention if self.delta is None else self.delta
    more = {} if taken is None else {"taken": taken}
    y, cache = mixer(joined(_normed(self.attention_norm, x)), mask, cache, seed, **more)
    between = self._add(x, _normed(self.post_attention_norm, y), keys[0])
    x = joined(_normed(self.mlp_norm, x if spec.parallel else between))
    y, routed = self._feed(x, mask, dropless=cache is not None)
    return self._add(between, _normed(self.post_mlp_norm, y), keys[1]), cache, routed

  def keys_values(self, x: jax.Array, mask: Mask) -> Pair:
    """x [b t d] -> the keys and values [b t g k] of the block's attention."""
    return self.attention.keys_values(joined(_normed(self.attention_norm, x)), mask)

  def _feed(self, x: jax.Array, mask: Mask, dropless: bool) -> tuple[jax.Array, Routed | None]:
    if self.mlp is not None:
      return self.mlp(x), None
    real = jnp.ones(x.shape[:2], bool) if mask.q_seg is None else mask.q_seg != 0
    return self.moe(x, real, dropless)

  def _add(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
    if self.spec.residual_scale != 1:
      y = y * self.spec.residual_scale
    return constrain(x + drop(constrain(y, *STREAM), self.spec.dropout, key), *STREAM)


def _normed(norm: nnx.Module | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """x with a share `rate` of its elements zeroed and the rest scaled to keep the mean; x without a
  key.
  """
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
