"""The step: accumulation is one batch, what is not finite is not applied, schedules have their
shapes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxtext.objectives.mean import Mean
from maxtext.training.optimizers import decayed
from maxtext.training.schedules import make_schedule
from maxtext.training.sections import Optimizer
from maxtext.training.state import State, from_tree, place_like, tree
from maxtext.training.step import Rules, make_step

RATE = optax.constant_schedule(0.1)
SECTION = Optimizer(
  opt_type="adamw",
  learning_rate=1.0,
  lr_schedule_type="cosine",
  warmup_steps_fraction=0.1,
  learning_rate_final_fraction=0.1,
  learning_rate_schedule_steps=-1,
  wsd_decay_steps_fraction=0.2,
  adam_b1=0.9,
  adam_b2=0.95,
  adam_eps=1e-8,
  adam_weight_decay=0.1,
  adamw_mask=("norm", "bias"),
  mu_dtype=None,
  gradient_clipping_threshold=1.0,
  optimizer_memory_host_offload=False,
)


def loss(params, batch, key=None):
  """Squared error over the rows that count, each with its own weight."""
  error = jnp.square(batch["x"] @ params["w"] - batch["y"]) * batch["weight"]
  return {"loss": Mean(error.sum(), batch["weight"].sum())}


def problem(rows=12, poison=None):
  random = np.random.default_rng(0)
  x, y = (
    random.normal(size=(rows, 3)).astype(np.float32),
    random.normal(size=rows).astype(np.float32),
  )
  if poison is not None:
    y[4] = poison
  params = {"w": jnp.ones(3)}
  batch = {"x": x, "y": y, "weight": (random.random(rows) < 0.6).astype(np.float32)}
  return params, {k: jnp.asarray(v) for k, v in batch.items()} | {
    "weight": jnp.asarray(batch["weight"]).at[4].set(1)
  }


def run(rules, poison=None, optimizer=None):
  optimizer = optimizer or optax.adamw(RATE)
  params, batch = problem(poison=poison)
  state = State(jnp.int32(0), params, optimizer.init(params))
  return state, *jax.jit(make_step(loss, optimizer, RATE, rules))(state, batch)


@pytest.mark.parametrize("parts", [2, 3, 4, 12])
def test_accumulating_parts_is_one_batch_though_their_weights_differ(parts):
  _, whole, a = run(Rules())
  _, split, b = run(Rules(accumulate=parts))
  np.testing.assert_allclose(split.params["w"], whole.params["w"], rtol=1e-6)
  np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)
  np.testing.assert_allclose(b["raw_grad_norm"], a["raw_grad_norm"], rtol=1e-6)
  assert b["total_weights"] == a["total_weights"]


def test_the_gradient_is_that_of_the_mean_loss():
  params, batch = problem()
  value = lambda p: loss(p, batch)["loss"].value
  _, new, metrics = run(Rules(), optimizer=optax.sgd(0.1))
  np.testing.assert_allclose(
    new.params["w"], params["w"] - 0.1 * jax.grad(value)(params)["w"], rtol=1e-6
  )
  np.testing.assert_allclose(metrics["loss"], value(params), rtol=1e-6)


@pytest.mark.parametrize(("poison", "flag"), [(np.nan, "abort_on_nan"), (np.inf, "abort_on_inf")])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_that_is_not_finite_changes_nothing(poison, flag, parts):
  state, new, metrics = run(Rules(accumulate=parts), poison)
  assert not metrics["ok"]
  jax.tree.map(np.testing.assert_array_equal, new, state)
  # an infinite loss has gradients that are not a number, so both have to be allowed for it to pass
  allowed = Rules(accumulate=parts, abort_on_nan=False, abort_on_inf=flag != "abort_on_inf")
  _, new, metrics = run(allowed, poison)
  assert metrics["ok"] and new.step == 1


def test_a_state_keeps_its_dtypes_whatever_the_gradients_have():
  optimizer = optax.adamw(RATE)
  params, batch = problem()
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  state = State(jnp.int32(0), params, optimizer.init(params))
  new, _ = jax.jit(make_step(loss, optimizer, RATE, Rules(grad_dtype="float32")))(state, batch)
  assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)


def test_gradients_are_shortened_to_the_norm_asked_for_and_both_norms_are_reported():
  state, new, metrics = run(Rules(clip=0.5), optimizer=optax.sgd(1.0))
  assert metrics["raw_grad_norm"] > 0.5 and metrics["grad_norm"] == 0.5
  np.testing.assert_allclose(np.linalg.norm(new.params["w"] - state.params["w"]), 0.5, rtol=1e-5)
  unclipped = run(Rules(), optimizer=optax.sgd(1.0))[1]
  longer = run(Rules(clip=100.0), optimizer=optax.sgd(1.0))[1]
  np.testing.assert_array_equal(longer.params["w"], unclipped.params["w"])


def schedule(steps=100, **changes):
  rate = make_schedule(dataclasses.replace(SECTION, **changes), steps)
  return np.array([float(rate(i)) for i in range(steps + 20)])


def test_warm_up_rises_from_the_first_step_and_every_shape_ends_at_its_final_rate():
  for shape in ("cosine", "linear", "wsd"):
    rates = schedule(lr_schedule_type=shape)
    assert 0 < rates[0] < rates[5] < rates[10] == rates.max() == 1
    np.testing.assert_allclose(rates[100:], 0.1, rtol=1e-5)
    assert (np.diff(rates[10:]) <= 1e-9).all()


def test_shapes_are_those_of_their_names():
  np.testing.assert_allclose(schedule(lr_schedule_type="constant")[10:], 1)
  np.testing.assert_allclose(schedule(lr_schedule_type="linear")[55], 0.55, rtol=1e-5)
  np.testing.assert_allclose(schedule()[55], 0.1 + 0.9 * 0.5, rtol=1e-5)
  wsd = schedule(lr_schedule_type="wsd")
  np.testing.assert_allclose(wsd[10:80], 1)
  np.testing.assert_allclose(wsd[90], 0.55, rtol=1e-5)


def test_the_schedule_can_be_longer_than_the_run():
  np.testing.assert_allclose(
    schedule(learning_rate_schedule_steps=1000)[:120], schedule(1000)[:120]
  )


def test_weight_decay_spares_what_the_patterns_find():
  names = {"a.norm.scale": 0, "a.bias": 0, "a.kernel": 0}
  assert decayed(names, SECTION.adamw_mask) == {
    "a.norm.scale": False,
    "a.bias": False,
    "a.kernel": True,
  }


def test_a_state_goes_through_nested_dicts_and_back():
  params = {"a.kernel": jnp.ones((2, 3)), "b": jnp.zeros(4)}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
  state = State(jnp.int32(3), params, optimizer.init(params))
  nested = tree(state)
  assert set(nested) == {"step", "params", "opt_state"} and set(nested["params"]) == set(params)
  jax.tree.map(np.testing.assert_array_equal, from_tree(state, nested), state)


def test_optimizer_state_stands_where_its_parameter_stands():
  params = {"a.kernel": jnp.ones((2, 3)), "b": jnp.zeros(4)}
  state = State(jnp.int32(0), params, optax.adamw(RATE).init(params))
  places = place_like(state, {"a.kernel": "A", "b": "B"}, "rest")
  assert places.params == {"a.kernel": "A", "b": "B"}
  assert places.opt_state[0].mu == places.opt_state[0].nu == {"a.kernel": "A", "b": "B"}
  assert places.step == places.opt_state[0].count == "rest"
