"""The feed-forward layer."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext.layers.params import Compute, Dense
from maxtext.sharding import constrain
from maxtext.specs import MlpSpec

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
  "relu": jax.nn.relu,
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
    *gates, last = self.spec.activations
    y = ACTIVATIONS[last](checkpoint_name(self._wide(self.up, x), "mlpwi_1"))
    if self.gate is not None:
      y = y * ACTIVATIONS[gates[0]](checkpoint_name(self._wide(self.gate, x), "mlpwi_0"))
    return checkpoint_name(self.down(y), "mlpwo")

  @staticmethod
  def _wide(layer: Dense, x: jax.Array) -> jax.Array:
    return constrain(layer(x), "activation_batch", "activation_length", "activation_mlp")
