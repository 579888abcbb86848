"""A mixture of experts, against the plain sum that it is: whichever path computes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext.layers.merging import parameters
from maxtext.layers.moe import Moe
from maxtext.layers.params import DROPLESS, Compute
from maxtext.specs import MlpSpec, MoeSpec

WIDTH, ROWS, LENGTH = 12, 2, 11
SILU = MlpSpec(20)
SPECS = {
  "softmax": MoeSpec(5, 2, SILU),
  "normalised": MoeSpec(4, 3, SILU, normalize=True, scale=1.5),
  "of chosen, biases": MoeSpec(
    6,
    2,
    MlpSpec(20, ("gelu_quick", "linear"), bias=True, limit=1.0, shift=1.0),
    score="softmax_of_chosen",
    router_bias=True,
  ),
  "sigmoid, groups": MoeSpec(
    12,
    3,
    SILU,
    MlpSpec(8),
    score="sigmoid",
    choice_bias=True,
    groups=4,
    active_groups=2,
    normalize=True,
    scale=2.5,
  ),
  "weighed inputs": MoeSpec(
    4, 2, MlpSpec(20, ("gelu",), bias=True), score="sigmoid", weigh_inputs=True
  ),
  "gated shared": MoeSpec(3, 1, SILU, MlpSpec(7), shared_gate=True),
}
SPARSE, DENSE = DROPLESS, dataclasses.replace(DROPLESS, sparse_matmul=False)


def limited(factor):
  return dataclasses.replace(DENSE, capacity_factor=factor)


def make(spec, options=SPARSE, seed=0):
  """The layer, with every parameter drawn wide: biases too."""
  layer = Moe(spec, WIDTH, Compute(experts=options), nnx.Rngs(0))
  random = np.random.default_rng(seed)
  for _, p in nnx.to_flat_state(nnx.state(layer)):
    p[...] = jnp.asarray(random.normal(size=p.shape), jnp.float32) / np.sqrt(
      p.shape[-2] if p.ndim > 1 else 1
    )
  return layer


def inputs(seed=0):
  random = np.random.default_rng(seed)
  x = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
  real = np.ones((ROWS, LENGTH), bool)
  real[1, :3] = False
  return x, jnp.asarray(real)


def plain(spec, layer, x):
  """Token by token, expert by expert, in float64."""
  p = {name: np.asarray(v, np.float64) for name, v in parameters(layer).items()}
  act = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "linear": lambda x: x,
  }

  def mlp(spec, prefix, x, e=...):
    def linear(name, x):
      bias = p.get(f"{prefix}{name}.bias")
      return x @ p[f"{prefix}{name}.kernel"][e] + (0 if bias is None else bias[e])

    up = linear("up", x)
    if len(spec.activations) == 1:
      return linear("down", act[spec.activations[0]](up))
    gate = linear("gate", x)
    if spec.limit is not None:
      gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
    return linear("down", act[spec.activations[0]](gate) * (up + spec.shift))

  def token(x):
    logits = x @ p["router.kernel"] + p.get("router.bias", 0)
    soft = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    score = {"softmax": soft, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}.get(
      spec.score, lambda x: x
    )(logits)
    rank = score + p.get("choice_bias", 0)
    if spec.active_groups < spec.groups:
      parts = rank.reshape(spec.groups, -1)
      best = np.sort(parts, -1)[:, -2 if spec.choice_bias else -1 :].sum(-1)
      for group in np.argsort(-best)[spec.active_groups :]:
        parts[group] = -np.inf
      rank = parts.reshape(-1)
    experts = np.argsort(-rank, kind="stable")[: spec.active]
    weight = score[experts]
    weight = soft(weight) if spec.score == "softmax_of_chosen" else weight
    weight = weight / weight.sum() if spec.normalize else weight
    out = np.zeros(WIDTH)
    for e, w in zip(experts, weight * spec.scale):
      made = mlp(spec.expert, "", x * w, e) if spec.weigh_inputs else w * mlp(spec.expert, "", x, e)
      out += made
    if spec.shared is not None:
      gate = 1 / (1 + np.exp(-x @ p["shared_gate.kernel"])) if spec.shared_gate else 1
      out += gate * mlp(spec.shared, "shared.", x)
    return out

  return np.array([[token(x) for x in row] for row in np.asarray(x, np.float64)])


FAST = ("of chosen, biases", "sigmoid, groups")


def mostly_slow(*fast):
  """Every spec, of which all but some are slow."""
  return [
    pytest.param(spec, marks=() if name in fast else pytest.mark.slow, id=name)
    for name, spec in SPECS.items()
  ]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_sparse_path_is_the_sum_over_chosen_experts(spec):
  check(spec, SPARSE)


@pytest.mark.parametrize("spec", mostly_slow("of chosen, biases"))
@pytest.mark.parametrize("options", [DENSE, limited(9.0)], ids=["dense", "limited"])
def test_the_other_paths_are_too(spec, options):
  check(spec, options)


def check(spec, options):
  x, real = inputs()
  layer = make(spec, options)
  found = jax.jit(lambda x: layer(x, real)[0])(x)
  want = plain(spec, layer, x)
  np.testing.assert_allclose(found[real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", mostly_slow(*FAST))
def test_every_path_has_the_same_gradients(spec):
  x, real = inputs()
  graph, state = nnx.split(make(spec))
  g = jnp.where(real[..., None], jnp.sin(jnp.arange(x.size).reshape(x.shape)), 0)

  def grads(options):
    def loss(state, x):
      layer = nnx.merge(graph, state)
      layer.compute = dataclasses.replace(layer.compute, experts=options)
      return (layer(x, real)[0] * g).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(state, x)

  want = grads(DENSE)
  for options in (SPARSE, limited(9.0)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads(options), want
    )


def apply(options, x, real, spec=SPECS["softmax"], dropless=False):
  layer = make(spec, options)
  return jax.jit(functools.partial(layer, dropless=dropless))(x, real)


def test_padding_changes_nothing_for_others_and_takes_no_place():
  """What stands in the padding does not matter, also where places are few."""
  x, real = inputs()
  other = jnp.where(real[..., None], x, 5.0)
  for options in (SPARSE, DENSE, limited(0.6)):
    a, b = apply(options, x, real), apply(options, other, real)
    np.testing.assert_allclose(a[0][real], b[0][real], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(a[1].load, b[1].load)
  alone = apply(limited(0.6 * LENGTH / (LENGTH - 3)), x[1:, 3:], real[1:, 3:])
  np.testing.assert_allclose(
    apply(limited(0.6), x, real)[0][1:, 3:], alone[0], rtol=1e-4, atol=1e-6
  )


def test_a_full_expert_drops_the_last_tokens_that_choose_it():
  """With one place for each expert, what a token gets is from experts that none before it chose."""
  spec = SPECS["softmax"]
  x, real = inputs()
  real = jnp.ones_like(real)
  layer = make(spec)
  logits = np.asarray(layer.router(x))
  experts = np.argsort(-logits, axis=-1, kind="stable")[..., : spec.active]
  found, _ = apply(limited(1e-6), x, real)
  for row in range(ROWS):
    seen = set()
    for t in range(LENGTH):
      left = [e for e in experts[row, t] if e not in seen]
      seen.update(left)
      if not left:
        np.testing.assert_array_equal(found[row, t], 0)
      else:
        assert np.abs(found[row, t]).max() > 0
    assert len(seen) > 2


def test_a_token_sees_only_its_past_also_where_tokens_are_dropped():
  x, real = inputs()
  changed = x.at[:, 6:].set(x[:, 6:] * -2)
  a, b = apply(limited(0.5), x, real)[0], apply(limited(0.5), changed, real)[0]
  np.testing.assert_allclose(a[:, :6], b[:, :6], rtol=1e-5, atol=1e-6)


def test_nothing_is_dropped_where_it_must_not_be():
  x, real = inputs()
  whole, _ = apply(SPARSE, x, real)
  some, _ = apply(limited(0.5), x, real)
  all_of, _ = apply(limited(0.5), x, real, dropless=True)
  assert np.abs(some - whole).max() > 0.01
  np.testing.assert_array_equal(all_of, whole)


def test_random_routing_does_not_look_at_the_router():
  x, real = inputs()
  random = dataclasses.replace(SPARSE, use_random_routing=True)
  layer, other = make(SPECS["softmax"], random), make(SPECS["softmax"], random)
  other.router.kernel[...] = -other.router.kernel[...]
  a, b = jax.jit(layer.__call__)(x, real), jax.jit(other.__call__)(x, real)
  np.testing.assert_array_equal(a[0], b[0])
  assert len(np.unique(a[1].load)) > 1


def test_a_router_is_float32_in_bfloat16_too():
  """Logits are those of float32 inputs; with float32_gate_logits=false they are rounded."""
  spec, (x, real) = SPECS["softmax"], inputs()
  low = Compute(dtype=jnp.dtype("bfloat16"))
  x = x.astype(jnp.bfloat16)
  layer = make(spec)
  layer.compute = low
  want = x.astype(jnp.float32) @ layer.router.kernel[...]
  np.testing.assert_allclose(layer._logits(x), want, rtol=1e-5, atol=1e-6)
  layer.compute = dataclasses.replace(low, f32_gate=False)
  assert np.abs(layer._logits(x) - want).max() > 1e-3
  assert layer(x, real)[0].dtype == jnp.bfloat16
