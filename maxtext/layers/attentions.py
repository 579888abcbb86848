"""Attention with grouped heads: project, normalise, rotate, attend, project back."""

from __future__ import annotations

from typing import Protocol, TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext import kernels
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, Dense
from maxtext.layers.rope import rotate
from maxtext.masks import Mask
from maxtext.sharding import constrain
from maxtext.specs import AttentionSpec

C = TypeVar("C", bound="Cache")


class Cache(Protocol):
  """What a layer needs of a cache: keep new keys and values, answer with all that are held."""

  def at(self: C, layer: jax.Array | None) -> C:
    """The same cache, open at one of the layers it holds; None: closed."""

  def append(
    self: C, k: jax.Array, v: jax.Array, mask: Mask
  ) -> tuple[C, jax.Array, jax.Array, Mask]:
    """k, v [b t g k] and their mask -> the cache, keys and values [b s g k], and the mask over [b t
    s].
    """


class Attention(nnx.Module):
  """x [b t d] -> [b t d]: grouped-query attention of one layer, as its spec describes."""

  def __init__(self, spec: AttentionSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec, self.compute = spec, compute
    heads = {"q_heads": spec.heads, "kv": spec.head_dim}
    groups = {"kv_heads": spec.kv_heads, "kv_head_dim": spec.head_dim}
    self.query = Dense(rngs, compute, "btd,dhk->bthk", bias=spec.bias, embed=width, **heads)
    self.key = Dense(rngs, compute, "btd,dgk->btgk", bias=spec.bias, embed=width, **groups)
    self.value = Dense(rngs, compute, "btd,dgk->btgk", bias=spec.bias, embed=width, **groups)
    self.out = Dense(
      rngs,
      compute,
      "bthk,hkd->btd",
      bias=spec.bias,
      heads=spec.heads,
      kv=spec.head_dim,
      embed=width,
    )
    norm = lambda: spec.qk_norm and make_norm(spec.qk_norm, spec.head_dim, compute, rngs)
    self.query_norm, self.key_norm = norm(), norm()

  def __call__(
    self, x: jax.Array, mask: Mask, cache: C | None = None
  ) -> tuple[jax.Array, C | None]:
    """With a cache, earlier keys and values come from it, and it comes back with the new ones."""
    spec = self.spec
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.query_norm is not None and self.key_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    if spec.rope is not None:
      q, k = rotate(q, mask.q_pos, spec.rope), rotate(k, mask.q_pos, spec.rope)
    q = checkpoint_name(_place(q, "activation_heads"), "query_proj")
    k = checkpoint_name(_place(k, "activation_kv_heads"), "key_proj")
    v = checkpoint_name(_place(v, "activation_kv_heads"), "value_proj")
    if cache is not None:
      cache, k, v, mask = cache.append(k, v, mask)
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    scores = kernels.Scores(scale, spec.soft_cap, self.compute.f32_scores)
    y = kernels.attend(self.compute.kernel, q, k, v, mask.narrow(spec.window), scores)
    y = _place(y, "activation_heads")  # tagged by the kernel, with what else its gradient needs
    return checkpoint_name(self.out(y), "out_proj"), cache


def _place(x: jax.Array, heads: str) -> jax.Array:
  """Constrain x [b t heads k]."""
  return constrain(x, "activation_batch", "activation_length", heads, "activation_kv")
