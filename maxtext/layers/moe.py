"""A mixture of experts: every token through the few that its router chooses.

Letters: e experts, k the chosen of a token, c an expert's places for the tokens of a row. What is
sorted by expert is [b t k] as well: on each device the choices of its own tokens, expert by expert.
Where the experts are split over w devices with different tokens, each computes its own experts for
the tokens of all: then e is (w e), every device's tokens and the own experts, and k is w times as
many rows as may come of a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtext import sharding
from maxtext.kernels.grouped_matmul import Product, grouped_matmul
from maxtext.layers import routing, shuffle
from maxtext.layers.exchange import Peers
from maxtext.layers.local import Arrays, Weights, Work, run
from maxtext.layers.mlp import Mlp, activated
from maxtext.layers.params import Compute, Dense, contract, dot, nd_dense_init, param
from maxtext.layers.routing import Routed
from maxtext.sharding import constrain
from maxtext.specs import MoeSpec

RISE, FALL = ("exp", "embed_no_exp", "mlp"), ("exp", "mlp", "embed_no_exp")
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
    spec, compute, peers = self.spec, self.compute, self._peers
    product = Product.on(sharding.platform(), compute.experts.megablox, compute.matmul_precision)
    one, wide = (None,), ("activation_mlp",)
    work = functools.partial(Work, peers=peers.names, dtype=compute.dtype)
    sort = Work(functools.partial(_sorted, peers, spec.experts), (one, ()), (one, one))
    order, counts = run(sort, [experts, real])
    rise = functools.partial(_rise, product, spec, peers)
    h = self._risen(work(rise, (one,) * 4, (wide,)), [x, weights, order, counts])
    fall = work(functools.partial(_fall, product, spec, peers), (wide, one, one, one), (one,))
    (y,) = run(fall, [h, weights, order, counts], [self.down.kernel])
    return self._with_bias(y, experts, weights, real[..., None])

  def _dense(
    self, x: jax.Array, experts: jax.Array, weights: jax.Array, real: jax.Array
  ) -> jax.Array:
    """Every expert for every token, of which those count that were chosen."""
    spec, compute, peers = self.spec, self.compute, self._peers
    before, after = self._shares(experts, weights, real[..., None])
    one, wide = (None,), (None, "activation_mlp")
    work = functools.partial(Work, peers=peers.names, dtype=compute.dtype)
    rise = functools.partial(_rise_of_all, compute, spec, peers)
    h = self._risen(work(rise, (one, one), (wide,)), [x, before])
    fall = work(functools.partial(_fall_of_all, compute, peers), (wide, one), (one,))
    (y,) = run(fall, [h, after], [self.down.kernel])
    return self._with_bias(y, experts, weights, real[..., None])

  def _limited(
    self, x: jax.Array, experts: jax.Array, weights: jax.Array, real: jax.Array
  ) -> jax.Array:
    """Every expert for at most `capacity` tokens of each row, the first that choose it."""
    spec, compute, peers = self.spec, self.compute, self._peers
    one, two, wide = (None,), (None, None), (None, "activation_mlp")
    room = routing.capacity(spec, x.shape[1], compute.experts.capacity_factor)
    assign = Work(
      functools.partial(_assigned, spec.experts, room), (one, ()), (one, one), second=()
    )
    held, place = run(assign, [experts, real])
    deal = Work(functools.partial(_dealt, spec), (one, one, one), (two, one), second=())
    x, share = run(deal, [x, weights, held])
    # peers that have parts of the same rows have all that is dealt, and each takes its experts
    second = () if peers.split else peers.names
    work = functools.partial(Work, peers=peers.names, second=second, dtype=compute.dtype)
    others = peers if peers.split else Peers.none(spec.experts, spec.active)
    rise = functools.partial(_rise_of_dealt, compute, spec, others)
    h = self._risen(work(rise, (two,), (wide,)), [x])
    fall = work(functools.partial(_fall_of_dealt, compute, spec, others), (wide, one), (two,))
    (y,) = run(fall, [h, share], [self.down.kernel])
    collect = Work(_collected, (two, one), (one,), second=())
    (y,) = run(collect, [y, place])
    return self._with_bias(y, experts, weights, place < spec.experts * room)

  @property
  def _peers(self) -> Peers:
    return Peers.of(self.spec.experts, self.spec.active)

  def _risen(self, work: Work, tokens: Sequence[jax.Array]) -> jax.Array:
    """What work makes by the kernels of gate and up, or up alone -> their product, activated."""
    layers = [layer for layer in (self.gate, self.up) if layer is not None]
    work = dataclasses.replace(work, outputs=work.outputs * len(layers))
    made = run(work, tokens, [p for layer in layers for p in layer.params])
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


# What a device does with its own tokens: choices are numbered token by token, k for each.


def _sorted(peers: Peers, count: int, tokens: Arrays, _: Weights) -> Arrays:
  """experts [b t k], real [b t] -> the choices by expert [b t k], how many of each there are on
  each device [1 1 (w e)].
  """
  experts, real = tokens
  used = jnp.where(real[..., None], experts, count)
  order, sizes = routing.places(used.reshape(used.size), count)
  counts = peers.counts(sizes)
  return order.reshape(experts.shape), counts.reshape(1, 1, counts.size)


def _rise(product: Product, spec: MoeSpec, peers: Peers, tokens: Arrays, params: Weights) -> Arrays:
  """x [b t d] and the sorted choices -> gate and up, or up alone [b (t k) f]:
  with k apart, the TPU's compiler would lay out every row anew for each product.
  """
  x, weights, order, counts = tokens
  rows = shuffle.dealt_out(x.reshape(-1, x.shape[-1]), order.reshape(order.size), order.shape[2])
  if spec.weigh_inputs:
    rows = shuffle.times(rows, shuffle.moved(weights.reshape(order.size, 1), order)[:, 0])
  rows = peers.sent(rows, counts)
  sizes = peers.sizes(counts)

  def spread(bias: jax.Array) -> jax.Array:
    return bias[jnp.repeat(jnp.arange(peers.each), sizes, total_repeat_length=rows.shape[0])]

  risen = lambda kernel, rows: grouped_matmul(product, rows, kernel, sizes)
  made = _by_layer(spec, params, rows, risen, spread)
  return tuple(y.reshape(x.shape[0], x.shape[1] * peers.room, y.shape[-1]) for y in made)


def _fall(product: Product, spec: MoeSpec, peers: Peers, tokens: Arrays, params: Weights) -> Arrays:
  """Hidden activations of the sorted choices [b (t k) f] -> the tokens' sums [b t d]."""
  h, weights, order, counts = tokens
  rows, share = h.reshape(h.size // h.shape[-1], h.shape[-1]), ()
  if not spec.weigh_inputs:
    share = (peers.sent(shuffle.moved(weights.reshape(order.size, 1), order), counts)[:, 0],)
  sizes = peers.sizes(counts)

  def fallen(kernel: jax.Array, rows: jax.Array, *share: jax.Array) -> jax.Array:
    y = grouped_matmul(product, rows, kernel, sizes, *share)
    return y if peers.names else summed(y)  # what others send is not to be sent twice

  def summed(y: jax.Array) -> jax.Array:
    return shuffle.added_up(y, order.reshape(order.size), order.shape[2])

  (y,) = params[0].product(fallen, rows, *share)
  y = summed(peers.returned(y, counts)) if peers.names else y
  return (y.reshape(*order.shape[:2], y.shape[-1]),)


def _by_layer(
  spec: MoeSpec,
  params: Weights,
  rows: jax.Array,
  product: Callable[[jax.Array, jax.Array], jax.Array],
  spread: Callable[[jax.Array], jax.Array],
) -> Arrays:
  """By gate and up, or up: product(kernel, rows), and of its bias, if it has one, `spread`."""
  step, made = 2 if spec.expert.bias else 1, []
  for kernel, *biases in (params[i : i + step] for i in range(0, len(params), step)):
    y, *made = kernel.product(product, rows, beside=made)
    for bias in biases:
      y = y + spread(bias.whole).astype(y.dtype)
    made.append(y)
  return tuple(made)


def _rise_of_all(
  compute: Compute, spec: MoeSpec, peers: Peers, tokens: Arrays, params: Weights
) -> Arrays:
  """x [b t d], what inputs are multiplied by [b t e] -> gate and up, or up alone [b t e f]."""
  x, share = tokens
  x, equation = peers.gathered(x), "btwd,edf->btwef"
  if spec.weigh_inputs:
    share = peers.swapped(share, 2).reshape(*x.shape[:3], peers.each)
    each = jnp.broadcast_to(x[:, :, :, None], (*share.shape, x.shape[-1]))
    x, equation = shuffle.times(each, share), "btwed,edf->btwef"
  risen = lambda kernel, x: contract(equation, x, kernel, RISE, compute)
  made = _by_layer(spec, params, x, risen, lambda bias: bias)
  return tuple(y.reshape(*y.shape[:2], spec.experts, y.shape[-1]) for y in made)


def _fall_of_all(compute: Compute, peers: Peers, tokens: Arrays, params: Weights) -> Arrays:
  """Hidden activations [b t e f], what outputs are multiplied by [b t e] -> sums [b t d]."""
  h, share = tokens
  h = shuffle.times(h, peers.swapped(share, 2))
  h = h.reshape(*h.shape[:2], peers.ways, peers.each, h.shape[-1])
  fallen = lambda kernel, h: contract("btwef,efd->btwd", h, kernel, FALL, compute)
  return (peers.summed(*params[0].product(fallen, h)),)


def _rise_of_dealt(
  compute: Compute, spec: MoeSpec, peers: Peers, tokens: Arrays, params: Weights
) -> Arrays:
  """Inputs [b e c d] -> gate and up, or up alone [b e c f]."""
  x = _by_device(peers, peers.swapped(tokens[0], 1))
  risen = lambda kernel, x: contract("bwecd,edf->bwecf", x, kernel, RISE, compute)
  made = _by_layer(spec, params, x, risen, lambda bias: bias[:, None])
  return tuple(y.reshape(*tokens[0].shape[:3], y.shape[-1]) for y in made)


def _fall_of_dealt(
  compute: Compute, spec: MoeSpec, peers: Peers, tokens: Arrays, params: Weights
) -> Arrays:
  """Hidden activations [b e c f], what they are multiplied by [b e c] -> outputs [b e c d]."""
  h, share = tokens
  h = _by_device(peers, h if spec.weigh_inputs else shuffle.times(h, peers.swapped(share, 1)))
  fallen = lambda kernel, h: contract("bwecf,efd->bwecd", h, kernel, FALL, compute)
  (y,) = params[0].product(fallen, h)
  return (peers.swapped(y.reshape(*share.shape, y.shape[-1]), 1),)


def _by_device(peers: Peers, x: jax.Array) -> jax.Array:
  """[b (w e) c d] -> [b w e c d]."""
  return x.reshape(x.shape[0], peers.ways, x.shape[1] // peers.ways, *x.shape[2:])


def _assigned(count: int, room: int, tokens: Arrays, _: Weights) -> Arrays:
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


def _dealt(spec: MoeSpec, tokens: Arrays, _: Weights) -> Arrays:
  """x [b t d], weights [b t k], held [b e c] -> inputs [b e c d], and what their outputs are
  multiplied by [b e c].
  """
  x, weights, held = tokens
  take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
  share = take(weights.reshape(weights.shape[0], weights.shape[1] * weights.shape[2]), held)
  x = take(x, held // spec.active)
  return (shuffle.times(x, share) if spec.weigh_inputs else x), share


def _collected(tokens: Arrays, _: Weights) -> Arrays:
  """Outputs [b e c d], each choice's place [b t k] -> the tokens' sums [b t d]."""
  y, place = tokens
  rows = y.reshape(y.shape[0], y.shape[1] * y.shape[2], y.shape[3])
  take = jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))
  return (take(rows, place).sum(2),)
