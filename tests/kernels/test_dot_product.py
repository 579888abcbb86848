"""The reference kernel against a loop over queries in float64, and against its own definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.kernels import Scores, attend
from maxtext.masks import Mask

HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
B, T, H, G, K = 2, 12, 4, 2, 8
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
PACKED = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
RESTARTED = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], list(range(12))])


def draw(t=T, s=T, g=G, dtype=jnp.float32):
  random = np.random.default_rng(0)
  shapes = (B, t, H, K), (B, s, g, K), (B, s, g, K)
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def run(kernel, q, k, v, mask, scores):
  """The kernel, compiled in haste."""
  compiled = jax.jit(
    lambda q, k, v, mask: attend(kernel, q, k, v, mask, scores), compiler_options=HASTY
  )
  return compiled(q, k, v, mask)


def by_hand(q, k, v, mask, scores):
  """One query at a time, in float64: pick what it sees, weigh, add up."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = []
    for s in range(k.shape[1]):
      distance = int(mask.q_pos[b, t]) - int(mask.kv_pos[b, s])
      if mask.causal and distance < 0:
        continue
      if mask.window is not None and distance >= mask.window:
        continue
      if mask.q_seg is not None and not mask.q_seg[b, t] == mask.kv_seg[b, s] != 0:
        continue
      seen.append(s)
    if not seen:
      continue
    group = h * k.shape[2] // q.shape[2]
    x = k[b, seen, group] @ q[b, t, h] * scores.scale
    if scores.soft_cap:
      x = scores.soft_cap * np.tanh(x / scores.soft_cap)
    weights = np.exp(x - x.max())
    out[b, t, h] = weights @ v[b, seen, group] / weights.sum()
  return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(
  "mask",
  [
    Mask.of(POSITIONS),
    Mask.of(POSITIONS, PACKED),
    Mask.of(RESTARTED, PACKED).narrow(3),
    dataclasses.replace(Mask.of(POSITIONS, PACKED), causal=False),
    dataclasses.replace(Mask.of(POSITIONS), causal=False, window=2),
  ],
  ids=["causal", "packed", "restarted window", "both ways", "both ways window"],
)
def test_it_computes_what_the_definition_says(mask, soft_cap, groups):
  scores = Scores(0.3, soft_cap)
  q, k, v = draw(g=groups)
  y = run("dot_product", q, k, v, mask, scores)
  np.testing.assert_allclose(y, by_hand(q, k, v, mask, scores), atol=1e-5)  # float32 sums of 12


def test_a_cache_of_keys_is_read_by_their_positions():
  q, k, v = draw(t=3, s=9)
  slots = jnp.array([[8, 0, 7, 1, 6, 2, 5, 3, 4]] * B)
  mask = Mask(
    jnp.array([[5, 6, 7], [2, 3, 4]]), slots, jnp.ones((B, 3), int), (slots < 8) * 1, window=4
  )
  y = run("dot_product", q, k, v, mask, Scores(0.3))
  np.testing.assert_allclose(y, by_hand(q, k, v, mask, Scores(0.3)), atol=1e-5)  # float32 sums


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_token_sees_only_its_past(kernel, window):
  q, k, v = draw()
  mask = Mask.of(POSITIONS).narrow(window)

  def out(k, v):  # [t]
    return attend(kernel, q, k, v, mask, Scores(0.3))[0].sum((-1, -2))

  jacobians = jax.jit(jax.jacrev(out, argnums=(0, 1)), compiler_options=HASTY)(k, v)
  i, j = np.indices((T, T))
  for jacobian in jacobians:
    seen = jnp.abs(jacobian[:, 0]).sum((-1, -2)) > 1e-7  # [t s]
    if jacobian is jacobians[0]:  # a single visible key has weight 1 whatever it says
      seen = seen | (i == j)
    np.testing.assert_array_equal(seen, (i >= j) & (i - j < (window or T)))


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_rows_that_see_nothing_are_zeros_with_finite_gradients(kernel):
  q, k, v = draw()
  padding = jnp.zeros((1, T), int)
  mask = Mask.of(POSITIONS, jnp.concatenate([PACKED[:1], padding]))

  def loss(q, k, v):
    y = attend(kernel, q, k, v, mask, Scores(0.3))
    return jnp.square(y).sum(), y

  step = jax.grad(loss, (0, 1, 2), has_aux=True)
  grads, y = jax.jit(step, compiler_options=HASTY)(q, k, v)
  np.testing.assert_array_equal(y[0, -3:], 0)
  np.testing.assert_array_equal(y[1], 0)
  for g in grads:
    assert jnp.isfinite(g).all()
    np.testing.assert_array_equal(g[1], 0)


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_products_in_float32_are_as_exact_as_float32_inputs_allow(kernel):
  q, k, v = draw(dtype=jnp.bfloat16)
  q, k = q * 8, k * 8  # scores of hundreds, where bfloat16 would be whole numbers apart
  mask = Mask.of(POSITIONS)
  y = run(kernel, q, k, v, mask, Scores(0.3, f32_product=True))
  assert y.dtype == jnp.bfloat16
  truth = by_hand(*(x.astype(jnp.float32) for x in (q, k, v)), mask, Scores(0.3))
  np.testing.assert_allclose(y.astype(np.float32), truth, atol=0.03)  # bfloat16 weights and result
