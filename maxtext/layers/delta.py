"""The gated delta net: linear attention by a state that every token corrects."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from maxtext import collectives
from maxtext.caches import StateCache
from maxtext.errors import ConfigError
from maxtext.kernels import OUT
from maxtext.kernels.delta_rule import Inputs, delta_rule
from maxtext.kernels.split import by_parts
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, Dense, param
from maxtext.masks import Mask
from maxtext.sharding import active, by_device, constrain, entry_of
from maxtext.specs import DeltaSpec, NormSpec

HEADS = ("activation_batch", None, "activation_kv_heads", None)  # all of a row: it goes in order
STATE = ("activation_batch", "activation_kv_heads", None, None, None)


class DeltaNet(nnx.Module):
  """x [b t d] -> [b t d]: one gated delta net (Yang et al. 2025), as its spec describes.

  Its projections are kept by key head, each with the r value heads that it serves, so that they
  mean the same however a mesh splits the heads: of a head's channels the first are its query's,
  then its key's, its values' and their gates'; of `ba_proj` first the rates, then the decays.
  """

  def __init__(self, spec: DeltaSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec, self.compute = spec, compute
    heads, values, dtype = spec.key_heads, spec.per_key * spec.value_dim, compute.weight_dtype

    def projected(channels: int) -> Dense:
      axes = {"embed": width, "kv_heads": heads, "kv": channels}
      return Dense(rngs, compute, "btd,dgc->btgc", **axes)

    def convolution(channels: int) -> nnx.Param:
      return param(rngs, _spread, dtype, conv=spec.conv, kv_heads=heads, kv=channels)

    self.qkvz_proj = projected(spec.channels + values)
    self.ba_proj = projected(2 * spec.per_key)
    self.query_conv, self.key_conv = convolution(spec.key_dim), convolution(spec.key_dim)
    self.value_conv = convolution(values)
    self.dt_bias = param(rngs, _steps, dtype, heads=spec.value_heads)
    self.a_log = param(rngs, _rates, dtype, heads=spec.value_heads)
    self.norm = make_norm(NormSpec("rms", spec.eps), spec.value_dim, compute, rngs)
    out = {"heads": spec.value_heads, "kv": spec.value_dim, "embed": width}
    self.out = Dense(rngs, compute, "bthk,hkd->btd", **out)

  def __call__(
    self, x: jax.Array, mask: Mask, cache: StateCache | None = None, seed: jax.Array | None = None
  ) -> tuple[jax.Array, StateCache | None]:
    """With a cache, tokens go on from its state, and it comes back with theirs.

    Padding changes nothing, wherever it stands, and gives zeros. `seed` is as attention has it; a
    delta net has nothing to draw. Raises ConfigError for a mask under which tokens see the future.
    """
    if mask.q_span is not None or not mask.causal:
      raise ConfigError("delta", "a delta net sees the past only; use attention in its place")
    b, t, _ = x.shape
    segments = jnp.ones((b, t), jnp.int32) if mask.q_seg is None else mask.q_seg
    moved = mask.q_seg is not None and t > 1 and not (mask.ordered and cache is None)
    if moved:
      order = jnp.argsort(segments == 0, axis=1, stable=True)  # padding last
      x = jnp.take_along_axis(x, order[..., None], axis=1)
      segments = jnp.take_along_axis(segments, order, axis=1)
    y, cache = self._mix(x, segments, cache)
    if moved:
      y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], axis=1)
    return y, cache

  def _mix(
    self, x: jax.Array, segments: jax.Array, cache: StateCache | None
  ) -> tuple[jax.Array, StateCache | None]:
    """As the layer, for rows whose padding is last, or that hold each document in one piece."""
    spec = self.spec
    b, t, _ = x.shape
    state, before, last = self._before(b, x.dtype) if cache is None else cache.held()
    real = segments != 0
    starts = real & (segments != jnp.concatenate([last[:, None], segments[:, :-1]], axis=1))
    mixed = checkpoint_name(constrain(self.qkvz_proj(x), *HEADS), "query_proj")
    mixed, gate = jnp.split(mixed, [spec.channels], axis=-1)
    inputs = jnp.concatenate([before.astype(mixed.dtype), mixed], axis=1)
    run = jnp.cumsum(starts, axis=1)
    tokens = self._inputs(x, self._convolved(inputs, run), real, starts)
    y, state = self._rule(tokens, constrain(state, *STATE))
    if cache is not None:
      cache = cache.keep(state, *_kept(inputs, run, segments, last))
    y = jnp.where(real[..., None, None, None], y, 0.0)
    y = self.norm(checkpoint_name(y, OUT))
    y = y * jax.nn.silu(gate.astype(jnp.float32)).reshape(y.shape)
    y = y.astype(x.dtype).reshape(b, t, spec.value_heads, spec.value_dim)
    y = constrain(y, "activation_batch", None, "activation_heads", "activation_kv")
    return checkpoint_name(self.out(y), "out_proj"), cache

  def _rule(self, tokens: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    rule = functools.partial(delta_rule, precision=self.compute.matmul_precision)
    if not by_parts():
      return rule(tokens, state)
    layout = active()
    rows, heads = (entry_of(layout.splits(name)) for name in STATE[:2])
    place = lambda x: PartitionSpec(*(rows, None, heads)[: x.ndim])
    own = PartitionSpec(rows, heads)
    return by_device(rule, (jax.tree.map(place, tokens), own), (place(tokens.keys), own))(
      tokens, state
    )

  def _before(self, rows: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a cache holds before any token."""
    fresh = StateCache.empty(self.spec, 1, rows, dtype)
    return fresh.at(jnp.int32(0)).held()

  def _convolved(self, inputs: jax.Array, run: jax.Array) -> jax.Array:
    """inputs [b w-1+t g c], of which the first are those before, runs [b t] of documents, 0 for
    that of those before -> [b t g c], float32.
    """
    size, t = self.spec.conv, run.shape[1]
    convs = (self.query_conv, self.key_conv, self.value_conv)
    kernel = jnp.concatenate([_whole(conv) for conv in convs], axis=-1)
    runs = jnp.pad(run, [(0, 0), (size - 1, 0)])
    y = jnp.zeros((), jnp.float32)
    for i in range(size):
      same = (runs[:, i : i + t] == run)[..., None, None]
      y = y + kernel[i] * jnp.where(same, inputs[:, i : i + t].astype(jnp.float32), 0.0)
    return jax.nn.silu(y)

  def _inputs(self, x: jax.Array, mixed: jax.Array, real: jax.Array, starts: jax.Array) -> Inputs:
    """x [b t d] and what the convolution made of it [b t g c] -> what the delta rule takes."""
    spec = self.spec
    q, k, v = jnp.split(mixed, [spec.key_dim, 2 * spec.key_dim], axis=-1)
    v = v.reshape(*v.shape[:3], spec.per_key, spec.value_dim)
    rate, step = jnp.split(self.ba_proj(x).astype(jnp.float32), 2, axis=-1)  # [b t g r] each
    by_head = lambda p: _whole(p).reshape(spec.key_heads, spec.per_key)
    decay = -jnp.exp(by_head(self.a_log)) * jax.nn.softplus(step + by_head(self.dt_bias))
    there = lambda y: jnp.where(real[..., None, None], y, 0.0)
    q, k = constrain(_unit(q) * spec.key_dim**-0.5, *HEADS), constrain(_unit(k), *HEADS)
    v = constrain(v, *HEADS, None)
    return Inputs(q, k, v, there(decay), there(jax.nn.sigmoid(rate)), starts)


def _whole(p: nnx.Param) -> jax.Array:
  return collectives.whole(p[...].astype(jnp.float32), p.get_metadata()["axes"])


def _unit(x: jax.Array) -> jax.Array:
  """x [... k] over its length; zero stays zero."""
  return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def _kept(
  inputs: jax.Array, run: jax.Array, segments: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The inputs [b w-1 g c] before the next token, zero where they are of another document than the
  last token, and the document of that [b]; padding is last.
  """
  b, t = run.shape
  size = inputs.shape[1] - t
  count = (segments != 0).sum(1)
  at = count[:, None] + jnp.arange(size)
  runs = jnp.pad(run, [(0, 0), (size, 0)])
  same = jnp.take_along_axis(runs, at, axis=1) == run[:, -1:]
  kept = jnp.take_along_axis(inputs, at[..., None, None], axis=1)
  newest = jnp.take_along_axis(segments, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
  return jnp.where(same[..., None, None], kept, 0), jnp.where(count > 0, newest, last)


def _spread(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """Weights of a convolution over shape[0] tokens."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _rates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """Logarithms of rates from 0 to 16, as the authors draw them."""
  return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-2, 16.0)).astype(dtype)


def _steps(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """What softplus takes to steps from 0.001 to 0.1, evenly by their logarithm (Gu and Dao 2023)."""
  steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
  return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)
