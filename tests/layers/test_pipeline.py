"""Layers in stages are the same layers one after the other, whatever the schedule; and a schedule
leaves no stage idle for longer than it says.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from maxtext import sharding
from maxtext.layers import pipeline
from maxtext.layers.schedule import Schedule
from maxtext.masks import Mask

WIDTH, LENGTH = 4, 3
RULES = {"layers": ("stage",), "activation_batch": ("data", "stage"), "embed": ()}
RULES |= dict.fromkeys(("activation_length", "activation_norm_length", "activation_embed"), ())

# stages, repeats, layers of each, microbatches, ticks between stages
SCHEDULES = [
  (2, 1, 1, 2, 1),
  (2, 3, 2, 4, 1),
  (4, 1, 2, 4, 1),
  (4, 1, 1, 8, 2),
  (4, 2, 1, 4, 1),
  (4, 2, 1, 8, 2),
  (4, 3, 1, 12, 1),
  (8, 2, 1, 8, 1),
  (8, 1, 1, 8, 2),  # the last rows come out when the first places have gone round
  (8, 2, 1, 16, 2),
]


def layers(weights, x, mask, keys, pick=lambda weights: weights):
  """x -> tanh(x * w + position), one layer after the other; each says how many tokens it saw."""

  def one(x, w):
    w = pick({"w": w})["w"]
    return jnp.tanh(x * w[...] + 0.1 * mask.q_pos[..., None]), mask.q_seg.sum()[None]

  return jax.lax.scan(one, x, weights["w"])


def sequential(w, x, mask):
  says = []
  for one in w:
    x, said = layers({"w": one[None]}, x, mask, None)
    says.append(said[0])
  return x, jnp.stack(says)


def piped(schedule, w, x, mask):
  stages = schedule.stages
  grid = np.array(jax.devices()).reshape(8 // stages, stages)
  mesh = Mesh(grid, ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
  weights = {"w": nnx.Param(w, axes=("embed",))}
  with sharding.use(sharding.Layout(mesh, sharding.Rules(RULES))):
    return pipeline.run(layers, weights, x, mask, None, schedule)


def inputs(sizes):
  stages, repeats, each, count, _ = sizes
  rows = 2 * count * (8 // stages)
  keys = jax.random.split(jax.random.key(0), 3)
  w = 1 + 0.1 * jax.random.normal(keys[0], (stages * repeats * each, WIDTH))
  x = jax.random.normal(keys[1], (rows, LENGTH, WIDTH))
  segments = jax.random.randint(keys[2], (rows, LENGTH), 0, 3)
  return w, x, Mask.of(jnp.arange(rows * LENGTH).reshape(rows, LENGTH) % 7, segments)


def gradients(run, mask):
  def loss(w, x):
    y, said = run(w, x, mask)
    return (y**2).sum(), (y, said)

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
def test_layers_in_stages_are_the_layers_in_a_row(sizes):
  w, x, mask = inputs(sizes)
  runs = functools.partial(piped, Schedule(*sizes)), sequential
  found, expected = (gradients(run, mask)(w, x) for run in runs)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, expected)


def test_a_program_does_not_grow_with_its_microbatches():
  lines = []
  for count in (4, 8, 32):
    sizes = (4, 2, 1, count, 1)
    w, x, mask = inputs(sizes)
    lowered = gradients(functools.partial(piped, Schedule(*sizes)), mask).lower(w, x)
    lines.append(lowered.as_text().count("\n"))
  assert max(lines) < 1.05 * min(lines), lines


@pytest.mark.parametrize("sizes", SCHEDULES, ids=str)
def test_the_bubble_is_the_share_of_ticks_in_which_a_stage_has_no_rows(sizes):
  schedule = Schedule(*sizes)
  stages, repeats, _, count, hop = sizes
  busy = np.zeros((stages, schedule.ticks), bool)
  for part in range(repeats * count):
    for stage in range(stages):
      assert not busy[stage, part + hop * stage]
      busy[stage, part + hop * stage] = True
  assert (~busy).mean() == pytest.approx(schedule.bubble)
