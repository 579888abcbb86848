"""Attention in tiles equals the reference on every mask, forward and gradient, in linear memory.

Tiles are 8 tokens on a side here, so that short sequences have many of them.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxtext.kernels import OUT, Scores, attend, blockwise
from maxtext.masks import Mask

SIDE = 8
SCORES = Scores(0.3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(blockwise, "_LEAST", SIDE)
  monkeypatch.setattr(blockwise, "_MOST", SIDE)


def draw(t, s, heads=(4, 2), head_dim=8, rows=2, dtype=jnp.float32):
  """q, k, v and a cotangent."""
  shapes = [(rows, t, heads[0], head_dim), *[(rows, s, heads[1], head_dim)] * 2]
  random = np.random.default_rng(t * 1000 + s)
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in [*shapes, shapes[0]]]


# Hasty compilation: an eighth of the time, and the same program up to how XLA's CPU code is made.
HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


jit = functools.partial(jax.jit, compiler_options=HASTY)


def differentiate(name, q, k, v, cotangent, mask, scores, sink=None, seed=None):
  """The result and the gradients by q, k, v and, where there is one, the sink."""
  traced = (q, k, v) if sink is None else (q, k, v, sink)

  def kernel(q, k, v, sink=None):
    return attend(name, q, k, v, mask, scores, sink, seed)

  y, back = jax.vjp(kernel, *traced)
  return y, *back(cotangent.astype(y.dtype))


run = jit(differentiate, static_argnums=(0, 6))


def assert_equal(ours, truth, noise=1e-5):
  """Equal to `noise` of the largest number; 1e-5 is that of float32 sums of a hundred terms."""
  for a, b in zip(ours, truth, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=noise * max(1.0, np.abs(b).max()))


def assert_like_reference(
  q, k, v, cotangent, mask, scores=SCORES, noise=1e-5, sink=None, seed=None
):
  args = (q, k, v, cotangent, mask, scores, sink, seed)
  assert_equal(run("blockwise", *args), run("dot_product", *args), noise)


def count_up(rows, length):
  return jnp.broadcast_to(jnp.arange(length), (rows, length))


def documents(*lengths, padding=0):
  """Positions and segments of documents packed one after the other, then padding: [1 t] each."""
  positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
  segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
  return jnp.asarray(positions)[None], jnp.asarray(segments)[None]


MATRIX = [  # every value of every column, every pair of neighbours that has a shared branch
  # heads, window, soft cap, packed, head_dim, length, dtype
  ((4, 4), None, None, False, 8, 32, "float32"),
  ((4, 2), None, None, True, 8, 29, "float32"),
  ((4, 1), 5, None, True, 16, 37, "float32"),
  ((6, 2), 12, 2.0, False, 8, 33, "float32"),
  ((4, 2), None, 2.0, True, 5, 40, "float32"),
  ((1, 1), 1, None, False, 8, 17, "float32"),
  ((4, 2), None, None, True, 8, 7, "float32"),
  ((4, 2), 6, None, False, 8, 1, "float32"),
  ((4, 2), None, None, False, 8, 31, "bfloat16"),
  ((4, 1), 7, 2.0, True, 16, 40, "bfloat16"),
  ((4, 2), 9, None, True, 8, 33, "float16"),
]


@pytest.mark.parametrize("heads, window, soft_cap, packed, head_dim, length, dtype", MATRIX)
def test_it_equals_the_reference(heads, window, soft_cap, packed, head_dim, length, dtype):
  positions, segments = count_up(2, length), None
  if packed:
    one = documents(length // 3, 1, length - length // 3 - 1)
    other = documents(length // 2, padding=length - length // 2)
    positions, segments = (jnp.concatenate(pair) for pair in zip(one, other))
  mask = Mask.of(positions, segments).narrow(window)
  arrays = draw(length, length, heads, head_dim, dtype=jnp.dtype(dtype))
  # weights and their gradients are rounded to 8 (or 11) bits before they meet values and keys
  noise = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}[dtype]
  assert_like_reference(*arrays, mask, Scores(head_dim**-0.5, soft_cap), noise)


STRUCTURES = [{"chunk": 6}, {"block": 5}, {"causal": False}, {"window": 3, "chunk": 11}]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("spans", [False, True])
def test_every_structure_equals_the_reference(structure, spans):
  length = 37
  positions, segments = (jnp.concatenate([x, x]) for x in documents(20, 12, padding=5))
  span = jnp.tile(jnp.array([1] * 7 + [0] * 9 + [2] * 14 + [0] * 7), (2, 1)) if spans else None
  mask = Mask.of(positions, segments, span).narrow(**structure)
  assert_like_reference(*draw(length, length), mask)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_sinks_and_dropout_equal_the_reference(soft_cap, dropout):
  positions, segments = (jnp.concatenate([x, x]) for x in documents(20, 12, padding=5))
  mask = Mask.of(positions, segments).narrow(9)
  sink, seed = jnp.array([-2.0, 0.0, 1.0, 4.0]), jnp.array([7, 11], jnp.uint32)
  scores = Scores(0.3, soft_cap, dropout=dropout)
  assert_like_reference(*draw(37, 37), mask, scores, sink=sink, seed=seed)


def test_parts_of_the_keys_put_together_are_the_whole():
  """out and log-sum of two halves of the keys give both, with gradients through the weights."""
  q, k, v, cotangent = draw(24, 24)
  positions = count_up(2, 24)

  def halves(q, k, v):
    parts = []
    for half in (slice(0, 10), slice(10, 24)):
      mask = Mask(positions, positions[:, half])
      parts.append(blockwise.partial(q, k[:, half], v[:, half], mask, SCORES))
    (a, x), (b, y) = parts
    share = jax.nn.sigmoid(x - y)[..., None]
    return a * share + b * (1 - share)

  def both(q, k, v):
    out, back = jax.vjp(halves, q, k, v)
    return out, *back(cotangent)

  mask = Mask.of(positions)
  assert_equal(jit(both)(q, k, v), run("dot_product", q, k, v, cotangent, mask, SCORES))


def test_products_in_float32_reach_the_gradients():
  arrays = draw(24, 24, dtype=jnp.bfloat16)
  mask = Mask.of(count_up(2, 24))
  assert_like_reference(*arrays, mask, Scores(1.0, f32_product=True), noise=3e-2)  # as above


@st.composite
def masks(draw_, t, s):
  """Two rows of anything: positions in any order, segments of any kind, padding anywhere."""

  def tokens(length, values):
    return jnp.asarray(
      draw_(st.lists(st.lists(values, min_size=length, max_size=length), min_size=2, max_size=2))
    )

  place, segment = st.integers(0, 2 * s), st.integers(0, 3)
  if draw_(st.booleans()):  # in order, as a batch has them
    place = None
  q_pos = count_up(2, t) + draw_(st.integers(0, s)) if place is None else tokens(t, place)
  kv_pos = count_up(2, s) if place is None else tokens(s, place)
  q_seg = kv_seg = None
  if draw_(st.booleans()):
    q_seg, kv_seg = tokens(t, segment), tokens(s, segment)
    if draw_(st.booleans()):
      q_seg, kv_seg = jnp.sort(q_seg), jnp.sort(kv_seg)
  spans = [None, None]
  if draw_(st.booleans()):
    spans = [tokens(t, st.integers(0, 2)), tokens(s, st.integers(0, 2))]
  structure = draw_(st.sampled_from([{}, {"window": 9}, {"chunk": 7}, {"block": 5}]))
  mask = Mask(q_pos, kv_pos, q_seg, kv_seg, *spans, causal=draw_(st.booleans()))
  return mask.narrow(**structure)


SPACE = {
  "lengths": [(29, 29), (40, 24), (3, 29), (1, 17)],
  "heads": [(4, 2), (4, 4), (3, 1)],
  "head_dim": [8, 5],
  "structure": [{}, {"window": 9}, {"chunk": 7}, {"block": 5}, {"window": 4, "chunk": 11}],
  "causal": [True, False],
  "segments": [False, True],
  "spans": [False, True],
  "soft_cap": [None, 2.0],
  "sink": [False, True],
  "dropout": [0.0, 0.3],
  "dtype": ["float32", "bfloat16"],
}


def programs(count):
  """So many points of the space, drawn once: each is a program to compile, run on many masks."""
  random = np.random.default_rng(1)
  orders = {name: random.permutation(count) for name in SPACE}
  pick = lambda name, i: SPACE[name][orders[name][i] % len(SPACE[name])]
  return [{name: pick(name, i) for name in SPACE} for i in range(count)]


def test_the_programs_have_every_choice_of_every_option():
  drawn = programs(9)
  for name, choices in SPACE.items():
    assert [c for c in choices if c not in [p[name] for p in drawn]] == []


@pytest.mark.parametrize(
  "examples, count", [(30, 9), pytest.param(300, 60, marks=pytest.mark.slow)]
)
def test_any_mask_with_any_options_equals_the_reference(examples, count):
  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(st.data())
  def check(data):
    p = data.draw(st.sampled_from(programs(count)))
    mask = data.draw(masks(*p["lengths"]))
    mask = dataclasses.replace(mask.narrow(**p["structure"]), causal=p["causal"])
    for name, mark, all_alike in (("segments", "seg", 1), ("spans", "span", 0)):
      for side in ("q", "kv"):
        found = getattr(mask, f"{side}_{mark}")
        if found is None and p[name]:
          found = jnp.full_like(getattr(mask, f"{side}_pos"), all_alike)
        mask = dataclasses.replace(mask, **{f"{side}_{mark}": found if p[name] else None})
    arrays = draw(*p["lengths"], p["heads"], p["head_dim"], dtype=jnp.dtype(p["dtype"]))
    sink = jnp.linspace(-2, 3, p["heads"][0]) if p["sink"] else None
    seed = jnp.array([3, 5], jnp.uint32) if p["dropout"] else None
    noise = {"float32": 2e-5, "bfloat16": 5e-2}[p["dtype"]]  # as in the matrix of all kernels
    scores = Scores(0.3, p["soft_cap"], dropout=p["dropout"])
    assert_like_reference(*arrays, mask, scores, noise, sink, seed)

  check()


def test_a_cache_of_keys_in_any_order_is_read_by_their_positions():
  t, s = 5, 43
  slots = jnp.asarray([np.random.default_rng(i).permutation(s) for i in range(2)])
  filled = jnp.where(slots < jnp.array([[30], [17]]), 1, 0)
  q_pos = jnp.array([[25], [12]]) + jnp.arange(t)
  for window in (None, 6):
    mask = Mask(q_pos, slots, jnp.ones((2, t), int), filled, window=window)
    assert_like_reference(*draw(t, s), mask)


def test_tiles_that_nobody_sees_are_never_visited():
  """What is not a number spreads wherever it is touched, be its weight 0."""
  length = 6 * SIDE
  q, k, v, _ = draw(length, length)
  positions, segments = documents(2 * SIDE, 3 * SIDE, padding=SIDE)
  positions, segments = (jnp.concatenate([x, x]) for x in (positions, segments))
  blocks = np.repeat(np.arange(6), SIDE)

  def reached(mask, poisoned):
    bad = jnp.where((blocks == poisoned)[:, None, None], jnp.nan, v)
    y = run("blockwise", q, k, bad, q, mask, SCORES)[0]
    return sorted(set(blocks[np.isnan(y).any((0, 2, 3))].tolist()))

  one = Mask.of(count_up(2, length))
  assert reached(one, 3) == [3, 4, 5]  # causal: no earlier block
  assert reached(one.narrow(SIDE), 2) == [2, 3]  # a window as wide as a block reaches one further
  packed = Mask.of(positions, segments)
  assert reached(packed, 0) == [0, 1]  # the first document is two blocks long
  assert reached(packed, 2) == [2, 3, 4]
  assert reached(packed, 5) == []  # padding


def test_no_array_has_queries_times_keys():
  length = 16 * SIDE
  mask, arrays = Mask.of(count_up(2, length), jnp.ones((2, length), int)), draw(length, length)
  largest = max(x.size for x in arrays)

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.size for v in equation.outvars)
      for inner in jaxprs_in_params(equation.params):
        yield from sizes(inner)

  jaxpr = jax.make_jaxpr(differentiate, static_argnums=(0, 6))("blockwise", *arrays, mask, SCORES)
  assert max(sizes(jaxpr.jaxpr)) <= largest < length * length * 2 * 4


def test_memory_grows_linearly(monkeypatch):
  monkeypatch.undo()  # tiles as they are

  def needed(length):
    like = jax.ShapeDtypeStruct
    q, kv = like((1, length, 2, 16), jnp.float32), like((1, length, 1, 16), jnp.float32)
    tokens = like((1, length), jnp.int32)
    mask = Mask(tokens, tokens, tokens, tokens)
    compiled = run.lower("blockwise", q, kv, kv, q, mask, SCORES).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long, longest = (needed(n) for n in (8192, 16384, 32768))
  assert long <= short * 2.05 and longest <= long * 2.05
  assert longest < 32768 * 32768 // 16  # scores would be 128 times as much


def test_the_batch_and_the_heads_may_be_split_over_a_mesh():
  mesh = Mesh(
    np.array(jax.devices()[:8]).reshape(4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2
  )
  length = 3 * SIDE + 1
  arrays = draw(length, length, rows=4)
  positions, segments = documents(10, 12, padding=length - 22)
  mask = Mask.of(*(jnp.tile(x, (4, 1)) for x in (positions, segments))).narrow(9)
  by_head = NamedSharding(mesh, PartitionSpec("rows", None, "heads", None))
  by_row = NamedSharding(mesh, PartitionSpec("rows", None))
  split = jax.device_put(arrays, by_head), jax.device_put(mask, by_row)
  lowered = jit(
    lambda arrays, mask: differentiate("blockwise", *arrays, mask, SCORES),
    out_shardings=(by_head,) * 4,
  ).lower(*split)
  compiled = lowered.compile()
  truth = run("blockwise", *arrays, mask, SCORES)
  assert_equal(compiled(*split), truth)
  collective = r"= (.+?) (?:all-|collective-|reduce-scatter)[\w-]*\("
  moved = re.findall(collective, compiled.as_text())
  assert moved and not any("f32" in shape for shape in moved), (
    moved
  )  # which tiles to visit, no more


def test_a_layer_that_is_computed_again_can_keep_what_the_kernel_has_found():
  length = 2 * SIDE + 3
  q, k, v, cotangent = draw(length, length)
  mask = Mask.of(count_up(2, length))

  def loss(x, policy):
    def layer(x, scale):
      return x + attend("blockwise", x * scale, k, v, mask, SCORES), None

    body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return (jax.lax.scan(body, x, jnp.array([0.5, 1.0, 2.0]))[0] * cotangent).sum()

  again = None
  keep = jax.checkpoint_policies.save_only_these_names(OUT)
  everything = jax.checkpoint_policies.everything_saveable
  truth = jit(jax.grad(lambda x: loss(x, everything)))(q)
  loops = {}
  for name, policy in (("again", again), ("keep", keep)):
    step = jax.grad(functools.partial(loss, policy=policy))
    assert_equal([jit(step)(q)], [truth])
    loops[name] = str(jax.make_jaxpr(step)(q)).count(" while[")
  assert loops == {"again": 3, "keep": 2}  # forward, (forward,) backward


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("length", [1, 100, 513, 1000, 4096, 40000])
def test_tiles_are_few_and_even(length, rows, monkeypatch):
  monkeypatch.undo()
  side = blockwise._side(length, rows)
  blocks = -(-length // side)
  assert side <= max(512, length if blocks == 1 else 0)
  assert blocks * side - length < blocks * 8  # no block is mostly padding
  assert blocks == 1 or side >= 64
