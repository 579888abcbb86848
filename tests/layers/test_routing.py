"""Which experts are chosen, and how much they count: properties, and transformers' balance loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.errors import ConfigError
from maxtext.layers import routing
from maxtext.layers.routing import Routed
from maxtext.specs import MlpSpec, MoeSpec

EXPERT = MlpSpec(4)


def test_equal_experts_are_taken_from_the_first_on():
  spec = MoeSpec(6, 3, EXPERT)
  logits = jnp.array([[0.0] * 6, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 3.0, 3.0, 0.0]])
  found = routing.chosen(spec, routing.ranks(spec, logits, None))
  np.testing.assert_array_equal(found, [[0, 1, 2], [1, 3, 5], [3, 4, 0]])


def test_equal_groups_are_taken_from_the_first_on():
  spec = MoeSpec(8, 2, EXPERT, groups=4, active_groups=2)
  logits = jnp.array([[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]])
  found = routing.chosen(spec, routing.ranks(spec, logits, None))
  np.testing.assert_array_equal(found, [[0, 3]])


def test_a_choice_bias_counts_in_choosing_only():
  spec = MoeSpec(4, 2, EXPERT, score="sigmoid", choice_bias=True)
  logits, bias = jnp.array([[2.0, 1.0, 0.0, -1.0]]), jnp.array([0.0, 0.0, 0.0, 9.0])
  found = routing.chosen(spec, routing.ranks(spec, logits, bias))
  np.testing.assert_array_equal(found, [[3, 0]])
  given = routing.weights(spec, logits, found)
  np.testing.assert_allclose(given, 1 / (1 + np.exp([[1.0, -2.0]])), rtol=1e-6)


def test_padding_counts_in_no_load_and_no_share():
  spec = MoeSpec(3, 2, EXPERT)
  random = np.random.default_rng(0)
  logits = jnp.asarray(random.normal(size=(2, 5, 3)), jnp.float32)
  real = jnp.asarray(random.random((2, 5)) < 0.6)
  experts = routing.chosen(spec, routing.ranks(spec, logits, None))
  all_of = routing.routed(
    spec, logits[real][None], experts[real][None], jnp.ones((1, real.sum()), bool)
  )
  found = routing.routed(spec, logits, experts, real)
  np.testing.assert_allclose(found.load, all_of.load)
  np.testing.assert_allclose(found.share, all_of.share, rtol=1e-6)
  assert found.load.sum() == 2 * real.sum()


@pytest.mark.parametrize("layers, experts, active", [(1, 4, 1), (3, 5, 2)])
def test_the_balance_loss_is_that_of_transformers(layers, experts, active):
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
  random = np.random.default_rng(0)
  logits = random.normal(size=(layers, 2, 7, experts)).astype(np.float32)
  seen = np.ones((2, 7), np.int64)
  seen[1, -3:] = 0
  spec, said = MoeSpec(experts, active, EXPERT), []
  for layer in jnp.asarray(logits):
    chosen = routing.chosen(spec, routing.ranks(spec, layer, None))
    said.append(routing.routed(spec, layer, chosen, jnp.asarray(seen) != 0))
  # two blocks: the first layer, and all others
  stacked = [
    Routed(jnp.stack([s.load for s in part]), jnp.stack([s.share for s in part]))
    for part in (said[:1], said[1:])
    if part
  ]
  flat = tuple(torch.tensor(layer.reshape(14, experts)) for layer in logits)
  right = modeling.load_balancing_loss_func(flat, experts, active, torch.tensor(seen))
  found = routing.balance_loss(stacked, jnp.asarray(seen.sum()))
  np.testing.assert_allclose(found, right.item(), rtol=1e-6)


def test_the_balance_loss_of_equal_loads_is_the_number_of_experts_a_token_has():
  even = Routed(jnp.full((2, 4), 6.0), jnp.full((2, 4), 3.0))
  assert float(routing.balance_loss([even], jnp.array(12.0))) == pytest.approx(2)


@pytest.mark.parametrize(
  "settings, problem",
  [
    ({"active": 5}, "active: 5 of 4 experts; use at most all"),
    ({"groups": 3}, "groups: 3 groups do not divide 4 experts"),
    ({"groups": 2, "active_groups": 3}, "active_groups: 3 of 2 groups"),
    ({"groups": 4, "active": 2}, "active_groups: 1 groups of 1 experts hold fewer than the 2"),
    ({"groups": 4, "choice_bias": True, "active": 1}, "groups: 4 groups of one expert have no two"),
    ({"shared_gate": True}, "shared_gate: gates a shared expert, and there is none"),
  ],
)
def test_a_spec_that_cannot_be_is_refused(settings, problem):
  with pytest.raises(ConfigError) as error:
    MoeSpec(**{"experts": 4, "active": 2, "expert": EXPERT, **settings})
  assert problem in str(error.value)
