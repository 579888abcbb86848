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

  def tile(sums: Sums, part: tuple) -> tuple[Sums, None]:
    return _add(sums, _tile(head, used, *part)[0]), None

  return lax.scan(tile, _zeros(), _cut(head, x, targets, weights))[0]


def _forward(head: Head, x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array):
  used = collectives.gather(w.astype(x.dtype), head.axes)
  a, b, out = head.equation.replace("->", ",").split(",")

  def tile(carry: tuple[Sums, jax.Array], part: tuple):
    sums, shares = carry
    new, dlogits = _tile(head, used, *part)
    dx = sharding.einsum(f"{out},{b}->{a}", dlogits, used, precision=head.precision, like=part[0])
    more = collectives.partial(
      f"{a},{out}->{b}", head.axes, part[0], dlogits, precision=head.precision
    )
    return (_add(sums, new), shares + more), dx

  none = _zeros(), collectives.nothing(head.axes, w.shape)
  (sums, shares), dx = lax.scan(tile, none, _cut(head, x, targets, weights))
  # added up before anything else: the shares, a whole unembedding in float32, would be kept until
  # the end of the backward pass, to be sent along with the embedding's
  dx, dw = lax.optimization_barrier((_join(dx), collectives.scatter(shares, head.axes)))
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


def _cut(head: Head, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """[b t ...] -> [tiles b t/tiles ...], each: every tile takes tokens from all of the length, so
  that one that is split over devices stays where it is.
  """
  n = head.tiles
  return tuple(
    jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // n, n, *x.shape[2:]), 2, 0) for x in arrays
  )


def _join(x: jax.Array) -> jax.Array:
  """[tiles b t/tiles d] -> [b t d]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
