"""Rows of a device's own tokens: in another order, once for each of a token's choices, and weighed.

Letters: n tokens, k the choices of each, m rows, d their width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def moved(rows: jax.Array, order: jax.Array) -> jax.Array:
  """Rows [m ...] in this order, in which each stands once."""
  return rows.at[order.reshape(order.size)].get(unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dealt_out(x: jax.Array, order: jax.Array, active: int) -> jax.Array:
  """Tokens [n d], of k choices each -> [(n k) d], that of every choice in this order of them."""
  return x[order // active]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def added_up(y: jax.Array, order: jax.Array, active: int) -> jax.Array:
  """What choices in this order [(n k) d] come to for each token, k of them -> [n d]."""
  back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
  return moved(y, back).reshape(-1, active, y.shape[-1]).sum(1)


# Each is the other's gradient: neither is to hold a token k times, or to add rows up one by one.
dealt_out.defvjp(
  lambda x, order, active: (dealt_out(x, order, active), order),
  lambda active, order, g: (added_up(g, order, active), None),
)
added_up.defvjp(
  lambda y, order, active: (added_up(y, order, active), order),
  lambda active, order, g: (dealt_out(g, order, active), None),
)


@jax.custom_vjp
def times(x: jax.Array, share: jax.Array) -> jax.Array:
  """x [... d] times [...], in float32 before it is rounded to the dtype of x."""
  return (x * share[..., None]).astype(x.dtype)


def _times_backward(
  saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Both gradients from what is rounded, so that nothing as large as x is there in float32."""
  x, share = saved
  x, g = jax.lax.optimization_barrier((x, g))  # else x is made in float32 beside itself
  dshare = jnp.einsum("...d,...d->...", g, x, preferred_element_type=jnp.float32)
  return (g * share[..., None]).astype(x.dtype), dshare.astype(share.dtype)


times.defvjp(lambda x, share: (times(x, share), (x, share)), _times_backward)
