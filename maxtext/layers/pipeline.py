"""Layers spread over the mesh axis 'stage': each stage works on some rows, while the next one works
on those that it has passed on.

At each tick of a schedule every stage takes what the one before it has made, and runs its layers:
the same program on other rows, so one `vmap` whose axis the mesh splits. Rows that wait for the
first stage stand split over all of them, and move towards it a stage a turn; what the last stage
makes takes the places that they leave, and is there for its next repeat in time. So nothing is ever
whole on one device, and rows end split as they began.

Letters: s stages, r repeats, l layers of a stage in a repeat, n rows of a microbatch, w of these
waiting at each stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from maxtext import collectives, sharding
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.masks import Mask

Layers = Callable[[Any, jax.Array, Mask, Any, Callable], tuple[jax.Array, Any]]


def run(
  layers: Layers, weights: Any, x: jax.Array, mask: Mask, keys: Any, schedule: Schedule
) -> tuple[jax.Array, Any]:
  """x [b t d] through all layers -> [b t d], and what they say of the tokens, added up over the
  microbatches.

  layers(weights, x, mask, keys, pick) runs some layers, whose weights and keys are stacked; it
  returns x and, stacked, what each says. `pick` finds the weights of one of them in those of all
  repeats, and is to be called where the backward pass computes again: what it finds would else be
  kept at every tick. `weights` are variables with the axis names of one layer, and `keys` those
  that draw dropout, or None.
  """
  layout = sharding.active()
  assert layout is not None
  cut = lambda a: _cut(a, schedule)
  inside = sharding.within(layout.inside(STAGE), functools.partial(_run, layers, schedule))
  waiting, said = inside(weights, cut(x), jax.tree.map(cut, mask), keys)
  return sharding.constrain(_joined(waiting, schedule), *sharding.STREAM), said


def _run(
  layers: Layers, s: Schedule, weights: Any, waiting: jax.Array, rows: Mask, keys: Any
) -> tuple[jax.Array, Any]:
  """`waiting` [s w n t d] and the mask of its `rows` [s w n ...] through all layers."""
  spread = functools.partial(_spread, s)
  weights = jax.tree.map(spread, weights, is_leaf=lambda p: hasattr(p, "get_metadata"))
  keys = None if keys is None else _in_order(keys, s)
  waiting = _place(waiting, None, *sharding.STREAM)
  masks = jax.tree.map(lambda a: a.reshape(s.microbatches, *a.shape[2:]), rows)
  stage = jnp.arange(s.stages)
  pick = lambda tree, i: jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, False), tree)

  def of_stage(weights: Any, keys: Any, x: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
    number, repeat = at % s.microbatches, jnp.clip(at // s.microbatches, 0, s.repeats - 1)
    if keys is not None:
      keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(pick(keys, repeat))
    tokens = lambda a: sharding.constrain(a, "activation_batch", sharding.LENGTH)
    mask = jax.tree.map(tokens, pick(masks, number))
    return layers(weights, x, mask, keys, functools.partial(_picked, repeat))

  def tick(carry: tuple[jax.Array, ...], i: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
    waiting, *passed = carry
    first = waiting[:, i % s.waiting]
    x = jnp.where(_column(stage == 0, first), first, passed[-1])
    at = i - s.hop * stage
    made, said = jax.vmap(of_stage, spmd_axis_name=STAGE)(weights, keys, x, at)
    made = _place(made, *sharding.STREAM)
    waiting = waiting.at[:, i % s.waiting].set(_move(first, -1))
    late = (i - s.late) % s.waiting
    filled = (stage == (s.stages - 1 - s.turns) % s.stages) & (i >= s.late)
    left = jnp.where(_column(filled, made), _move(made, -s.turns), waiting[:, late])
    waiting = waiting.at[:, late].set(left)
    new = [_move(made, 1)] if s.hop == 1 else [made, _move(passed[0], 1)]
    return (waiting, *new), said

  begun = [waiting[:, 0]] * s.hop  # any rows, which no one waits for
  (waiting, *_), said = lax.scan(tick, (waiting, *begun), jnp.arange(s.ticks))
  return _returned(waiting, s), jax.tree.map(functools.partial(_added, schedule=s), said)


def layer(p: Any, number: jax.Array) -> Any:
  """One layer of a variable that is stacked and split over the stages, on all of them."""
  layout, axes = sharding.active(), p.get_metadata()["axes"]
  assert layout is not None
  spec = layout.inside(STAGE).sharding(axes, p.shape[1:]).spec
  own = p.shape[0] // layout.mesh.shape[STAGE]

  def find(w: jax.Array, number: jax.Array) -> jax.Array:
    w = lax.dynamic_index_in_dim(w, number % own, 0, False)
    there = lax.axis_index(STAGE) == number // own
    return lax.psum(jnp.where(there, w, jnp.zeros_like(w)), STAGE)

  take = sharding.by_device(find, (PartitionSpec(STAGE, *spec), PartitionSpec()), spec)
  return p.replace(take(p[...], number))


def _column(flags: jax.Array, x: jax.Array) -> jax.Array:
  """[s] -> a shape that broadcasts with [s ...]."""
  return flags.reshape(-1, *[1] * (x.ndim - 1))


def _cut(x: jax.Array, s: Schedule) -> jax.Array:
  """[b ...] -> [s w n ...]: every microbatch has rows of all shares of the batch, so that nothing
  moves.
  """
  x = x.reshape(_ahead(), s.stages, -1, s.waiting, *x.shape[1:])
  x = jnp.moveaxis(x, (1, 3), (0, 1))
  return x.reshape(s.stages, s.waiting, -1, *x.shape[4:])


def _joined(x: jax.Array, s: Schedule) -> jax.Array:
  """[s w n ...] -> [b ...], as before `_cut`."""
  x = x.reshape(s.stages, s.waiting, _ahead(), -1, *x.shape[3:])
  x = jnp.moveaxis(x, (0, 1), (1, 3))
  return x.reshape(-1, *x.shape[4:])


def _ahead() -> int:
  """Into how many parts rows are split before they are over stages."""
  layout = sharding.active()
  assert layout is not None
  axes = layout.splits("activation_batch")
  return math.prod(layout.mesh.shape[m] for m in axes[: axes.index(STAGE)]) if STAGE in axes else 1


def _place(x: jax.Array, *axes: str | None) -> jax.Array:
  """[s ...] with the stages over the mesh, and the other dimensions by their names."""
  layout = sharding.active()
  assert layout is not None
  return sharding.place(x, PartitionSpec(STAGE, *layout.sharding(axes, x.shape[1:]).spec))


def _move(x: jax.Array, by: int) -> jax.Array:
  """[s ... b t d], each stage's part to the stage `by` further on, round a ring."""
  layout = sharding.active()
  assert layout is not None
  ways = layout.mesh.shape[STAGE]
  if not by % ways:
    return x
  lead = (None,) * (x.ndim - 1 - len(sharding.STREAM))
  spec = layout.sharding((*lead, *sharding.STREAM), x.shape[1:]).spec
  spec = PartitionSpec(STAGE, *spec)
  ring = [(i, (i + by) % ways) for i in range(ways)]
  return sharding.by_device(lambda x: lax.ppermute(x, STAGE, ring), spec, spec)(x)


def _returned(waiting: jax.Array, s: Schedule) -> jax.Array:
  """The rows that have waited [s w n t d], each back at the stage where it began."""
  turns, once = divmod(s.late, s.waiting)
  parts = [_move(waiting[:, :once], turns + 1), _move(waiting[:, once:], turns)]
  return jnp.concatenate(parts[not once :], 1)


def _in_order(w: jax.Array, s: Schedule) -> jax.Array:
  """[layers ...] -> [s r l ...]: layers run through all stages before they come to the first one
  again.
  """
  return jnp.swapaxes(w.reshape(s.repeats, s.stages, s.layers, *w.shape[1:]), 0, 1)


def _spread(s: Schedule, p: Any) -> Any:
  """A stacked variable, each stage's layers at the stage [s l r ...]."""
  axes = p.get_metadata()["axes"]
  w = collectives.deal(p[...], axes, STAGE, s.stages, s.repeats)
  return p.replace(_place(jnp.swapaxes(w, 1, 2), None, None, *axes))


def _picked(repeat: jax.Array, weights: Any) -> Any:
  """Variables [r ...] -> those of one repeat."""

  def find(w: jax.Array) -> jax.Array:
    if w.shape[0] == 1:
      return w[0]
    one = jnp.arange(w.shape[0]) == repeat
    return jnp.where(_column(one, w), w, 0).sum(0, dtype=w.dtype)

  return jax.tree.map(find, weights)


def _added(said: jax.Array, schedule: Schedule) -> jax.Array:
  """What every stage said at every tick [ticks s l ...] -> [layers ...], of rows alone that it was
  given.
  """
  s = schedule
  at = np.arange(s.ticks)[:, None] - s.hop * np.arange(s.stages)
  repeat = at[..., None] // s.microbatches == np.arange(s.repeats)
  total = jnp.einsum(
    "isr,isl...->rsl...", repeat.astype(said.dtype), said, precision=lax.Precision.HIGHEST
  )
  return total.reshape(s.repeats * s.stages * s.layers, *total.shape[3:])
