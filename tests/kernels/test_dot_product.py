"""The reference kernel against a loop over queries in float64, and against its own definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.kernels import Scores, attend
from maxtext.kernels.dropout import kept
from maxtext.masks import Mask

HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
B, T, H, G, K = 2, 12, 4, 2, 8
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
PACKED = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
SPANS = jnp.array([[1] * 7 + [0, 0, 2, 2, 2], [0, 0, 1, 1, 1, 1, 0, 2, 2, 0, 0, 0]])
RESTARTED = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], list(range(12))])


def draw(t=T, s=T, g=G, dtype=jnp.float32):
  random = np.random.default_rng(0)
  shapes = (B, t, H, K), (B, s, g, K), (B, s, g, K)
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def run(kernel, q, k, v, mask, scores, sink=None, seed=None):
  """The kernel, compiled in haste."""
  compiled = jax.jit(
    lambda q, k, v, mask, *more: attend(kernel, q, k, v, mask, scores, *more),
    compiler_options=HASTY,
  )
  return compiled(q, k, v, mask, sink, seed)


def sees(mask, b, t, s):
  """Whether query t of row b sees key s, in the words of the definition."""
  at, key = int(mask.q_pos[b, t]), int(mask.kv_pos[b, s])
  if mask.q_seg is not None and not mask.q_seg[b, t] == mask.kv_seg[b, s] != 0:
    return False
  if mask.q_span is not None and mask.q_span[b, t] == mask.kv_span[b, s] != 0:
    return True
  if mask.block is not None and key // mask.block > at // mask.block:
    return False
  if mask.block is None and mask.causal and key > at:
    return False
  if mask.window is not None and at - key >= mask.window:
    return False
  return mask.chunk is None or at // mask.chunk == key // mask.chunk


def by_hand(q, k, v, mask, scores, sink=None, keep=None):
  """One query at a time, in float64: pick what it sees, weigh, add up."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = [s for s in range(k.shape[1]) if sees(mask, b, t, s)]
    if not seen:
      continue
    group = h * k.shape[2] // q.shape[2]
    x = k[b, seen, group] @ q[b, t, h] * scores.scale
    if scores.soft_cap:
      x = scores.soft_cap * np.tanh(x / scores.soft_cap)
    top = x.max() if sink is None else max(x.max(), float(sink[h]))
    weights = np.exp(x - top)
    total = weights.sum() + (0 if sink is None else np.exp(float(sink[h]) - top))
    weights = weights if keep is None else weights * np.asarray(keep)[b, h, t, seen]
    out[b, t, h] = weights @ v[b, seen, group] / total
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
    Mask.of(POSITIONS, PACKED).narrow(chunk=4),
    Mask.of(POSITIONS).narrow(block=5),
    Mask.of(POSITIONS, PACKED, SPANS).narrow(window=2),
  ],
  ids="causal packed restarted_window both_ways both_ways_window chunk block spans".split(),
)
def test_it_computes_what_the_definition_says(mask, soft_cap, groups):
  scores = Scores(0.3, soft_cap)
  q, k, v = draw(g=groups)
  y = run("dot_product", q, k, v, mask, scores)
  np.testing.assert_allclose(y, by_hand(q, k, v, mask, scores), atol=1e-5)  # float32 sums of 12


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_a_sink_takes_part_in_the_softmax_and_adds_no_value(kernel):
  q, k, v = draw()
  mask, sink = Mask.of(POSITIONS, PACKED).narrow(3), jnp.array([-3.0, 0.0, 1.0, 9.0])
  y = run(kernel, q, k, v, mask, Scores(0.3), sink)
  np.testing.assert_allclose(y, by_hand(q, k, v, mask, Scores(0.3), sink), atol=1e-5)


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_dropout_zeroes_weights_and_keeps_their_mean(kernel):
  q, k, v = draw()
  mask, scores, seed = Mask.of(POSITIONS), Scores(0.3, dropout=0.4), jnp.array([3, 5], jnp.uint32)
  keep = kept(seed, 0.4, (B, H), jnp.arange(T), jnp.arange(T))
  y = run(kernel, q, k, v, mask, scores, None, seed)
  np.testing.assert_allclose(y, by_hand(q, k, v, mask, Scores(0.3), None, keep), atol=1e-5)
  whole = run(kernel, q, k, v, mask, scores)  # no seed, no dropout
  np.testing.assert_allclose(whole, by_hand(q, k, v, mask, Scores(0.3)), atol=1e-5)


def test_what_is_dropped_looks_drawn_at_random():
  """Shares, and correlations of neighbours in every direction, within 5 standard deviations."""
  shape, n = (4, 8), 64
  seeds = [jnp.array(pair, jnp.uint32) for pair in ((0, 0), (0, 1), (1, 0))]
  bits = np.stack([kept(seed, 0.3, shape, jnp.arange(n), jnp.arange(n)) > 0 for seed in seeds])
  assert abs(bits.mean() - 0.7) < 5 * np.sqrt(0.21 / bits.size)
  for axis in range(bits.ndim):
    ahead, behind = (np.delete(bits, i, axis) - 0.7 for i in (0, -1))
    assert abs((ahead * behind).mean()) < 5 * 0.21 / np.sqrt(ahead.size)
  np.testing.assert_allclose(bits.mean(-1).std(), np.sqrt(0.21 / n), rtol=0.1)


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
