"""Choice biases move towards equal loads, by the load of the whole batch and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxtext.objectives.mean import Mean
from maxtext.training.metrics import step_scalars
from maxtext.training.state import State
from maxtext.training.step import Rules, make_step

PATH = "stages.1.blocks.0"
NAME = f"{PATH}.moe.choice_bias"
RATE = optax.constant_schedule(0.1)
CHOICES = np.array([[0, 1], [0, 1], [0, 3], [2, 3]])  # of four tokens, in two layers, of 4 experts


def loss(params, batch, key=None):
  """Says that each row went to the experts in it; the loss pulls at biases and w alike."""
  total = (jnp.square(params["w"]) + params[NAME].sum() ** 2).sum()
  hits = jax.nn.one_hot(batch["choices"], 4).sum(0)  # [l e]
  return {"loss": Mean(total, jnp.ones(())), "loads": {PATH: hits}}


def run(rules, optimizer=None):
  optimizer = optimizer or optax.adamw(RATE, weight_decay=0.5)
  params = {"w": jnp.ones(3), NAME: jnp.full((2, 4), 0.5)}
  state = State(jnp.int32(0), params, optimizer.init(params))
  batch = {"choices": jnp.asarray(CHOICES)}
  return jax.jit(make_step(loss, optimizer, RATE, rules))(state, batch)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bias_goes_up_where_an_expert_has_too_little_and_down_where_too_much(parts):
  rules = Rules(accumulate=parts, mixtures={PATH: range(3, 5)}, bias_rate=0.01)
  new, _ = run(rules)
  loads = np.array([[3, 0, 1, 0], [0, 2, 0, 2]])
  step = 0.01 * np.sign(loads.mean(-1, keepdims=True) - loads)
  np.testing.assert_allclose(new.params[NAME], 0.5 + step, rtol=1e-6)
  assert np.abs(new.params["w"] - 1).min() > 0.01


@pytest.mark.parametrize("optimizer", [None, optax.sgd(1.0)], ids=["adamw", "sgd"])
def test_no_optimizer_touches_a_choice_bias(optimizer):
  new, _ = run(Rules(mixtures={PATH: range(3, 5)}), optimizer)
  np.testing.assert_array_equal(new.params[NAME], 0.5)


def test_loads_are_told_layer_by_layer():
  _, metrics = run(Rules(accumulate=2, mixtures={PATH: range(3, 5)}))
  scalars = step_scalars(metrics)
  assert scalars["moe/expert_load/3"] == 3 and scalars["moe/expert_load/4"] == 2
  assert scalars["moe/expert_load"] == 3
