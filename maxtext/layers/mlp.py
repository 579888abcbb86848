"""The feed-forward layer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext import collectives
from maxtext.layers.params import Compute, Dense
from maxtext.sharding import constrain
from maxtext.specs import MlpSpec

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
  "linear": lambda x: x,
}


class Mlp(nnx.Module):
  """x [b t d] -> [b t d]: the product of the activated projections, projected back."""

  def __init__(self, spec: MlpSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec = spec
    wide = functools.partial(
      Dense, rngs, compute, "btd,df->btf", bias=spec.bias, embed=width, mlp=spec.hidden
    )
    self.gate = wide() if len(spec.activations) == 2 else None
    self.up = wide()
    self.down = Dense(rngs, compute, "btf,fd->btd", bias=spec.bias, mlp=spec.hidden, embed=width)

  def __call__(self, x: jax.Array) -> jax.Array:
    up = checkpoint_name(self._wide(self.up, x), "mlpwi_1")
    gate = None
    if self.gate is not None:
      up, x = collectives.in_turn(up, x)
      gate = checkpoint_name(self._wide(self.gate, x), "mlpwi_0")
    y = activated(self.spec, up, gate)
    return checkpoint_name(self.down(y), "mlpwo")

  @staticmethod
  def _wide(layer: Dense, x: jax.Array) -> jax.Array:
    return constrain(layer(x), "activation_batch", "activation_length", "activation_mlp")


def activated(spec: MlpSpec, up: jax.Array, gate: jax.Array | None) -> jax.Array:
  """The product of the activated projections, each cut as the spec says."""
  *first, last = spec.activations
  if gate is None:
    return ACTIVATIONS[last](up)
  if spec.limit is not None:
    gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
  up = ACTIVATIONS[last](up)
  return ACTIVATIONS[first[0]](gate) * (up + spec.shift if spec.shift else up)
