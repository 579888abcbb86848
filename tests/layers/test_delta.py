"""The gated delta net: what it computes, document by document, and in parts."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")

from maxtext.caches import StateCache  # noqa: E402
from maxtext.errors import ConfigError  # noqa: E402
from maxtext.kernels.delta_rule import CHUNK, inverse  # noqa: E402
from maxtext.layers.delta import DeltaNet  # noqa: E402
from maxtext.layers.params import Compute  # noqa: E402
from maxtext.masks import Mask  # noqa: E402
from maxtext.specs import DeltaSpec  # noqa: E402

WIDTH = 24
SPEC = DeltaSpec(key_heads=2, value_heads=6, key_dim=8, value_dim=5, conv=4)
LENGTHS = (3, CHUNK + 9, 1, 30)  # of documents: shorter than the convolution, longer than a chunk
TOTAL = sum(LENGTHS)


@functools.cache
def fresh():
  """A layer that forgets at rates from hardly to at once, as its graph and its parameters."""
  graph, state = nnx.split(nnx.jit(lambda: DeltaNet(SPEC, WIDTH, Compute(), nnx.Rngs(0)))())
  draw = np.random.default_rng(1)
  for path, p in nnx.to_flat_state(state):
    if path[-1] in ("a_log", "dt_bias"):
      p.set_value(jnp.asarray(draw.normal(-1, 1.5, p.shape), jnp.float32))
  return graph, state


@jax.jit
def run(x, mask, cache=None):
  return nnx.merge(*fresh())(x, mask, cache)


def rows(seed=0, length=TOTAL, batch=1):
  return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def masked(segments, ordered=False):
  """The mask of rows that hold these documents; a delta net asks for no positions."""
  segments = jnp.asarray(segments, jnp.int32)
  return Mask.of(jnp.zeros_like(segments), segments, ordered=ordered)


def empty(batch, layers=1):
  return StateCache.empty(SPEC, layers, batch, jnp.float32).at(jnp.int32(layers - 1))


def flat(state):
  return {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(state)}


def exact():
  """The parameters, in torch and float64."""
  return {k: torch.tensor(v, dtype=torch.float64) for k, v in flat(fresh()[1]).items()}


def assert_documents(y, x, *rows_of_segments):
  """y [b t d] is what each document of x is by hand, float32 keeping 1e-7 of what is added up."""
  p = exact()
  for row, segments in enumerate(map(np.asarray, rows_of_segments)):
    for number in set(segments) - {0}:
      at = segments == number
      expected = by_hand(SPEC, p, torch.tensor(x[row, at], dtype=torch.float64)).numpy()
      np.testing.assert_allclose(np.asarray(y[row])[at], expected, atol=1e-5)


def by_hand(spec, p, x):
  """One document x [t d], token by token, by the published formulae; torch, float64."""
  g, r, k, v, w = spec.key_heads, spec.per_key, spec.key_dim, spec.value_dim, spec.conv
  relu = torch.nn.functional
  state, past, out = torch.zeros(g, r, k, v, dtype=torch.float64), [], []
  convs = torch.cat([p["query_conv"], p["key_conv"], p["value_conv"]], -1)
  for token in x:
    wide = torch.einsum("d,dgc->gc", token, p["qkvz_proj.kernel"])
    mixed, gate = wide[:, : 2 * k + r * v], wide[:, 2 * k + r * v :]
    past = [*past, mixed][-w:]
    mixed = relu.silu(sum(convs[w - len(past) + i] * old for i, old in enumerate(past)))
    unit = lambda y: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    query, key = unit(mixed[:, :k]) * k**-0.5, unit(mixed[:, k : 2 * k])
    value = mixed[:, 2 * k :].reshape(g, r, v)
    gates = torch.einsum("d,dgc->gc", token, p["ba_proj.kernel"])
    rate = gates[:, :r].sigmoid()
    step = relu.softplus(gates[:, r:] + p["dt_bias"].reshape(g, r))
    state = state * torch.exp(-p["a_log"].exp().reshape(g, r) * step)[..., None, None]
    wrong = value - torch.einsum("gk,grkv->grv", key, state)
    state = state + torch.einsum("gk,gr,grv->grkv", key, rate, wrong)
    y = torch.einsum("gk,grkv->grv", query, state)
    y = y / (y.square().mean(-1, keepdim=True) + spec.eps).sqrt() * p["norm.scale"]
    y = (y * relu.silu(gate.reshape(g, r, v))).reshape(g * r, v)
    out.append(torch.einsum("hv,hvd->d", y, p["out.kernel"]))
  return torch.stack(out)


def test_packed_documents_are_each_the_recurrence_in_float64_forward_and_gradient():
  graph, state = fresh()
  x, mask = rows(), masked(np.repeat([1, 2, 3, 4], LENGTHS)[None])

  def loss(state, x):
    y = nnx.merge(graph, state)(x, mask)[0]
    return jnp.sin(y).sum(), y

  grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, jnp.asarray(x))
  p = exact()
  leaves = [*p.values(), torch.tensor(x[0], dtype=torch.float64)]
  for leaf in leaves:
    leaf.requires_grad_(True)
  expected = torch.cat([by_hand(SPEC, p, part) for part in leaves[-1].split(LENGTHS)])
  expected.sin().sum().backward()
  np.testing.assert_allclose(y[0], expected.detach(), atol=1e-5)
  ours = {**flat(grads[0]), "x": np.asarray(grads[1][0])}
  for name, leaf in {**p, "x": leaves[-1]}.items():
    want = leaf.grad.numpy()
    np.testing.assert_allclose(ours[name], want, atol=2e-5 * abs(want).max(), err_msg=name)


@pytest.mark.parametrize("ordered", [False, True])
def test_padding_changes_nothing_and_gives_finite_values(ordered):
  """Between, before and after documents; and, unless the mask says otherwise, within them."""
  x = rows(length=20)
  segments = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 0])
  if not ordered:
    segments[[4, 6, 14]] = 0
  real, mask = segments != 0, masked(segments[None], ordered)

  @jax.jit
  def pull(x):
    y, back = jax.vjp(lambda x: run(x, mask)[0], x)
    return y[0], back(y * real[:, None])[0][0]

  y, dx = pull(x)
  noisy = pull(np.where(real[:, None], x, 1e3 * rows(1, 20)))
  for found, again in zip((y, dx), noisy):
    np.testing.assert_array_equal(again[real], found[real])
  assert np.isfinite(y).all() and not y[~real].any() and not dx[~real].any() and dx[real].all()
  assert_documents(y[None], x, segments)


@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_in_parts_with_a_cache_it_is_one_pass(side):
  """Prompts of several lengths in parts that cut them anywhere, then token by token."""
  x, prompt, lengths = rows(length=30, batch=3), 22, (22, 9, 1)
  segments = np.ones((3, 30), np.int32)
  for row, length in enumerate(lengths):
    where = {"left": np.arange(prompt - length), "right": np.arange(length, prompt)}.get(side)
    if side == "within":
      where = np.random.default_rng(row).permutation(prompt)[: prompt - length]
    segments[row, where] = 0
  cache, found = empty(3, layers=2), []
  for a, b in ((0, 10), (10, 11), (11, 12), (12, 22), *((i, i + 1) for i in range(prompt, 30))):
    y, cache = run(x[:, a:b], masked(segments[:, a:b]), cache)
    found.append(y)
  assert_documents(np.concatenate(found, 1), x, *segments)
  assert not cache.state[0].any() and cache.state[1].any()


def test_a_row_of_a_cache_goes_on_by_itself_and_begins_anew_when_reset():
  x, mask = rows(length=10, batch=2), masked(np.ones((2, 10)))
  _, cache = run(x, mask, empty(2))
  _, row = run(x[1:, :1], masked([[1]]), cache.row(1))
  cache = cache.insert(row, 1)
  y, _ = run(x, mask, cache)
  for row, given in enumerate((np.r_[x[0], x[0]], np.r_[x[1], x[1, :1], x[1]])):
    expected = by_hand(SPEC, exact(), torch.tensor(given, dtype=torch.float64))
    np.testing.assert_allclose(y[row], expected[-10:], atol=1e-5)
  y, _ = run(x, mask, cache.reset(1))
  assert_documents(y[1:], x[1:], [1] * 10)


def test_a_state_of_another_document_is_forgotten():
  x, segments = rows(length=12), np.repeat([1, 2], (7, 5))[None]
  cache, found = empty(1), []
  for a, b in ((0, 7), (7, 8), (8, 12)):
    y, cache = run(x[:, a:b], masked(segments[:, a:b]), cache)
    found.append(y)
  assert_documents(np.concatenate(found, 1), x, *segments)


def test_a_triangle_is_inverted_where_its_powers_are_huge():
  """All ones below the diagonal: the inverse is -1 there, but powers of it reach 1e18."""
  found = jax.jit(inverse)(jnp.tril(jnp.ones((CHUNK, CHUNK)), -1))
  np.testing.assert_array_equal(found, np.eye(CHUNK) - np.eye(CHUNK, k=-1))


def test_what_lets_tokens_see_the_future_is_refused():
  positions = jnp.arange(4)[None]
  spans = Mask.of(positions, spans=jnp.ones((1, 4), jnp.int32))
  for mask in (spans, Mask(positions, positions, causal=False)):
    with pytest.raises(ConfigError, match="delta: a delta net sees the past only"):
      run(rows(length=4), mask)
