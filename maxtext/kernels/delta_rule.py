"""The gated delta rule (Yang et al. 2025, section 3.1): a state that fades and is corrected.

For each value head the state S [k v] goes from token to token as

  S <- exp(decay) S,   S <- S + rate * key (value - S^T key)^T,   out = S^T query,

from zero where a document starts. A token of rate 0 and decay 0 changes nothing. All is float32.
Letters: r value heads of a key head, v their width, n chunks, i and j tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64  # tokens that are computed at once; a power of two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the rule makes of tokens: queries, keys [b t g k], values [b t g r v]; of each value head
  the logarithm of what is kept of the state, at most 0, and the rate of its correction [b t g r];
  and whether a document starts at a token [b t].
  """

  queries: jax.Array
  keys: jax.Array
  values: jax.Array
  decay: jax.Array
  rate: jax.Array
  starts: jax.Array


def delta_rule(
  tokens: Inputs, state: jax.Array, precision: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """Tokens after a state [b g r k v] -> what they read [b t g r v], and the state after them."""
  if tokens.starts.shape[1] == 1:
    return one_token(tokens, state, precision)
  return in_chunks(tokens, state, precision)


def one_token(
  tokens: Inputs, state: jax.Array, precision: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """As `delta_rule`, of one token a row, by the formula itself."""
  dot = functools.partial(jnp.einsum, precision=precision)
  only = jax.tree.map(lambda x: x[:, 0], tokens)
  keep = jnp.where(only.starts[:, None, None], 0.0, jnp.exp(only.decay))
  state = state * keep[..., None, None]
  wrong = only.values - dot("bgk,bgrkv->bgrv", only.keys, state)
  state = state + dot("bgk,bgrv->bgrkv", only.keys, only.rate[..., None] * wrong)
  return dot("bgk,bgrkv->bgrv", only.queries, state)[:, None], state


def in_chunks(
  tokens: Inputs, state: jax.Array, precision: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """As `delta_rule`, chunk after chunk, within which all corrections are found at once: they solve
  a triangular system (Yang et al. 2024, section 3.2, with the decay between tokens).
  """
  dot = functools.partial(jnp.einsum, precision=precision)
  b, t, g, r, v = tokens.values.shape
  size = min(CHUNK, 1 << (t - 1).bit_length())
  cut = jax.tree.map(lambda x: _cut(x, size), tokens)
  q, k = (jnp.einsum("bnigk->bngik", x) for x in (cut.queries, cut.keys))
  values = jnp.einsum("bnigrv->bngriv", cut.values)
  decay, rate = (jnp.einsum("bnigr->bngri", x) for x in (cut.decay, cut.rate))
  run = jnp.cumsum(cut.starts, axis=2)[:, :, None, None]  # [b n 1 1 i]
  between = _between(decay)
  i, j = jnp.arange(size)[:, None], jnp.arange(size)
  seen = (i >= j) & (run[..., :, None] == run[..., None, :])
  fade = _exp_where(seen, between)  # how much of what token j writes is left at i
  reach = _exp_where(run == 0, between[..., 0] + decay[..., :1])  # of the state before, at i
  alike = dot("bngik,bngjk->bngij", k, k)[:, :, :, None]
  system = jnp.where(i > j, alike * fade * rate[..., None], 0.0)
  # of few dimensions: XLA's CPU backend breaks down on transposes of eight
  few = system.reshape(-1, g * r, size, size)
  solved = inverse(few).reshape(system.shape) * rate[..., None, :]
  new = dot("bngrij,bngrjv->bngriv", solved, values)
  read = dot("bngrij,bngjk->bngrik", solved * reach[..., None, :], k)
  scores = dot("bngik,bngjk->bngij", q, k)[:, :, :, None] * fade

  def step(state: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
    q, k, new, read, scores, reach, left = part
    new = new - dot("bgrik,bgrkv->bgriv", read, state)
    out = reach[..., None] * dot("bgik,bgrkv->bgriv", q, state)
    out = out + dot("bgrij,bgrjv->bgriv", scores, new)
    state = reach[..., -1, None, None] * state
    return state + dot("bgjk,bgrjv->bgrkv", k, left[..., None] * new), out

  parts = (q, k, new, read, scores, reach, fade[..., -1, :])
  state, out = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), parts))
  return jnp.einsum("nbgriv->bnigrv", out).reshape(b, -1, g, r, v)[:, :t], state


def _cut(x: jax.Array, size: int) -> jax.Array:
  """[b t ...] -> [b n size ...], with zeros at the end."""
  b, t, *rest = x.shape
  x = jnp.pad(x, [(0, 0), (0, -t % size), *[(0, 0)] * len(rest)])
  return x.reshape(b, -1, size, *rest)


def _between(decay: jax.Array) -> jax.Array:
  """decay [.. i] -> [.. i j]: its sum over the tokens after j up to i.

  Summed from j on, by a product with ones: the difference of two long sums has fewer digits.
  """
  size = decay.shape[-1]
  i, j = jnp.arange(size)[:, None], jnp.arange(size)
  after = jnp.where(i > j, decay[..., None], 0.0)
  return _exact("im,...mj->...ij", (i >= j).astype(decay.dtype), after)


def _exp_where(there: jax.Array, x: jax.Array) -> jax.Array:
  """exp(x), or 0 where it is not `there`, in the gradient too."""
  return jnp.where(there, jnp.exp(jnp.where(there, x, 0.0)), 0.0)


@jax.custom_vjp
def inverse(a: jax.Array) -> jax.Array:
  """Strictly lower triangular a [... c c], c a power of two -> the inverse of 1 + a.

  Found by halves, of which each is inverted first: powers of a, which would need fewer products,
  can be far larger than the inverse.
  """
  size, width = a.shape[-1], 1
  blocks = jnp.ones((*a.shape[:-1], 1, 1), a.dtype)  # inverted, along the diagonal
  while width < size:
    count = size // (2 * width)
    tiles = a.reshape(*a.shape[:-2], count, 2 * width, count, 2 * width)
    own = jnp.eye(count, dtype=a.dtype)[:, None, :, None]
    corner = (tiles[..., width:, :, :width] * own).sum(-2)
    first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    corner = -_exact("...xy,...yz->...xz", _exact("...xy,...yz->...xz", second, corner), first)
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    blocks = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
    width *= 2
  return blocks[..., 0, :, :]


_exact = functools.partial(jnp.einsum, precision="highest")


def _inverse_forward(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  found = inverse(a)
  return found, found


def _inverse_backward(found: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  g = _exact("...yx,...yz->...xz", found, g)
  return (-jnp.tril(_exact("...xy,...zy->...xz", g, found), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)
