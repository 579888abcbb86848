"""The kernel for decoding equals the reference on any mask, and touches only what is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxtext.caches.slabs import Slab, Storage
from maxtext.errors import ConfigError
from maxtext.kernels import Scores, attend, held
from maxtext.masks import Mask
from tests.chips import FOUR, printed
from tests.kernels.test_blockwise import assert_equal, draw, jit, masks

BLOCK, S = 8, 43
SCORES = Scores(0.3)
FILLED = np.array([17, 30])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(held, "BLOCK", BLOCK)


def call(name, q, k, v, mask, scores=SCORES, sink=None):
  return attend(name, q, k, v, mask, scores, sink)


run = jit(call, static_argnums=(0, 5))


def decoding(t=1, shuffled=False, **structure):
  """The last t of so many tokens a row, over slots that are filled from the front, or anyhow."""
  slots = np.tile(np.arange(S), (2, 1))
  if shuffled:
    slots = np.stack([np.random.default_rng(i).permutation(S) for i in range(2)])
  seg = (slots < FILLED[:, None]).astype(int)
  q_pos = FILLED[:, None] - t + np.arange(t)
  mask = Mask(*map(jnp.asarray, (q_pos, slots, np.ones_like(q_pos), seg)))
  return mask.narrow(**structure)


STRUCTURES = [{}, {"window": 9}, {"chunk": 7}, {"block": 5}, {"causal": False}]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("t, heads, shuffled", [(1, (4, 1), False), (3, (6, 2), True)])
def test_it_equals_the_reference(t, heads, shuffled, structure):
  q, k, v, _ = draw(t, S, heads)
  mask, scores = decoding(t, shuffled, **structure), Scores(0.3, soft_cap=2.0)
  sink = jnp.linspace(-2, 3, heads[0])
  args = (q, k, v[..., :5], mask, scores, sink)
  assert_equal([run("ragged", *args)], [run("dot_product", *args)])


@pytest.mark.parametrize("dtype, noise", [("bfloat16", 3e-2), ("float16", 3e-3)])
def test_it_equals_the_reference_in_few_bits(dtype, noise):
  """Weights are rounded before they meet the values, here before they are divided by their sum."""
  q, k, v, _ = draw(1, S, dtype=jnp.dtype(dtype))
  for f32 in (False, True):
    args = (q, k, v, decoding(), Scores(0.3, f32_product=f32))
    assert_equal([run("ragged", *args)], [run("dot_product", *args)], noise)


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_any_mask_equals_the_reference(examples):
  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(st.data())
  def check(data):
    args = (*draw(3, 29)[:3], data.draw(masks(3, 29)))
    assert_equal([run("ragged", *args)], [run("dot_product", *args)])

  check()


def test_a_query_that_sees_nothing_gets_zeros():
  q, k, v, _ = draw(1, S)
  mask = Mask(jnp.zeros((2, 1), int), jnp.ones((2, S), int))
  assert (np.asarray(run("ragged", q, k, v, mask)) == 0).all()


def poisoned(read, x, mask):
  """The rows whose result is no number, when nothing but one block of each row is."""
  q, k = draw(1, S)[0], draw(1, S)[1]
  out = []
  for block in range(-(-S // BLOCK)):
    bad = jnp.where((np.arange(S) // BLOCK == block)[:, None, None], jnp.nan, x)
    y = run("ragged", q, read(k), read(bad), mask)
    out.append(np.isnan(y).any((1, 2, 3)).tolist())
  return out


def as_array(x):
  return x


def as_cache(x):
  slab = Slab.empty((2, *x.shape), Storage(x.dtype, order=(2, 1, 0, 3), block=BLOCK))
  return slab.put(x, 1, 0).open(jnp.int32(1))


def as_pages(x):
  """44 slots in pages of four, in no order."""
  table = jnp.asarray(np.random.default_rng(0).permutation(22).reshape(2, 11))
  slab = Slab.empty((2, 22, 4, *x.shape[2:]), Storage(x.dtype, block=BLOCK), rows=None)
  slots = np.arange(S)
  slab = slab.scatter_pages(x, 1, table[:, slots // 4], jnp.tile(slots % 4, (2, 1)))
  return slab.open(jnp.int32(1), table)


def longer(mask):
  """The mask over 44 slots, the last one empty."""
  pad = lambda x: jnp.pad(x, [(0, 0), (0, 1)])
  return mask.over(pad(mask.kv_pos), pad(mask.kv_seg))


@pytest.mark.parametrize("read", [as_array, as_cache, as_pages])
@pytest.mark.parametrize("structure", [{}, {"window": 9}, {"chunk": 7}], ids=str)
def test_blocks_that_no_query_sees_are_never_read(read, structure):
  mask = decoding(**structure)
  mask = longer(mask) if read is as_pages else mask
  first = {  # of rows of 17 and 30 tokens: the first block that the last one sees
    None: (0, 0),
    "window": (8 // BLOCK, 21 // BLOCK),
    "chunk": (14 // BLOCK, 28 // BLOCK),
  }[next(iter(structure), None)]
  want = [[first[row] <= i <= (FILLED[row] - 1) // BLOCK for row in range(2)] for i in range(6)]
  assert poisoned(read, draw(1, S)[2], mask) == want


@pytest.mark.parametrize("read", [as_cache, as_pages])
def test_what_a_cache_holds_is_the_same_read_in_blocks_or_gathered(read):
  q, k, v, _ = draw(2, S)
  mask = decoding(2, window=11)
  truth = run("dot_product", q, k, v, mask)
  mask = longer(mask) if read is as_pages else mask
  for kernel in ("ragged", "dot_product", "blockwise", "autoselected"):
    assert_equal([run(kernel, q, read(k), read(v), mask)], [truth])


def test_what_it_cannot_do_is_refused():
  q, k, v, _ = draw(1, S)
  with pytest.raises(ConfigError, match="'ragged' cannot serve .*: .* has no dropout"):
    seed = jnp.zeros(2, jnp.uint32)
    attend("ragged", q, k, v, decoding(), Scores(0.3, dropout=0.5), seed=seed)
  many = jnp.zeros((1, 1025, 1, 4))
  with pytest.raises(ConfigError, match="up to 1024 queries at once, and these are 1025"):
    attend("ragged", many, many, many, Mask.of(jnp.zeros((1, 1025), int)), Scores(0.3))
  with pytest.raises(ConfigError, match="'ragged' has no gradient"):
    jax.grad(lambda v: call("ragged", q, k, v, decoding()).sum())(v)


def test_the_batch_and_the_heads_may_be_split_over_a_mesh():
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  mesh = Mesh(devices, ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
  arrays, mask = draw(1, S)[:3], decoding(window=9)
  by_head = NamedSharding(mesh, PartitionSpec("rows", None, "heads", None))
  by_row = NamedSharding(mesh, PartitionSpec("rows", None))
  split = jax.device_put(arrays, by_head), jax.device_put(mask, by_row)
  ours = jit(lambda arrays, mask: call("ragged", *arrays, mask), out_shardings=by_head)(*split)
  assert_equal([ours], [run("dot_product", *arrays, mask)])


def test_numbers_of_64_bits_may_be_enabled():
  with jax.enable_x64(True):
    q, k, v, _ = draw(1, S, dtype=jnp.float64)
    mask = Mask(jnp.full((2, 1), S - 1), jnp.broadcast_to(jnp.arange(S), (2, S)))
    ours, truth = (attend(name, q, k, v, mask, Scores(0.3)) for name in ("ragged", "dot_product"))
    assert ours.dtype == jnp.float64
    assert_equal([ours], [truth])


FOR_A_TPU = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
  from maxtext.caches import PagedCache, Size, Storage
  from maxtext.kernels import Scores, attend
  from maxtext.masks import Mask

  devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
  grid = np.array(devices).reshape(2, 2)
  mesh = Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  rows, most, size = 8, 64, Size(2, (8, 128), (8, 128))
  empty = lambda: PagedCache.empty(size, rows, rows * most, 16, most, Storage(jnp.bfloat16))
  cache = jax.eval_shape(empty)
  by_rows = lambda x: P("data") if x.shape == (rows, most) else P(None, "data")
  place = lambda x: P(None, "data", None, "tensor") if x.ndim == 5 else by_rows(x)
  heads, places = P("data", None, "tensor"), jax.tree.map(place, cache)

  def decode(cache, q, k, v, positions, sink):
    mask = Mask.of(positions, jnp.ones_like(positions))
    cache, k, v, mask = cache.at(jnp.int32(1)).append(k, v, mask)
    out = attend("ragged", q, k, v, mask.narrow(window=300), Scores(0.1, 30.0), sink)
    return cache.at(None), out

  given = (places, heads, heads, heads, P("data"), P("tensor"))
  step = jax.shard_map(
    decode, mesh=mesh, in_specs=given, out_specs=(places, heads), check_vma=False
  )
  like = jax.ShapeDtypeStruct
  new = [like((rows, 1, n, 128), jnp.bfloat16) for n in (32, 8, 8)]
  shapes = (cache, *new, like((rows, 1), jnp.int32), like((32,), jnp.float32))
  at = lambda x, place: like(x.shape, x.dtype, sharding=NamedSharding(mesh, place))
  step = jax.jit(step, donate_argnums=0).lower(*jax.tree.map(at, shapes, given)).compile()
  sends = ("all-gather", "all-reduce", "collective-permute", "all-to-all")
  memory, pool = step.memory_analysis(), cache.pool.keys.data
  print(sum(step.as_text().count(word) for word in sends), memory.temp_size_in_bytes,
        pool.size * pool.dtype.itemsize // 4)
"""


@pytest.mark.parametrize("topology", FOUR)
def test_a_token_over_pages_compiles_for_a_tpu_on_four_chips_and_gathers_no_pages(topology):
  sent, temporary, keys = map(int, printed(FOR_A_TPU, topology)[-1].split())
  assert sent == 0 and temporary < keys / 4
