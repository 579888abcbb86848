"""Parameters that know the names of their axes, and the contractions that use them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext import collectives, kernels, sharding
from maxtext.layers.sections import Experts

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
DenseInitializer = Callable[..., jax.Array]  # (key, shape, dtype), or these and in_axis, out_axis


DROPLESS = Experts(
  sparse_matmul=True, megablox=True, capacity_factor=-1.0, use_random_routing=False
)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How layers compute, as opposed to what: dtypes, the attention kernel, and matmul precision.

  `decode_kernel` attends for lone queries (None: as `kernel` does for all).

  Activations and matmul inputs have `dtype`, parameters `weight_dtype`; norms, softmax sums, rotary
  angles and the loss are float32 always. `f32_scores` computes q.k in float32, `f32_logits` the
  unembedding, `f32_gate` the logits of routers. `experts` says how experts are computed. For the
  layout's sake `heads_first` keeps queries, keys and values in memory head by head while attention
  is computed, and `reshape_q` gives a lone query a copy of itself beside it.
  """

  dtype: jnp.dtype = jnp.dtype("float32")
  weight_dtype: jnp.dtype = jnp.dtype("float32")
  kernel: str | kernels.Options = "autoselected"
  decode_kernel: str | None = None
  matmul_precision: str | None = None
  f32_scores: bool = False
  f32_logits: bool = False
  f32_gate: bool = True
  experts: Experts = DROPLESS
  heads_first: bool = False
  reshape_q: bool = False


def nd_dense_init(scale: float, mode: str, distribution: str) -> DenseInitializer:
  """Variance scaling (as jax.nn.initializers.variance_scaling) for kernels of any dimensions."""

  def init_fn(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, in_axis: Any, out_axis: Any
  ) -> jax.Array:
    draw = jax.nn.initializers.variance_scaling(scale, mode, distribution, in_axis, out_axis)
    return draw(key, shape, dtype)

  return init_fn


def _drawn(
  init: DenseInitializer, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, *axes: Any
) -> jax.Array:
  """A kernel of this shape; plain initialisers, as those of jax.nn, are not told its axes."""
  by_axes = len(inspect.signature(init).parameters) > 4  # the fourth of jax.nn is a sharding
  return init(key, shape, dtype, *axes) if by_axes else init(key, shape, dtype)


def param(rngs: nnx.Rngs, init: Initializer, dtype: jnp.dtype, /, **axes: int) -> nnx.Param:
  """param(rngs, init, dtype, embed=d, mlp=f): the shape and the logical axes are one statement."""
  return nnx.Param(init(rngs.params(), tuple(axes.values()), dtype), axes=tuple(axes))


def dot(equation: str, x: jax.Array, p: nnx.Param, compute: Compute) -> jax.Array:
  """einsum of an activation with a parameter, in the activation's dtype.

  The one seam where a parameter is cast, gathered over the batch's mesh axes, and its gradient
  summed in float32 and scattered back. The gathered copy is never kept for the backward pass.
  """
  return contract(equation, x, p[...], p.get_metadata()["axes"], compute)


def contract(
  equation: str, x: jax.Array, w: jax.Array, axes: tuple[str | None, ...], compute: Compute
) -> jax.Array:
  """As `dot`, with a part `w` of a parameter, whose dimensions have these logical axes."""
  return _dot(equation, axes, compute.matmul_precision, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot(equation, axes, precision, x, w):
  return sharding.einsum(
    equation, x, collectives.gather(w.astype(x.dtype), axes), precision=precision
  )


def _dot_forward(equation, axes, precision, x, w):
  return _dot(equation, axes, precision, x, w), (x, w)


def _dot_backward(equation, axes, precision, saved, g):
  x, w = saved
  inputs, out = equation.split("->")
  a, b = inputs.split(",")
  shares = collectives.partial(f"{a},{out}->{b}", axes, x, g, precision=precision)
  dw, g = collectives.in_turn(collectives.scatter(shares, axes), g)
  dx = sharding.einsum(
    f"{out},{b}->{a}", g, collectives.gather(w.astype(x.dtype), axes), precision=precision, like=x
  )
  return dx, dw.astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def lookup(p: nnx.Param, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rows [b t] of a table [v d] -> [b t d] in `dtype`; the gradient is summed in float32."""
  return _lookup(p.get_metadata()["axes"], p.shape, dtype, p[...], rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _lookup(axes, shape, dtype, w, rows):
  return collectives.take_rows(w.astype(dtype), axes, rows)


def _lookup_forward(axes, shape, dtype, w, rows):
  return _lookup(axes, shape, dtype, w, rows), (rows, jnp.zeros((), w.dtype))


def _lookup_backward(axes, shape, dtype, saved, g):
  rows, like = saved
  dw = collectives.add_rows(g, axes, rows, shape)
  return dw.astype(like.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Dense(nnx.Module):
  """A projection by an einsum such as 'btd,dhk->bthk', with an optional bias over the new
  dimensions.

  `axes` name the kernel's dimensions in the equation's order, with their sizes. `init` draws the
  kernel; by default from a truncated normal of variance 1 / fan-in.
  """

  def __init__(
    self,
    rngs: nnx.Rngs,
    compute: Compute,
    equation: str,
    *,
    bias: bool = False,
    init: DenseInitializer | None = None,
    **axes: int,
  ):
    a, b, out = equation.replace("->", ",").split(",")
    contracted = [i for i, letter in enumerate(b) if letter in a]
    kept = [i for i in range(len(b)) if i not in contracted]
    init = init or nd_dense_init(1.0, "fan_in", "truncated_normal")
    draw = lambda key, shape, dtype: _drawn(init, key, shape, dtype, contracted, kept)
    self.equation, self.compute = equation, compute
    self.kernel = param(rngs, draw, compute.weight_dtype, **axes)
    new = {name: size for i, (name, size) in enumerate(axes.items()) if i in kept}
    zeros = jax.nn.initializers.zeros
    self.bias = param(rngs, zeros, compute.weight_dtype, **new) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """x -> the equation's output (+ bias), in the dtype of x."""
    y = dot(self.equation, x, self.kernel, self.compute)
    if self.bias is None:
      return y
    return y + collectives.whole(self.bias[...].astype(y.dtype), self.bias.get_metadata()["axes"])
