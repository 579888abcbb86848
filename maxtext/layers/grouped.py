"""Attention with grouped heads: project, normalise, rotate, attend, project back."""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext import kernels
from maxtext.errors import ConfigError
from maxtext.kernels.held import dense
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, Dense, DenseInitializer, param
from maxtext.layers.rope import rotate, rotate_grid
from maxtext.masks import Mask
from maxtext.sharding import constrain
from maxtext.specs import AttentionSpec, TemperatureSpec

LANES = 128  # of a TPU, over which the last dimension of an array lies

C = TypeVar("C", bound="Cache")
Axes = tuple[str | None, ...]
Pair = tuple[jax.Array, jax.Array]


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


@dataclasses.dataclass(frozen=True)
class Names:
  """Logical axes of the activations that an attention layer makes; `input` may be left as it is."""

  query: Axes = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
  key: Axes = ("activation_batch", "activation_length", "activation_kv_heads", "activation_kv")
  value: Axes = ("activation_batch", "activation_length", "activation_kv_heads", "activation_kv")
  out: Axes = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
  input: Axes | None = None


PLAIN = Names()
PROJECTIONS = ("key", "value")


def check_projection(name: str) -> None:
  """Raises ValueError for what is neither the keys nor the values."""
  if name not in PROJECTIONS:
    raise ValueError(f"proj_name must be 'key' or 'value', but got {name}")


class GroupedAttention(nnx.Module):
  """x [b t d] -> [b t d]: grouped-query attention of one layer, as its spec describes."""

  def __init__(
    self,
    spec: AttentionSpec,
    width: int,
    compute: Compute,
    rngs: nnx.Rngs,
    init: DenseInitializer | None = None,
    kv_width: int | None = None,
  ):
    """`init` draws the projections; `kv_width` is that of what keys and values are made from."""
    self.spec, self.compute, self.init = spec, compute, init
    inputs_q, inputs_kv = (0, 0, width), (0, 0, kv_width or width)
    apart, makes = not spec.fused, spec.takes is None
    self.qkv_proj = None if apart else self.init_qkv_w(inputs_q, rngs)
    self.query = self.init_query_w(inputs_q, rngs) if apart else None
    self.key = self.init_kv_w(inputs_kv, rngs) if apart and makes else None
    own_values = apart and makes and not spec.share_kv
    self.value = self.init_kv_w(inputs_kv, rngs) if own_values else None
    self.out = self.init_out_w(width, rngs)
    together = lambda heads: spec.head_dim * (heads if spec.qk_norm.whole else 1)
    norm = lambda heads: spec.qk_norm and make_norm(spec.qk_norm, together(heads), compute, rngs)
    self.query_norm, self.key_norm = norm(spec.heads), norm(spec.kv_heads) if makes else None
    self.value_norm = spec.v_norm and make_norm(spec.v_norm, spec.head_dim, compute, rngs)
    zeros = jax.nn.initializers.zeros
    self.sinks = param(rngs, zeros, compute.weight_dtype, heads=spec.heads) if spec.sink else None

  def init_query_w(self, inputs_q_shape: tuple[int, ...], rngs: nnx.Rngs | None = None) -> Dense:
    """The projection [.. d] -> [.. h k] of inputs of this shape; with a gate, [.. h 2k]."""
    spec = self.spec
    heads = {"q_heads": spec.heads, "kv": spec.head_dim * (2 if spec.gate else 1)}
    return self._dense(rngs, "btd,dhk->bthk", spec.bias, embed=inputs_q_shape[-1], **heads)

  def query_projection(self, inputs_q: jax.Array) -> jax.Array:
    """inputs [b t d] -> queries [b t h k], before norm and rotation; with a gate, [b t h 2k]."""
    if self.spec.fused:
      return self.qkv_projection(inputs_q)[0]
    return self.query(self._cast(inputs_q))

  def init_kv_w(self, inputs_kv_shape: tuple[int, ...], rngs: nnx.Rngs | None = None) -> Dense:
    """The projection [.. d] -> [.. g k] of inputs of this shape."""
    spec = self.spec
    heads = {"kv_heads": spec.kv_heads, "kv_head_dim": spec.head_dim}
    return self._dense(rngs, "btd,dgk->btgk", spec.bias, embed=inputs_kv_shape[-1], **heads)

  def kv_projection(self, inputs_kv: jax.Array, proj_name: str) -> jax.Array:
    """inputs [b s d] -> 'key' or 'value' [b s g k], before norm and rotation."""
    check_projection(proj_name)
    if self.spec.takes is not None:
      raise ConfigError("takes", "this layer's keys and values are those of an earlier one")
    if self.spec.fused:
      return self.qkv_projection(inputs_kv)[1 if proj_name == "key" else 2]
    own = self.key if proj_name == "key" or self.spec.share_kv else self.value
    return own(self._cast(inputs_kv))

  def init_qkv_w(self, inputs_shape: tuple[int, ...], rngs: nnx.Rngs | None = None) -> Dense:
    """The projection [.. d] -> [.. g r k]: of each group its h / g queries, its key, its value.

    Groups are what a mesh splits, so that the kernel means the same however they are split.
    """
    spec = self.spec
    parts = {"kv_heads": spec.kv_heads, "qkv": spec.heads // spec.kv_heads + 2}
    axes = {"embed": inputs_shape[-1], **parts, "kv": spec.head_dim}
    return self._dense(rngs, "btd,dgrk->btgrk", spec.bias, **axes)

  def qkv_projection(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """inputs [b t d] -> queries [b t h k], keys and values [b t g k]; if fused, by one product."""
    if not self.spec.fused:
      kv = (self.kv_projection(inputs, name) for name in PROJECTIONS)
      return self.query_projection(inputs), *kv
    y = self.qkv_proj(self._cast(inputs))
    b, t, g, r, k = y.shape
    return y[:, :, :, :-2].reshape(b, t, g * (r - 2), k), y[:, :, :, -2], y[:, :, :, -1]

  @property
  def out_head_dim(self) -> int:
    """The channels of a head that the output projection takes in."""
    return self.spec.head_dim

  def init_out_w(self, output_dim: int, rngs: nnx.Rngs | None = None) -> Dense:
    """The projection [.. h k] -> [.. output_dim]."""
    spec = self.spec
    bias = spec.bias if spec.out_bias is None else spec.out_bias
    axes = {"heads": spec.heads, "kv": self.out_head_dim, "embed": output_dim}
    return self._dense(rngs, "bthk,hkd->btd", bias, **axes)

  def out_projection(self, out: jax.Array) -> jax.Array:
    """[b t h k] -> [b t d]."""
    return self.out(self._cast(out))

  def _cast(self, x: jax.Array) -> jax.Array:
    """x in the dtype in which the layer computes."""
    return x.astype(self.compute.dtype)

  def _dense(self, rngs: nnx.Rngs | None, equation: str, bias: bool, **axes: int) -> Dense:
    return Dense(rngs or self.rngs, self.compute, equation, bias=bias, init=self.init, **axes)

  def __call__(
    self,
    x: jax.Array,
    mask: Mask,
    cache: C | None = None,
    seed: jax.Array | None = None,
    kv: jax.Array | None = None,
    positions: jax.Array | None = None,
    names: Names = PLAIN,
    taken: Pair | None = None,
  ) -> tuple[jax.Array, C | None]:
    """With a cache, earlier keys and values come from it, and it comes back with the new ones.

    `kv` [b s d] is what keys and values are made from (None: x), `positions` [b t] or [b t 3] what
    the rotation is by (None: the mask's), `seed` uint32 [2] draws dropout. `taken` are keys and
    values as `keys_values` makes them, of this layer or of an earlier one.
    """
    names = self._placed(names)
    if names.input is not None:
      x, kv = (y if y is None else constrain(y, *names.input) for y in (x, kv))
    if taken is None:
      q, k, v, gate = self._project(x, x if kv is None else kv)
      q, k, v = self._prepare(q, k, v, mask, positions)
    else:
      (q, gate), (k, v) = self._queries(x), taken
      q = self._prepared_queries(q, mask, positions)
    q = _tagged(constrain(q, *names.query), "query_proj")
    k = _tagged(constrain(k, *names.key), "key_proj")
    v = _tagged(constrain(v, *names.value), "value_proj")
    y, cache = self._attend(q, k, v, mask, cache, seed)
    y = constrain(y, *names.out)  # tagged by the kernel, with what else its gradient needs
    y = y if gate is None else y * jax.nn.sigmoid(gate)
    return checkpoint_name(self.out_projection(y), "out_proj"), cache

  def _placed(self, names: Names) -> Names:
    """The axes of what this layer makes, where a caller asks for `names`."""
    return names

  def _project(
    self, x: jax.Array, kv: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """x [b t d], kv [b s d] -> queries, keys, values, and the gate [b t h k] if there is one."""
    if self.spec.fused and kv is x:
      return *self.qkv_projection(x), None
    q, gate = self._queries(x)
    k = self.kv_projection(kv, "key")
    return q, k, k if self.spec.share_kv else self.kv_projection(kv, "value"), gate

  def _queries(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """x [b t d] -> queries, and the gate [b t h k] if there is one."""
    q = self.query_projection(x)
    return tuple(jnp.split(q, 2, axis=-1)) if self.spec.gate else (q, None)

  def keys_values(self, x: jax.Array, mask: Mask, positions: jax.Array | None = None) -> Pair:
    """x [b s d] -> keys and values [b s g k], normalised and rotated: as queries meet them."""
    _, k, v = self._prepare(*self._project(x, x)[:3], mask, positions)
    return constrain(k, *PLAIN.key), constrain(v, *PLAIN.value)

  def no_keys_values(self, shape: tuple[int, int]) -> Pair:
    """What stands in their place, of tokens [b s], before a layer has made any."""
    shape = (*shape, self.spec.kv_heads, self.spec.head_dim)
    zeros = constrain(jnp.zeros(shape, self.compute.dtype), *PLAIN.key)
    return zeros, zeros

  def _prepare(
    self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, positions: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, normalised and rotated."""
    k = self._prepared(k, self.key_norm, mask.kv_pos, positions)
    v = self._cut(v if self.value_norm is None else self.value_norm(v))
    return self._prepared_queries(q, mask, positions), k, v

  def _prepared_queries(self, q: jax.Array, mask: Mask, positions: jax.Array | None) -> jax.Array:
    """Queries [b t h k], normalised, rotated and grown."""
    q = self._prepared(q, self.query_norm, mask.q_pos, positions)
    tempered = self.spec.temperature
    return q if tempered is None else _tempered(q, mask.q_pos, tempered)

  def _prepared(
    self, x: jax.Array, norm: nnx.Module | None, places: jax.Array, several: jax.Array | None
  ) -> jax.Array:
    """Queries or keys [b t h k], normalised and rotated."""
    spec, late = self.spec, norm is not None and self.spec.qk_norm.rotated
    x = self._cut(x if norm is None or late else self._norm(norm, x))
    if spec.rope is None and spec.grid is None:
      return x
    x = self.rotate(x, places, several)
    return self._norm(norm, x) if late else x

  def _cut(self, x: jax.Array) -> jax.Array:
    clip = self.spec.clip
    return x if clip is None else jnp.clip(x, -clip, clip)

  def rotate(
    self, x: jax.Array, positions: jax.Array, several: jax.Array | None = None
  ) -> jax.Array:
    """Queries or keys [b t h k] at positions [b t], or where they have `several` [b t 3]."""
    if self.spec.grid is not None:
      return rotate_grid(x, self.spec.grid)
    return rotate(x, positions if several is None else several, self.spec.rope)

  def _norm(self, norm: nnx.Module, x: jax.Array) -> jax.Array:
    """x [b t h k] normalised head by head, or over all heads at once."""
    if not self.spec.qk_norm.whole:
      return norm(x)
    b, t, h, k = x.shape
    return norm(x.reshape(b, t, h * k)).reshape(x.shape)

  def _attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    cache: C | None,
    seed: jax.Array | None,
  ) -> tuple[jax.Array, C | None]:
    """Values [b t h k] of what the layer's queries see, new keys and values being kept first."""
    spec, compute = self.spec, self.compute
    if cache is not None:
      cache, k, v, mask = cache.append(k, v, mask)
    mask = mask.narrow(spec.window, spec.chunk, spec.block, spec.causal)
    queries = q.shape[1]
    if twice := compute.reshape_q and queries == 1:
      q, mask = jnp.repeat(q, 2, axis=1), _twice(mask)
    if compute.heads_first:
      q, k, v = (_by_head(dense(x)) for x in (q, k, v))
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    scale = scale if spec.latent is None else scale * spec.latent.mscale**2
    scores = kernels.Scores(scale, spec.soft_cap, compute.f32_scores, spec.dropout)
    sink = None if self.sinks is None else self.sinks[...]
    kernel = compute.decode_kernel or compute.kernel if queries == 1 else compute.kernel
    y = kernels.attend(kernel, q, k, v, mask, scores, sink, seed)
    return y[:, :queries] if twice else y, cache


def _tagged(x: jax.Array, name: str) -> jax.Array:
  """x [... h k] itself. What is kept of it has its heads side by side where they are narrower than
  the lanes of a TPU, which would be filled up with zeros.
  """
  if x.ndim < 4 or x.shape[-1] % LANES == 0:
    return checkpoint_name(x, name)
  flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
  return checkpoint_name(flat, name).reshape(x.shape)


def _tempered(q: jax.Array, positions: jax.Array, spec: TemperatureSpec) -> jax.Array:
  """q [b t h k] times what its position [b t] asks for; positions stay exact, in float32."""
  steps = jnp.floor((positions.astype(jnp.float32) + 1) / spec.floor_scale)
  factor = 1 + spec.scale * jnp.log1p(steps)
  return (q.astype(jnp.float32) * factor[:, :, None, None]).astype(q.dtype)


def _twice(mask: Mask) -> Mask:
  """The mask of each query and a copy of it."""
  copy = lambda x: None if x is None else jnp.repeat(x, 2, axis=1)
  return dataclasses.replace(
    mask, q_pos=copy(mask.q_pos), q_seg=copy(mask.q_seg), q_span=copy(mask.q_span), ordered=False
  )


def _by_head(x: jax.Array) -> jax.Array:
  """x [b t h k] as it is, kept in memory as [b h t k]."""
  return jnp.einsum("bhtk->bthk", jax.lax.optimization_barrier(jnp.einsum("bthk->bhtk", x)))
