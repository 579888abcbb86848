"""What stands out is not applied, and leaves no trace but in what is known of the last steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxtext.objectives.mean import Mean
from maxtext.training.guardian import FLOORS, Guard
from maxtext.training.metrics import step_scalars
from maxtext.training.state import State, from_tree, tree
from maxtext.training.step import Rules, make_step

GUARD = Guard(stacked=("w",), interval=8, factor=6.0)
SCHEDULE = optax.linear_schedule(0.1, 0.0, 40)


def loss(params, batch, key=None):
  out = (batch["x"] @ params["w"][0]) @ params["w"][1] + params["b"]
  error = jnp.square(out - batch["y"]).sum(-1) * batch["by"]
  return {"loss": Mean(error.sum(), jnp.float32(error.size))}


def batches(count, **by):
  """Numbered batches; the loss of those in `by`, s3=100, is as many times as large."""
  random = np.random.default_rng(0)
  for n in range(count):
    x = random.normal(size=(16, 4)).astype(np.float32)
    factor = np.full(16, by.get(f"s{n}", 1), np.float32)
    yield {"x": x, "y": x * 2 + 0.3 * random.normal(size=x.shape), "by": factor}


def begun(guard=GUARD):
  optimizer = optax.adamw(SCHEDULE)
  params = {"w": jnp.stack([jnp.eye(4), jnp.eye(4)]), "b": jnp.zeros(4)}
  rules = Rules(guard=guard, abort_on_nan=False, abort_on_inf=False)
  state = State(jnp.int32(0), params, optimizer.init(params), guard and guard.history())
  return jax.jit(make_step(loss, optimizer, SCHEDULE, rules)), state


def trained(state, step, batches):
  rows = []
  for batch in batches:
    state, metrics = step(state, batch)
    rows.append(jax.device_get(metrics))
  return state, rows


def test_scores_are_those_of_median_and_median_absolute_deviation():
  _, rows = trained(*begun()[::-1], batches(30, s20=9))
  seen = np.array([[row["loss"], row["raw_grad_norm"]] for row in rows], np.float64)
  for n, row in enumerate(rows):
    window = seen[max(n - 8, 0) : n]
    if len(window) < 4:
      assert not row["judged"][:2].any()
      continue
    middle = np.median(window, 0)
    spread = 1.4826 * np.median(abs(window - middle), 0)
    scores = (seen[n] - middle) / np.maximum(spread, np.array(FLOORS) * abs(middle))
    np.testing.assert_allclose(row["judged"][:2], scores, rtol=1e-3, atol=1e-4)
    assert row["ok"] == (scores <= 6).all()
  assert not rows[20]["ok"] and sum(not row["ok"] for row in rows) == 1
  assert [row["judged"][2] for row in rows] == [0] * 20 + [1] * 8 + [0] * 2


@pytest.mark.parametrize("poison", [100.0, np.nan, np.inf])
def test_a_step_that_is_skipped_counts_and_does_nothing_else(poison):
  step, state = begun()
  before, _ = trained(state, step, list(batches(12)))
  after, [row] = trained(before, step, [*batches(13, s12=poison)][12:])
  assert not row["ok"] and after.step == 13
  moved = [p.count for p in after.opt_state if isinstance(p, optax.ScaleByScheduleState)]
  assert moved == [13]  # so the reported rate is the one that is used
  still = dataclasses.replace(after, opt_state=after.opt_state[:-1])
  there = dataclasses.replace(before, opt_state=before.opt_state[:-1])
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, (still.params, still.opt_state), (there.params, there.opt_state))
  scalars = step_scalars(row)
  assert scalars["optim/step_skipped"] == 1 and scalars["optim/loss_zscore"] > 6


def test_a_guard_that_lets_everything_pass_changes_no_bit_of_the_training():
  (step, state), (plain, bare) = begun(), begun(None)
  guarded, _ = trained(state, step, list(batches(20)))
  free, _ = trained(bare, plain, list(batches(20)))
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, (guarded.params, guarded.opt_state), (free.params, free.opt_state))


def test_norms_of_what_is_refused_are_those_of_each_layer():
  step, state = begun()
  state, _ = trained(state, step, list(batches(12)))
  [last] = [*batches(13, s12=100)][12:]
  grads = jax.grad(lambda params: loss(params, last)["loss"].value)(state.params)
  _, [row] = trained(state, step, [last])
  norms = GUARD.named(row["norms"], state.params)
  np.testing.assert_allclose(norms["b"], np.linalg.norm(grads["b"]), rtol=1e-5)
  layers = [np.linalg.norm(grads["w"][layer]) for layer in range(2)]
  np.testing.assert_allclose(norms["w"], layers, rtol=1e-5)


def test_a_state_from_before_the_guard_begins_its_history():
  _, state = begun()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  older = {name: part for name, part in tree(state).items() if name != "history"}
  again = from_tree(jax.tree.map(shape, state), older)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again, state)
