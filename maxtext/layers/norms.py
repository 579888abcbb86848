"""Normalisation over the last dimension, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.params import Compute, param
from maxtext.specs import NormSpec


class RMSNorm(nnx.Module):
  """x [... d] / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019)."""

  def __init__(self, width: int, eps: float, compute: Compute, rngs: nnx.Rngs):
    self.scale = param(rngs, jax.nn.initializers.ones, compute.weight_dtype, norm=width)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias over the last dimension (Ba et al. 2016)."""

  def __init__(self, width: int, eps: float, compute: Compute, rngs: nnx.Rngs):
    self.scale = param(rngs, jax.nn.initializers.ones, compute.weight_dtype, norm=width)
    self.bias = param(rngs, jax.nn.initializers.zeros, compute.weight_dtype, norm=width)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
    return (y * scale + bias).astype(x.dtype)


KINDS = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(spec: NormSpec, width: int, compute: Compute, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
  """The normalisation that `spec` names."""
  return KINDS[spec.kind](width, spec.eps, compute, rngs)
