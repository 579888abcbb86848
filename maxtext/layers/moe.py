"""A mixture of experts: every token through the few that its router chooses.

Letters: e experts, k the chosen of a token, c an expert's places for the tokens of a row. What is
sorted by expert is [b t k] as well: on each device the choices of its own tokens, expert by expert.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext import sharding
from maxtext.kernels.grouped_matmul import Product, grouped_matmul
from maxtext.layers import routing
from maxtext.layers.local import Arrays, Work, run
from maxtext.layers.mlp import Mlp, activated
from maxtext.layers.params import Compute, Dense, dot, nd_dense_init, param
from maxtext.layers.routing import Routed
from maxtext.sharding import constrain
from maxtext.specs import MoeSpec

ROUTED = ("activation_batch", "activation_length", None)


class Experts(nnx.Module):
  """One projection of every expert: a kernel [e d f], or [e f d] back again, and a bias."""

  def __init__(self, rngs: nnx.Rngs, compute: Compute, bias: bool, **axes: int):
    draw = functools.partial(
      nd_dense_init(1.0, "fan_in", "truncated_normal"), in_axis=(1,), out_axis=(0, 2)
    )
    self.kernel = param(rngs, draw, compute.weight_dtype, **axes)
    first, _, last = axes
    kept = {first: axes[first], last: axes[last]}
    zeros = jax.nn.initializers.zeros
    self.bias = param(rngs, zeros, compute.weight_dtype, **kept) if bias else None

  @property
  def params(self) -> list[nnx.Param]:
    return [self.kernel] if self.bias is None else [self.kernel, self.bias]


class Moe(nnx.Module):
  """x [b t d] -> [b t d]: a weighted sum of what the chosen experts make of each token, and what a
  shared layer makes of all.
  """

  def __init__(self, spec: MoeSpec, width: int, compute: Compute, rngs: nnx.Rngs):
    self.spec, self.compute = spec, compute
    expert, count = spec.expert, spec.experts
    self.router = Dense(
      rngs, compute, "btd,de->bte", bias=spec.router_bias, embed=width, router=count
    )
    # moved by loads, in steps that bfloat16 has no room for, and not by any gradient
    zeros = jax.nn.initializers.zeros
    self.choice_bias = (
      param(rngs, zeros, jnp.dtype("float32"), router=count) if spec.choice_bias else None
    )
    wide = {"exp": count, "embed_no_exp": width, "mlp": expert.hidden}
    back = {"exp": count, "mlp": expert.hidden, "embed_no_exp": width}
    gated = len(expert.activations) == 2
    self.gate = Experts(rngs, compute, expert.bias, **wide) if gated else None
    self.up = Experts(rngs, compute, expert.bias, **wide)
    self.down = Experts(rngs, compute, expert.bias, **back)
    self.shared = None if spec.shared is None else Mlp(spec.shared, width, compute, rngs)
    self.shared_gate = (
      Dense(rngs, compute, "btd,dr->btr", embed=width, router=1) if spec.shared_gate else None
    )

  def __call__(
    self, x: jax.Array, real: jax.Array, dropless: bool = False
  ) -> tuple[jax.Array, Routed]:
    """`real` [b t] is false for padding, which no expert sees; with `dropless` experts that have a
    capacity take all tokens that choose them.
    """
    spec, options = self.spec, self.compute.experts
    logits = self._logits(x)
    bias = None if self.choice_bias is None else self.choice_bias[...]
    choose = Work(lambda tokens, _: (routing.chosen(spec, tokens[0]),), ((None,),), ((None,),))
    (experts,) = run(choose, [routing.ranks(spec, logits, bias)])
    weights = routing.weights(spec, logits, experts)
    said = routing.routed(spec, logits, experts, real)
    if options.sparse_matmul or (dropless and options.capacity_factor > 0):
      y = self._sparse(x, experts, weights, real)
    elif options.capacity_factor > 0:
      y = self._limited(x, experts, weights, real)
    else:
      y = self._dense(x, experts, weights, real)
    if self.shared is not None:
      shared = self.shared(x)
      if self.shared_gate is not None:
        shared = shared * jax.nn.sigmoid(self.shared_gate(x))
      y = y + shared
    return constrain(y, "activation_batch", "activation_length", "activation_embed"), said

  def _logits(self, x: jax.Array) -> jax.Array:
    """x [b t d] -> the router's logits [b t e], float32."""
    if self.compute.experts.use_random_routing:
      shape = (*x.shape[:2], self.spec.experts)
      return constrain(jax.random.normal(jax.random.key(0), shape), *ROUTED)
    x = x.astype(jnp.float32) if self.compute.f32_gate else x
    return constrain(self.router(x).astype(jnp.float32), *ROUTED)

  def _sparse(
    self, x: jax.Array, experts: jax.Array, weights: jax.Array, real: jax.Array
  ) -> jax.Array:
    """Only the products that are needed: choices expert by expert, padding after them."""
    spec, compute = self.spec, self.compute
    product = Product.on(sharding.platform(), compute.experts.megablox, compute.matmul_precision)
    one, wide = (None,), (None, "activation_mlp")
    sort = Work(functools.partial(_sorted, spec.experts), (one, ()), (one, one))
    order, sizes = run(sort, [experts, real])
    layers = self._wide_layers
    rise = Work(
      functools.partial(_rise, product, spec),
      (one, one, one, one),
      (wide,) * len(layers),
      dtype=compute.dtype,
    )
    made = run(rise, [x, weights, order, sizes], [p for layer in layers for p in layer.params])
    h = self._activated(made)
    fall = Work(
      functools.partial(_fall, product, spec), (wide, one, one, one), (one,), dtype=compute.dtype
    )
    (y,) = run(fall, [h, weights, order, sizes], [self.down.kernel])
    return self._with_bias(y, experts, weights, real[..., None])

  def _dense(
    self, x: jax.Array, experts: jax.Array, weights: jax.Array, real: jax.Array
  ) -> jax.Array:
    """Every expert for every token, of which those count that were chosen."""
    before, after = self._shares(experts, weights, real[..., None])
    equation = "btd,edf->btef"
    if self.spec.weigh_inputs:
      x, equation = _times(x[:, :, None], before), "bted,edf->btef"
    place = ("activation_batch", "activation_length", None, "activation_mlp")
    h = self._activated([self._wide(equation, x, layer, place) for layer in self._wide_layers])
    y = dot("btef,efd->btd", _times(h, after), self.down.kernel, self.compute)
    return self._with_bias(y, experts, weights, real[..., None])

  def _limited(
    self, x: jax.Array, experts: jax.Array, weights: jax.Array, real: jax.Array
  ) -> jax.Array:
    """Every expert for at most `capacity` tokens of each row, the first that choose it."""
    spec, one = self.spec, (None,)
    room = routing.capacity(spec, x.shape[1], self.compute.experts.capacity_factor)
    assign = Work(
      functools.partial(_assigned, spec.experts, room), (one, ()), (one, one), whole_rows=True
    )
    held, place = run(assign, [experts, real])
    deal = Work(
      functools.partial(_dealt, spec), (one, one, one), ((None, None), one), whole_rows=True
    )
    x, share = run(deal, [x, weights, held])
    spot = ("activation_batch", None, None, "activation_mlp")
    h = [self._wide("becd,edf->becf", x, layer, spot) for layer in self._wide_layers]
    h = self._activated(h)
    h = h if spec.weigh_inputs else _times(h, share)
    y = dot("becf,efd->becd", h, self.down.kernel, self.compute)
    collect = Work(_collected, ((None, None), one), (one,), whole_rows=True)
    (y,) = run(collect, [y, place])
    return self._with_bias(y, experts, weights, place < spec.experts * room)

  @property
  def _wide_layers(self) -> list[Experts]:
    return [layer for layer in (self.gate, self.up) if layer is not None]

  def _wide(self, equation: str, x: jax.Array, layer: Experts, place: tuple) -> jax.Array:
    y = dot(equation, x, layer.kernel, self.compute)
    if layer.bias is not None:
      bias = layer.bias[...].astype(y.dtype)
      y = y + (bias if equation.endswith("btef") else bias[:, None])
    return constrain(y, *place)

  def _activated(self, made: Sequence[jax.Array]) -> jax.Array:
    """What `_wide_layers` made -> their product, activated."""
    up = checkpoint_name(made[-1], "mlpwi_1")
    gate = checkpoint_name(made[0], "mlpwi_0") if len(made) == 2 else None
    return activated(self.spec.expert, up, gate)

  def _shares(
    self, experts: jax.Array, weights: jax.Array, counts: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Of all experts [b t e]: what an input is multiplied by, and what an output is; 0 where an
    expert was not chosen, or the choice does not count [b t k].
    """
    ones = routing.spread(experts, counts.astype(jnp.float32), self.spec.experts)
    share = routing.spread(experts, jnp.where(counts, weights, 0), self.spec.experts)
    return (share, ones) if self.spec.weigh_inputs else (ones, share)

  def _with_bias(
    self, y: jax.Array, experts: jax.Array, weights: jax.Array, counts: jax.Array
  ) -> jax.Array:
    """y [b t d], and the biases of the experts' last projections as they count in it."""
    y = checkpoint_name(y, "mlpwo")
    if self.down.bias is None:
      return y
    counts = jnp.broadcast_to(counts, experts.shape)
    _, share = self._shares(experts, weights, counts)
    return y + dot("bte,ed->btd", share.astype(y.dtype), self.down.bias, self.compute)


def _times(x: jax.Array, share: jax.Array) -> jax.Array:
  """x [... d] times [...], in float32 before it is rounded to the dtype of x."""
  return (x * share[..., None]).astype(x.dtype)


# What a device does with its own tokens: choices are numbered token by token, k for each.


def _sorted(count: int, tokens: Arrays, _: Arrays) -> Arrays:
  """experts [b t k], real [b t] -> the choices by expert [b t k], how many of each [1 1 e]."""
  experts, real = tokens
  used = jnp.where(real[..., None], experts, count)
  order, sizes = routing.places(used.reshape(used.size), count)
  return order.reshape(experts.shape), sizes[None, None]


def _rise(product: Product, spec: MoeSpec, tokens: Arrays, params: Arrays) -> Arrays:
  """x [b t d] and the sorted choices -> gate and up, or up alone [b t k f]."""
  x, weights, order, sizes = tokens
  rows = jnp.broadcast_to(x[:, :, None], (*order.shape, x.shape[-1]))
  if spec.weigh_inputs:
    rows = _times(rows, weights)
  rows = _moved(rows.reshape(order.size, x.shape[-1]), order)
  steps, made = 2 if spec.expert.bias else 1, []
  for kernel, *bias in (params[i : i + steps] for i in range(0, len(params), steps)):
    y = grouped_matmul(product, rows, kernel, sizes[0, 0])
    if bias:
      group = jnp.repeat(jnp.arange(spec.experts), sizes[0, 0], total_repeat_length=order.size)
      y = y + bias[0][group].astype(y.dtype)
    made.append(y.reshape(*order.shape, y.shape[-1]))
  return tuple(made)


def _fall(product: Product, spec: MoeSpec, tokens: Arrays, params: Arrays) -> Arrays:
  """Hidden activations of the sorted choices [b t k f] -> the tokens' sums [b t d]."""
  h, weights, order, sizes = tokens
  rows = h.reshape(order.size, h.shape[-1])
  if not spec.weigh_inputs:
    rows = _times(rows, _moved(weights.reshape(order.size), order))
  y = grouped_matmul(product, rows, params[0], sizes[0, 0])
  flat = order.reshape(order.size)
  back = jnp.zeros_like(flat).at[flat].set(jnp.arange(order.size), unique_indices=True)
  return (_moved(y, back).reshape(*order.shape, y.shape[-1]).sum(2),)


def _moved(rows: jax.Array, order: jax.Array) -> jax.Array:
  """Rows [m ...] in this order, in which each stands once."""
  return rows.at[order.reshape(order.size)].get(unique_indices=True)


def _assigned(count: int, room: int, tokens: Arrays, _: Arrays) -> Arrays:
  """experts [b t k], real [b t] -> the choice that each place of an expert holds [b e c], t * k for
  none; and each choice's place [b t k], e * c for none.
  """
  experts, real = tokens
  _, length, active = experts.shape

  def row(used: jax.Array) -> tuple[jax.Array, jax.Array]:
    order, sizes = routing.places(used, count)
    begin = jnp.cumsum(sizes) - sizes
    c = jnp.arange(room)
    held = order.at[begin[:, None] + c].get(mode="fill", fill_value=0)
    held = jnp.where(c < sizes[:, None], held, used.size)
    place = jnp.full(used.size + 1, count * room)
    place = place.at[held].set(jnp.arange(count * room).reshape(held.shape))
    return held, place[:-1]

  used = jnp.where(real[..., None], experts, count)
  held, place = jax.vmap(row)(used.reshape(used.shape[0], length * active))
  return held, place.reshape(experts.shape)


def _dealt(spec: MoeSpec, tokens: Arrays, _: Arrays) -> Arrays:
  """x [b t d], weights [b t k], held [b e c] -> inputs [b e c d], and what their outputs are
  multiplied by [b e c].
  """
  x, weights, held = tokens
  take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
  share = take(weights.reshape(weights.shape[0], weights.shape[1] * weights.shape[2]), held)
  x = take(x, held // spec.active)
  return (_times(x, share) if spec.weigh_inputs else x), share


def _collected(tokens: Arrays, _: Arrays) -> Arrays:
  """Outputs [b e c d], each choice's place [b t k] -> the tokens' sums [b t d]."""
  y, place = tokens
  rows = y.reshape(y.shape[0], y.shape[1] * y.shape[2], y.shape[3])
  take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
  return (take(rows, place).sum(2),)
