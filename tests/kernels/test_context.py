"""Every way to attend over a length that is split equals one device, with gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maxtext import sharding
from maxtext.errors import ConfigError
from maxtext.kernels import OUT, Options, Scores, attend, blockwise
from maxtext.masks import Mask

HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 48, 8, 4, 8
STRATEGIES = ("ring", "ulysses", "all_gather")
MESHES = {  # fsdp, sequence, context, tensor
  "context 8": (1, 1, 8, 1),
  "fsdp 2 context 4": (2, 1, 4, 1),
  "fsdp 2 context 2 tensor 2": (2, 1, 2, 2),
  "sequence 2 context 2 tensor 2": (1, 2, 2, 2),
}
RULES = sharding.Rules(
  {
    "activation_batch": ("fsdp",),
    "activation_length": ("sequence", "context"),
    "cache_sequence": ("sequence", "context"),
    "activation_heads": ("tensor",),
    "activation_kv_heads": ("tensor",),
  }
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  monkeypatch.setattr(blockwise, "_LEAST", 8)
  monkeypatch.setattr(blockwise, "_MOST", 8)


def layout(mesh):
  grid = np.array(jax.devices()[:8]).reshape(MESHES[mesh])
  axes = ("fsdp", "sequence", "context", "tensor")
  return sharding.Layout(Mesh(grid, axes, axis_types=(AxisType.Auto,) * 4), RULES)


def draw(heads=HEADS, groups=GROUPS, dtype=jnp.float32):
  """q, k, v and a cotangent."""
  random = np.random.default_rng(heads + groups)
  shapes = [(ROWS, LENGTH, n, WIDTH) for n in (heads, groups, groups, heads)]
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def tokens(*lengths):
  """Documents packed one after the other, of which the last is padding: a row of marks each."""
  positions = np.concatenate([np.arange(n) for n in lengths])
  segments = np.repeat([*range(1, len(lengths)), 0], lengths)
  return positions, segments


def make_mask(order=None, spans=False, **structure):
  """Two rows of different documents, in any order of their slots."""
  rows = [tokens(20, 19, 9), tokens(5, 43, 0)]
  positions, segments = (np.stack(marks) for marks in zip(*rows))
  span = np.where(positions % 12 < 5, 1 + positions // 12, 0) if spans else None
  order = np.arange(LENGTH) if order is None else order
  marks = (None if x is None else jnp.asarray(x[:, order]) for x in (positions, segments, span))
  return Mask.of(*marks).narrow(**structure)


def balanced(parts):
  """Slots in which device i of `parts` holds the chunks i and 2 parts - 1 - i of a causal row."""
  chunks = np.arange(LENGTH).reshape(2 * parts, -1)
  return np.concatenate([np.r_[chunks[i], chunks[-1 - i]] for i in range(parts)])


SINK = jnp.linspace(-3.0, 4.0, HEADS)
CASES = {
  "packed": (make_mask(), Scores(0.3), None),
  "window, sinks, soft cap": (make_mask(window=7), Scores(0.3, 2.0), SINK),
  "balanced order": (make_mask(balanced(4)), Scores(0.3), SINK),
  "both ways, in chunks": (make_mask(causal=False, chunk=9), Scores(0.3), None),
  "spans": (make_mask(balanced(2), spans=True, window=4), Scores(0.3), None),
}


def run(how, arrays, mask, scores, sink=None, place=None, seed=None):
  """The result and the gradients by q, k, v and, where there is one, the sink."""

  def step(q, k, v, cotangent, mask, sink):
    traced = (q, k, v) if sink is None else (q, k, v, sink)

    def kernel(q, k, v, sink=None):
      return attend(how, q, k, v, mask, scores, sink, seed)

    y, back = jax.vjp(kernel, *traced)
    return y, *back(cotangent.astype(y.dtype))

  with sharding.use(place):
    return jax.jit(step, compiler_options=HASTY)(*arrays, mask, sink)


@functools.cache
def truth(case):
  return run("dot_product", draw(), *CASES[case])


def assert_equal(ours, theirs, noise=1e-5):
  """Equal to `noise` of the largest number; 1e-5 is that of float32 sums of a hundred terms."""
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=noise * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_split_length_equals_one_device(strategy, case):
  place = layout("fsdp 2 context 4" if case != "packed" else "context 8")
  assert_equal(run(Options(context=strategy), draw(), *CASES[case], place), truth(case))


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "tensor" in mesh])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_heads_and_rows_may_be_split_beside_the_length(strategy, mesh):
  case = "window, sinks, soft cap"
  assert_equal(run(Options(context=strategy), draw(), *CASES[case], layout(mesh)), truth(case))


@pytest.mark.parametrize("groups", [GROUPS, 1])
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "tensor" in mesh])
def test_a_cache_in_parts_equals_one_device(mesh, groups):
  """For the last queries, of which one row has none; part of the slots is seen by nobody."""
  mask, scores, sink = CASES["window, sinks, soft cap"]
  q, k, v, _ = draw(groups=groups)
  held = dataclasses.replace(
    mask, q_pos=mask.q_pos[:, -8:], q_seg=mask.q_seg[:, -8:], ordered=False, cached=True
  )

  def attended(place, kernel):
    with sharding.use(place):
      run = jax.jit(lambda q, k, v, mask, sink: attend(kernel, q, k, v, mask, scores, sink))
      return run(q[:, -8:], k, v, held, sink)

  ours, theirs = attended(layout(mesh), "autoselected"), attended(None, "dot_product")
  assert_equal([ours], [theirs])
  with pytest.raises(ConfigError, match="computed by 'blockwise', not by 'dot_product'"):
    attended(layout(mesh), "dot_product")


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_without_a_strategy_the_compiler_is_right_too(kernel):
  case, place = "balanced order", layout("fsdp 2 context 2 tensor 2")
  assert_equal(run(kernel, draw(), *CASES[case], place), truth(case))


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
@pytest.mark.parametrize("strategy", ["ulysses", "all_gather"])
def test_the_named_kernel_runs_inside(strategy, kernel, monkeypatch):
  """By what its refusal is called with: a part of the heads, or of the queries."""
  from maxtext import kernels

  shapes = []
  compute = kernels._kernels[kernel][0]
  note = lambda q, k, *_: shapes.append((q.shape[1:3], k.shape[1:3]))
  monkeypatch.setitem(kernels._kernels, kernel, (compute, note))
  options, case = Options(kernel, context=strategy), "packed"
  assert_equal(run(options, draw(), *CASES[case], layout("fsdp 2 context 4")), truth(case))
  part = {"ulysses": ((48, 2), (48, 1)), "all_gather": ((12, 8), (48, 4))}
  assert shapes == [part[strategy]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sixteen_bit_parts_are_put_together(strategy):
  mask, scores, _ = CASES["packed"]
  arrays = draw(dtype=jnp.bfloat16)
  ours = run(Options(context=strategy), arrays, mask, scores, None, layout("context 8"))
  # weights, parts and their gradients are rounded to 8 bits before they meet
  assert_equal(ours, run("dot_product", arrays, mask, scores), noise=3e-2)


def test_a_ring_keeps_no_more_than_its_share_for_the_gradient():
  """Of keys and values a device keeps a part, not the whole row that has gone by."""
  mask, scores, _ = CASES["packed"]
  place = layout("context 8")
  with sharding.use(place):
    how = Options(context="ring")
    _, back = jax.eval_shape(
      lambda q, k, v: jax.vjp(lambda *x: attend(how, *x, mask, scores), q, k, v), *draw()[:3]
    )
  q, k, v, _ = draw()
  marks, norm = 4 * mask.q_pos.size, ROWS * LENGTH * HEADS
  kept = sum(x.size for x in jax.tree.leaves(back))
  assert kept <= 2 * q.size + k.size + v.size + marks + norm


def test_a_ring_moves_parts_to_neighbours_and_gathers_nothing():
  q, k, v, _ = draw()
  mask, scores, _ = CASES["packed"]
  with sharding.use(layout("context 8")):
    how = Options(context="ring")
    loss = jax.grad(lambda *x: attend(how, *x, mask, scores).sum(), (0, 1, 2))
    text = str(jax.make_jaxpr(loss)(q, k, v))
  assert "ppermute" in text and "all_gather" not in text and "all_to_all" not in text


def refusal(how, groups=GROUPS, heads=HEADS, place="context 8", **more):
  with pytest.raises(ConfigError) as caught:
    run(how, draw(heads, groups), *CASES["packed"], layout(place), **more)
  return str(caught.value)


def test_what_a_strategy_cannot_do_is_said():
  seeded = {"seed": jnp.array([1, 2], jnp.uint32)}
  mask = CASES["packed"][0]
  for strategy in STRATEGIES:
    with pytest.raises(ConfigError, match="dropout"):
      run(
        Options(context=strategy), draw(), mask, Scores(0.3, dropout=0.1), None,
        layout("context 8"), **seeded,
      )  # fmt: skip
  assert "4 query heads on a device do not divide" in refusal(Options(context="ulysses"), heads=4)
  assert "do not divide one another" in refusal(
    Options(context="ulysses"), groups=6, heads=24, place="fsdp 2 context 4"
  )
  assert "'blockwise', not by 'dot_product'" in refusal(Options("dot_product", context="ring"))
  assert "did you mean 'ring'" in refusal(Options(context="rign"))


def test_a_length_that_is_whole_needs_no_strategy():
  grid = np.array(jax.devices()[:2]).reshape(2, 1, 1, 1)
  axes = ("fsdp", "sequence", "context", "tensor")
  whole = sharding.Layout(Mesh(grid, axes, axis_types=(AxisType.Auto,) * 4), RULES)
  arrays, (mask, scores, _) = draw(), CASES["packed"]
  seed = jnp.array([1, 2], jnp.uint32)
  dropping = Scores(scores.scale, dropout=0.2)
  for context in STRATEGIES:
    options = Options("dot_product", context=context)
    ours = run(options, arrays, mask, dropping, None, whole, seed)
    assert_equal(ours, run("dot_product", arrays, mask, dropping, seed=seed))


def test_a_layer_that_is_computed_again_can_keep_what_the_ring_has_found():
  """Loops over the ring: forward, backward, and forward once more where nothing is kept."""
  q, k, v, cotangent = draw()
  mask, scores, _ = CASES["balanced order"]
  how = Options(context="ring")

  def loss(q, policy):
    def layer(x, scale):
      return x + attend(how, x * scale, k, v, mask, scores), None

    body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return (jax.lax.scan(body, q, jnp.array([0.5, 1.0, 2.0]))[0] * cotangent).sum()

  loops, found = {}, []
  keep = jax.checkpoint_policies.save_only_these_names(OUT)
  with sharding.use(layout("fsdp 2 context 4")):
    for name, policy in (("again", None), ("keep", keep)):
      step = jax.grad(functools.partial(loss, policy=policy))
      found.append(jax.jit(step, compiler_options=HASTY)(q))
      loops[name] = str(jax.make_jaxpr(step)(q)).count("length=3")  # steps of the ring, and layers
  assert_equal(found[:1], found[1:])
  assert loops["again"] - loops["keep"] == 1
