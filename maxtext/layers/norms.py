"""Normalisation over the last dimension, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.params import Compute, param
from maxtext.specs import NormSpec


class RMSNorm(nnx.Module):
  """x [... d] / sqrt(mean(x^2) + eps) * (offset + scale) (Zhang and Sennrich 2019).

  An offset of 1 is for weights that are kept around zero.
  """

  offset = 0.0

  def __init__(self, width: int, eps: float, compute: Compute, rngs: nnx.Rngs):
    start = jax.nn.initializers.constant(1 - self.offset)
    self.scale = param(rngs, start, compute.weight_dtype, norm=width)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.offset + self.scale[...].astype(jnp.float32)
    return (_unit(x, self.eps) * scale).astype(x.dtype)


class CentredRMSNorm(RMSNorm):
  """RMSNorm with a scale of 1 + weight."""

  offset = 1.0


class L2Norm(nnx.Module):
  """x [... d] / sqrt(mean(x^2) + eps), without any parameter."""

  def __init__(self, eps: float = 1e-6):
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    return _unit(x, self.eps).astype(x.dtype)


def _unit(x: jax.Array, eps: float) -> jax.Array:
  """x over its root mean square, float32."""
  y = x.astype(jnp.float32)
  return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)


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


KINDS = {"rms": RMSNorm, "rms_plus_one": CentredRMSNorm, "layer": LayerNorm}
Norm = RMSNorm | LayerNorm | L2Norm


def make_norm(spec: NormSpec, width: int, compute: Compute, rngs: nnx.Rngs) -> Norm:
  """The normalisation that `spec` names."""
  if spec.kind == "l2":
    return L2Norm(spec.eps)
  return KINDS[spec.kind](width, spec.eps, compute, rngs)
