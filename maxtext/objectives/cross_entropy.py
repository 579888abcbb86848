"""Cross entropy from the last layer, without ever holding the logits of more than one tile.

The gradient by the logits is known as soon as the logits are, so the forward pass computes the
gradients by the last layer and by the unembedding tile after tile, and the backward pass only
scales them. That is three products in all, as many as plain differentiation has, and no [b t v]
array outlives its tile.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from maxtext import collectives, sharding

Sums = tuple[jax.Array, jax.Array, jax.Array]
PIECES = 8  # of a gradient, at most: products of fewer channels keep no chip busy


@dataclasses.dataclass(frozen=True)
class Head:
  """How logits come about: `equation` takes x [b t d] and the parameter with `axes` to [b t v];
  these are multiplied by `scale`, then capped.

  `z_loss` weighs log(sum(exp(logits)))^2; `tiles` cuts the length into as many parts.
  """

  equation: str
  axes: tuple[str, ...]
  scale: float = 1.0
  soft_cap: float | None = None
  z_loss: float = 0.0
  tiles: int = 1
  precision: str | None = None
  f32: bool = False


def cross_entropy(
  head: Head, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
  """x [b t d], w, targets [b t], weights [b t] -> sums over tokens: loss, cross entropy, z-loss;
  float32.

  Only the loss (cross entropy + z-loss) can be differentiated, by x and w; the other two are for
  reading.
  """
  x = x.astype(jnp.float32) if head.f32 else x
  loss, entropy, z = _sums(head, x, w, targets, weights)
  return loss, lax.stop_gradient(entropy), lax.stop_gradient(z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(head: Head, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
  used = collectives.gather(w.astype(x.dtype), head.axes)

  def tile(sums: Sums, i: jax.Array) -> tuple[Sums, None]:
    part = (_of_tile(column, i) for column in (x, targets, weights))
    return _add(sums, _tile(head, used, *part)[0]), None

  x, targets, weights = (_in_tiles(head, column) for column in (x, targets, weights))
  return lax.scan(tile, _zeros(), jnp.arange(head.tiles))[0]


def _forward(head: Head, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array):
  used = collectives.gather(w.astype(x.dtype), head.axes)
  a, b, out = head.equation.replace("->", ",").split(",")
  at = b.index(a[-1])  # the width, which is contracted
  pieces, ways = _pieces(head, x, w.shape, at)
  shape = (*w.shape[:at], w.shape[at] // pieces, *w.shape[at + 1 :])

  def tile(carry: tuple[Sums, jax.Array, jax.Array], i: jax.Array):
    sums, dw, xs = carry
    x = _of_tile(xs, i)
    new, dlogits = _tile(head, used, x, _of_tile(targets, i), _of_tile(weights, i))
    dx = sharding.einsum(f"{out},{b}->{a}", dlogits, used, precision=head.precision, like=x)

    def piece(_: None, each: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
      dw, x = each
      share = collectives.partial(
        f"{a},{out}->{b}", head.axes, x, dlogits, precision=head.precision
      )
      return None, dw + collectives.split(share, head.axes)

    # one after the other: so no device ever holds its share of the whole gradient, in float32
    _, dw = lax.scan(piece, None, (dw, _take_apart(x, pieces, ways)), unroll=pieces == 1)
    # x is not needed any more: its gradient takes its place
    dx = dx.reshape(*xs.shape[:2], *xs.shape[3:])
    return (_add(sums, new), dw, lax.dynamic_update_index_in_dim(xs, dx, i, 2)), None

  none = jnp.stack([collectives.nothing(head.axes, shape)] * pieces)
  targets, weights = _in_tiles(head, targets), _in_tiles(head, weights)
  carry = _zeros(), none, _in_tiles(head, x)
  (sums, dw, dx), _ = lax.scan(tile, carry, jnp.arange(head.tiles))
  # added up before anything else, and not kept until the end of the backward pass, to be sent along
  # with the embedding's
  dx, dw = lax.optimization_barrier((dx.reshape(x.shape), collectives.joined(dw, head.axes, at)))
  return sums, (dx, dw.astype(w.dtype))


def _backward(head: Head, saved: tuple[jax.Array, jax.Array], g: Sums):
  dx, dw = saved
  return (dx * g[0]).astype(dx.dtype), (dw * g[0]).astype(dw.dtype), None, None


_sums.defvjp(_forward, _backward)


def _tile(
  head: Head, w: jax.Array, x: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[Sums, jax.Array]:
  """The sums over one tile, and its loss's gradient by its plain logits in the dtype of x."""
  logits = sharding.einsum(
    head.equation, x, w, precision=head.precision, preferred_element_type=jnp.float32
  )
  logits = sharding.constrain(logits, "activation_batch", "activation_length", "activation_vocab")
  if head.scale != 1:
    logits = logits * head.scale
  if head.soft_cap is not None:
    logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
  top = logits.max(-1, keepdims=True)
  weight = jnp.exp(logits - top)
  total = weight.sum(-1, keepdims=True)
  norm = jnp.log(total) + top  # [b t 1]
  hit = lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
  picked = jnp.where(hit, logits, 0.0).sum(-1)
  entropy = ((norm[..., 0] - picked) * weights).sum()
  z = (head.z_loss * jnp.square(norm[..., 0]) * weights).sum()
  share = weights[..., None]
  grad = weight * (share * (1 + 2 * head.z_loss * norm) / total) - jnp.where(hit, share, 0.0)
  if head.soft_cap is not None:
    grad = grad * (1 - jnp.square(logits / head.soft_cap))
  if head.scale != 1:
    grad = grad * head.scale
  return (entropy + z, entropy, z), grad.astype(x.dtype)


def _zeros() -> Sums:
  zero = jnp.zeros((), jnp.float32)
  return zero, zero, zero


def _add(a: Sums, b: Sums) -> Sums:
  return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _in_tiles(head: Head, x: jax.Array) -> jax.Array:
  """[b t ...] -> [b ways tiles t/(ways tiles) ...]: of a length that is split over devices every
  tile has tokens of each, so that they stay where they are.
  """
  layout = sharding.active()
  ways = 1 if layout is None else layout.ways(sharding.LENGTH)
  b, t, *rest = x.shape
  return x.reshape(b, ways, head.tiles, t // (ways * head.tiles), *rest)


def _of_tile(x: jax.Array, i: jax.Array) -> jax.Array:
  """[b ways tiles t ...] -> [b (ways t) ...]."""
  x = lax.dynamic_index_in_dim(x, i, 2, keepdims=False)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _pieces(head: Head, x: jax.Array, shape: tuple[int, ...], at: int) -> tuple[int, int]:
  """In how many pieces of the width a tile's share of the unembedding's gradient is made, so that
  none is larger than half the tile's logits, which are gone by then; and over how many devices the
  width is split, dimension `at` of this shape.
  """
  layout, width = sharding.active(), shape[at]
  ways = collectives.ways(head.axes, shape, at)
  if layout is None or ways == 1 or head.tiles == 1:
    return 1, ways
  tokens = x.shape[0] * x.shape[1] // head.tiles
  tokens //= layout.batch_ways * layout.ways(sharding.LENGTH)
  pieces = 1
  while pieces < PIECES and pieces * tokens < 2 * width and width % (2 * pieces * ways) == 0:
    pieces *= 2
  return pieces, ways


def _take_apart(x: jax.Array, pieces: int, ways: int) -> jax.Array:
  """x [b t d] of which d is split over devices elsewhere -> [pieces b t d/pieces]: of a piece every
  device has a part.
  """
  b, t, d = x.shape
  x = jnp.moveaxis(x.reshape(b, t, ways, pieces, d // (ways * pieces)), 3, 0)
  return x.reshape(pieces, b, t, d // pieces)
