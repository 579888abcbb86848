"""Which experts a token goes through, and how much each counts: pure functions of the router's
logits, in float32.

Equal ranks are settled for the expert with the lower index. Letters: e experts, k the chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maxtext.specs import MoeSpec

TINY = 1e-20  # added to a sum of scores that divides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
  """What a layer says of its routing, over all tokens that are not padding: how many chose each
  expert, `load` [e], and the sum of the shares its router gave to each, `share` [e]; float32.

  The shares can be differentiated.
  """

  load: jax.Array
  share: jax.Array


def scores(spec: MoeSpec, logits: jax.Array) -> jax.Array:
  """Logits [... e] -> what an expert is worth before anything is chosen [... e]."""
  if spec.score == "softmax":
    return jax.nn.softmax(logits, axis=-1)
  return jax.nn.sigmoid(logits) if spec.score == "sigmoid" else logits


def ranks(spec: MoeSpec, logits: jax.Array, bias: jax.Array | None) -> jax.Array:
  """Logits [... e], choice bias [e] -> what experts are chosen by [... e]; has no gradient.

  Without a bias the order of the logits is that of the scores, and tells apart what these round.
  """
  found = logits if bias is None else scores(spec, logits) + bias
  return jax.lax.stop_gradient(found)


def chosen(spec: MoeSpec, ranks: jax.Array) -> jax.Array:
  """Ranks [... e] -> the chosen experts [... k], best first; within the best groups, if there are
  groups.
  """
  if spec.active_groups < spec.groups:
    grouped = ranks.reshape(*ranks.shape[:-1], spec.groups, spec.experts // spec.groups)
    best = jax.lax.top_k(grouped, 2 if spec.choice_bias else 1)[0].sum(-1)
    groups = jax.lax.top_k(best, spec.active_groups)[1]
    allowed = _hits(groups, spec.groups).any(-2)[..., None]
    ranks = jnp.where(allowed, grouped, -jnp.inf).reshape(ranks.shape)
  return jax.lax.top_k(ranks, spec.active)[1]


def weights(spec: MoeSpec, logits: jax.Array, experts: jax.Array) -> jax.Array:
  """Logits [... e] and the chosen experts [... k] -> how much each of these counts [... k]."""
  hits = _hits(experts, spec.experts)
  picked = jnp.where(hits, scores(spec, logits)[..., None, :], 0).sum(-1)
  if spec.score == "softmax_of_chosen":
    picked = jax.nn.softmax(picked, axis=-1)
  if spec.normalize:
    picked = picked / (picked.sum(-1, keepdims=True) + TINY)
  return picked * spec.scale if spec.scale != 1 else picked


def spread(experts: jax.Array, values: jax.Array, count: int) -> jax.Array:
  """Values [... k] of the chosen experts [... k] -> of all of them [... e], 0 for the others."""
  return jnp.where(_hits(experts, count), values[..., None], 0).sum(-2)


def routed(spec: MoeSpec, logits: jax.Array, experts: jax.Array, real: jax.Array) -> Routed:
  """Logits [b t e], the chosen experts [b t k], which tokens are not padding [b t] -> sums."""
  shares = scores(spec, logits)
  if spec.score == "sigmoid":
    shares = shares / (shares.sum(-1, keepdims=True) + TINY)
  elif spec.score == "softmax_of_chosen":
    shares = jax.nn.softmax(shares, axis=-1)
  counts = _hits(experts, spec.experts).any(-2) & real[..., None]
  return Routed(
    counts.sum((0, 1), dtype=jnp.float32), jnp.where(real[..., None], shares, 0).sum((0, 1))
  )


def balance_loss(said: Sequence[Routed], tokens: jax.Array) -> jax.Array:
  """What blocks say of their layers [l e], over so many tokens each -> e * sum over experts of
  load * share, each a mean over the tokens of all layers (Fedus et al. 2021, section 2.2, for
  several experts a token).

  With k experts a token it is k where all are equally loaded. Only shares have a gradient. Layers
  that differ in their number of experts are taken apart, and the mean of all layers is returned.
  """
  kinds = sorted({one.load.shape[-1] for one in said})
  total, depth = jnp.zeros(()), sum(one.load.shape[0] for one in said)
  for count in kinds:
    same = [one for one in said if one.load.shape[-1] == count]
    layers = sum(one.load.shape[0] for one in same)
    passed = layers * jnp.maximum(tokens, 1)
    load = sum(jax.lax.stop_gradient(one.load).sum(0) for one in same) / passed
    share = sum(one.share.sum(0) for one in same) / passed
    total = total + layers / depth * count * (load * share).sum()
  return total


def capacity(spec: MoeSpec, length: int, factor: float) -> int:
  """How many of a row's tokens an expert takes: `factor` times its share of their choices, rounded
  up.
  """
  return min(length, max(1, math.ceil(length * spec.active / spec.experts * factor)))


def places(experts: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Experts of choices [m], `count` for those that go to none -> the choices ordered by expert and
  then as they stand [m], and how many each expert has [e].
  """
  order = jnp.argsort(experts, stable=True)
  ends = jnp.searchsorted(experts[order], jnp.arange(count + 1))
  return order, jnp.diff(ends).astype(jnp.int32)


def _hits(chosen: jax.Array, count: int) -> jax.Array:
  """[... k] -> [... k e], true where it is that one. What is split over devices stays so."""
  return chosen[..., None] == jax.lax.iota(chosen.dtype, count)
