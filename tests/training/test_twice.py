"""A step made twice: the run is the same one, and a single bit that differs ends it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.errors import Corrupt
from maxtext.training.state import State
from maxtext.training.twice import Twice, digest

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@jax.jit
def advance(state, batch):
  params = {"a": state.params["a"] * 1.5, "b": state.params["b"] + batch["x"]}
  return State(state.step + 1, params, state.opt_state), {"loss": params["b"].sum()}


class Step:
  """Takes over the state's memory, as the compiled step does; `wrong` calls flip one bit of b."""

  def __init__(self, wrong=()):
    self.calls, self.wrong = 0, wrong

  def __call__(self, state, batch):
    new, metrics = advance(state, batch)
    jax.tree.map(lambda x: x.delete(), state)
    self.calls += 1
    if self.calls in self.wrong:
      bits = np.array(new.params["b"]).view(np.uint16)
      bits[2, 1] ^= 1
      new.params["b"] = jnp.asarray(bits.view(new.params["b"].dtype))
    return new, metrics


def train(step, period, steps=7):
  params = {"a": jnp.ones(3), "b": jnp.ones((4, 3), jnp.bfloat16)}
  state = State(jnp.int32(0), params, {"mu": {"b": jnp.zeros((4, 3))}})
  checked = Twice(step, period, 0, jax.tree.map(lambda _: PLACE, state))
  for n in range(steps):
    state, _ = checked(state, {"x": jnp.bfloat16(n / 8)})
  return state


def test_steps_made_twice_train_the_same_run():
  step = Step()
  once, twice = train(Step(), 100), train(step, 3)
  jax.tree.map(np.testing.assert_array_equal, once, twice)
  assert step.calls == 7 + 2


@pytest.mark.parametrize("wrong", [3, 4])
def test_one_bit_that_differs_ends_the_run_and_names_the_parameter(wrong):
  with pytest.raises(Corrupt, match="step 2, made twice, has two results: params.b differ") as end:
    train(Step(wrong=[wrong]), 3)
  assert end.value.exit_code == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_every_bit_of_an_array_changes_its_digest(dtype):
  x = np.asarray(jnp.arange(24).reshape(2, 3, 4) % 7).astype(jnp.dtype(dtype))
  flat = x.reshape(-1).view(np.uint8)
  changed = []
  for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
    for place in range(0, 24, 5):
      other = flat.copy()
      other[place * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
      changed.append(other.view(x.dtype).reshape(x.shape))
  many = jax.jit(jax.vmap(digest))(jnp.asarray(np.stack([x, *changed])))
  assert len(set(many.tolist())) > 1 and many[0] not in many[1:]
