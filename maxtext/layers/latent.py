"""Multi-head latent attention: queries, keys and values by way of low ranks (Liu et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.kernels.held import dense
from maxtext.layers.grouped import PLAIN, C, GroupedAttention, Names, check_projection
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, Dense, DenseInitializer, contract
from maxtext.masks import Mask
from maxtext.sharding import constrain
from maxtext.specs import AttentionSpec


class LatentAttention(GroupedAttention):
  """x [b t d] -> [b t d]: attention whose keys and values are expanded from a latent per token.

  A cache keeps the latent [b s 1 r] as keys and the rotated key that all heads share [b s 1 k] as
  values, or with `expanded_cache` the keys and values themselves; the numbers are the same.
  """

  def __init__(
    self,
    spec: AttentionSpec,
    width: int,
    compute: Compute,
    rngs: nnx.Rngs,
    init: DenseInitializer | None = None,
    kv_width: int | None = None,
  ):
    """As GroupedAttention."""
    self.spec, self.compute, self.init = spec, compute, init
    self.sinks = None
    low = spec.latent
    norm = lambda rank: make_norm(low.norm, rank, compute, rngs)
    if low.q_rank is None:
      self.query = self.init_query_w((0, 0, width), rngs)
    else:
      self.wq_a = self._dense(rngs, "btd,dr->btr", low.bias, embed=width, q_lora_up_proj=low.q_rank)
      self.q_norm = norm(low.q_rank)
      heads = {"q_heads": spec.heads, "kv": spec.head_dim}
      self.wq_b = self._dense(rngs, "btr,rhk->bthk", False, q_lora=low.q_rank, **heads)
    down = low.kv_rank + low.rope_dim
    self.wkv_a = self._dense(
      rngs, "btd,dr->btr", low.bias, embed=kv_width or width, kv_lora_up_proj=down
    )
    self.kv_norm = norm(low.kv_rank)
    self.wkv_b = self.init_kv_w((0, 0, low.kv_rank), rngs)
    self.out = self.init_out_w(width, rngs)

  def init_kv_w(self, inputs_kv_shape: tuple[int, ...], rngs: nnx.Rngs | None = None) -> Dense:
    """The expansion [.. r] -> [.. h k] of latents of this shape, into keys and values together."""
    low = self.spec.latent
    heads = {"kv_heads": self.spec.heads, "kv_head_dim": low.nope_dim + low.value_dim}
    axes = {"kv_lora": inputs_kv_shape[-1], **heads}
    return self._dense(rngs, "btr,rhk->bthk", False, **axes)

  @property
  def out_head_dim(self) -> int:
    """The channels of a head that the output projection takes in."""
    return self.spec.latent.value_dim

  def query_projection(self, inputs_q: jax.Array) -> jax.Array:
    """inputs [b t d] -> queries [b t h k], before the rotation of their last channels."""
    x = self._cast(inputs_q)
    if self.spec.latent.q_rank is None:
      return self.query(x)
    return self.wq_b(self.q_norm(self.wq_a(x)))

  def kv_projection(self, inputs_kv: jax.Array, proj_name: str) -> jax.Array:
    """inputs [b s d] -> 'key' [b s h k], whose last channels are not rotated, or 'value' [b s h v].

    The layer itself expands latents later, after the rotation, and after they have been cached.
    """
    check_projection(proj_name)
    return self.expand(*self.latent_projection(inputs_kv))[0 if proj_name == "key" else 1]

  def latent_projection(self, inputs_kv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """inputs [b s d] -> normalised latents [b s 1 r] and shared keys [b s 1 k] to be rotated."""
    both = self.wkv_a(self._cast(inputs_kv))
    latent, shared = jnp.split(both, [self.spec.latent.kv_rank], axis=-1)
    return self.kv_norm(latent)[:, :, None], shared[:, :, None]

  def expand(self, latent: jax.Array, shared: jax.Array) -> tuple[jax.Array, jax.Array]:
    """latent [b s 1 r], rotated shared key [b s 1 k] -> keys [b s h k] and values [b s h v]."""
    both = self.wkv_b(latent[:, :, 0])
    own, values = jnp.split(both, [self.spec.latent.nope_dim], axis=-1)
    shared = constrain(jnp.broadcast_to(shared, (*own.shape[:3], shared.shape[-1])), *PLAIN.key)
    return jnp.concatenate([own, shared], axis=-1), values

  def _placed(self, names: Names) -> Names:
    """Latents and shared keys have one head, which no axis splits."""
    whole = (*names.key[:2], None, None)
    return dataclasses.replace(names, key=whole, value=whole)

  def _project(
    self, x: jax.Array, kv: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries, latents and shared keys; no gate."""
    return self.query_projection(x), *self.latent_projection(kv), None

  def _prepare(
    self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, positions: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, with the rotary channels of queries and shared keys rotated."""
    if self.spec.rope is None:
      return q, k, v
    own, turned = jnp.split(q, [self.spec.latent.nope_dim], axis=-1)
    turned = self.rotate(turned, mask.q_pos, positions)
    return jnp.concatenate([own, turned], axis=-1), k, self.rotate(v, mask.kv_pos, positions)

  def _attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    cache: C | None,
    seed: jax.Array | None,
  ) -> tuple[jax.Array, C | None]:
    """Values [b t h v], from latents k [b t 1 r] and shared keys v [b t 1 k]."""
    if cache is None or self.spec.latent.expanded_cache:
      keys, values = self.expand(k, v)
      return super()._attend(q, keys, values, mask, cache, seed)
    cache, latent, shared, mask = cache.append(k, v, mask)
    latent, shared = dense(latent), dense(shared)
    nope = self.spec.latent.nope_dim
    weights, axes = self.wkv_b.kernel[...], ("kv_lora", "kv_heads", "kv_head_dim")
    own, turned = jnp.split(q, [nope], axis=-1)
    own = contract("bthk,rhk->bthr", own, weights[:, :, :nope], axes, self.compute)
    q, k = (jnp.concatenate(pair, axis=-1) for pair in ((own, turned), (latent, shared)))
    y, _ = super()._attend(q, k, latent, mask, None, seed)
    return contract("bthr,rhk->bthk", y, weights[:, :, nope:], axes, self.compute), cache
