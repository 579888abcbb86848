"""The TPU's flash kernel equals the reference, by its interpreter; the TPU's compiler takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maxtext import sharding
from maxtext.errors import ConfigError
from maxtext.kernels import Options, Scores, attend, splash
from maxtext.kernels.options import Blocks
from maxtext.masks import Mask
from tests.chips import FOUR, printed

HASTY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
SCORES = Scores(0.3)
SINK = jnp.array([-2.0, 0.0, 1.0, 4.0])
TUNED = Options("flash", Blocks(*[256] * 2, 128, *[128] * 5))
FUSED = Options("flash", Blocks(*[128] * 8, fused_backward=True))
MINOR = Options("flash", Blocks(*[128] * 8, False, *["SEQ_MINOR"] * 3))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  monkeypatch.setattr(splash, "INTERPRET", True)


def draw(length, heads=(4, 2), head_dim=64, dtype=jnp.float32):
  """q, k, v and a cotangent of two rows."""
  random = np.random.default_rng(length + head_dim)
  shapes = [(2, length, n, head_dim) for n in (*heads, heads[1], heads[0])]
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def make_mask(length, packed=True, **structure):
  """Two rows in order: documents and padding, or one document that starts anywhere."""
  if not packed:
    return Mask.of(jnp.arange(length) + jnp.array([[0], [37]]), ordered=True).narrow(**structure)
  rows = [(length // 2, length // 3), (length // 5, length - length // 5)]
  rows = [(*row, length - sum(row)) for row in rows]
  positions = [np.concatenate([np.arange(n) for n in row]) for row in rows]
  segments = [np.repeat([1, 2, 0], row) for row in rows]
  marks = (jnp.asarray(np.stack(x)) for x in (positions, segments))
  return Mask.of(*marks, ordered=True).narrow(**structure)


def run(how, arrays, mask, scores, sink=None, place=None):
  """The result and the gradients by q, k, v and, where there is one, the sink."""

  def step(q, k, v, cotangent, mask, sink):
    traced = (q, k, v) if sink is None else (q, k, v, sink)
    y, back = jax.vjp(lambda q, k, v, *s: attend(how, q, k, v, mask, scores, *s), *traced)
    return y, *back(cotangent)

  with sharding.use(place):
    return jax.jit(step, compiler_options=HASTY)(*arrays, mask, sink)


def assert_like_reference(how, arrays, mask, scores=SCORES, sink=None, noise=1e-5, place=None):
  """Equal to `noise` of the largest number; 1e-5 is that of float32 sums of hundreds of terms."""
  ours = run(how, arrays, mask, scores, sink, place)
  for a, b in zip(ours, run("dot_product", arrays, mask, scores, sink), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=noise * max(1.0, np.abs(b).max()))


MATRIX = [  # every value of every column, and every pair that has a shared branch
  # how, length, heads, head_dim, packed, structure, soft cap, sink
  ("flash", 128, (4, 4), 64, False, {}, None, None),
  ("flash", 256, (4, 2), 64, True, {}, None, SINK),
  (TUNED, 256, (4, 1), 128, True, {"window": 50}, 2.0, SINK),
  (FUSED, 256, (4, 2), 64, True, {"window": 1}, 2.0, None),
  (MINOR, 256, (4, 2), 128, False, {"window": 130}, None, SINK),
  (TUNED, 200, (4, 2), 64, True, {"chunk": 30}, None, None),
  ("flash", 130, (4, 2), 64, False, {"chunk": 40, "window": 25}, 2.0, None),
  ("flash", 256, (4, 2), 64, True, {"causal": False}, None, SINK),
  (TUNED, 130, (4, 2), 64, False, {"causal": False}, None, None),
  ("flash", 128, (4, 2), 64, True, {"causal": False, "window": 20}, 2.0, None),
  (TUNED, 256, (4, 2), 64, True, {"causal": False, "chunk": 60}, None, None),
]


@pytest.mark.parametrize("how, length, heads, head_dim, packed, structure, soft_cap, sink", MATRIX)
def test_it_equals_the_reference(how, length, heads, head_dim, packed, structure, soft_cap, sink):
  mask, arrays = make_mask(length, packed, **structure), draw(length, heads, head_dim)
  assert_like_reference(how, arrays, mask, Scores(head_dim**-0.5, soft_cap), sink)


def test_it_equals_the_reference_in_sixteen_bits():
  arrays = draw(256, head_dim=128, dtype=jnp.bfloat16)
  # queries are rounded to 8 bits again when they are scaled, and so are gradients of scores
  mask, scores = make_mask(256, window=50), Scores(128**-0.5)
  assert_like_reference("flash", arrays, mask, scores, SINK, noise=3e-2)


MESHES = {"rows and heads": (2, 1, 2), "length": (2, 2, 1)}


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_heads_and_by_ulysses_the_length_may_be_split(mesh):
  grid = np.array(jax.devices()[:4]).reshape(MESHES[mesh])
  rules = {f"activation_{x}": ("tensor",) for x in ("heads", "kv_heads")}
  rules |= {"activation_batch": ("fsdp",), "activation_length": ("context",)}
  axes = ("fsdp", "context", "tensor")
  place = sharding.Layout(Mesh(grid, axes, axis_types=(AxisType.Auto,) * 3), sharding.Rules(rules))
  how = Options("flash", context="ulysses")
  assert_like_reference(how, draw(128), make_mask(128), SCORES, SINK, place=place)
  if mesh == "length":
    with pytest.raises(ConfigError, match="choose a context_parallel_strategy"):
      run("flash", draw(128), make_mask(128), SCORES, place=place)


def test_what_it_cannot_do_is_said(monkeypatch):
  mask, spans = make_mask(128), jnp.ones((2, 128), int)
  seed = jnp.array([1, 2], jnp.uint32)

  def refusal(mask=mask, scores=SCORES, seed=None, dtype=jnp.float32):
    with pytest.raises(ConfigError) as caught:
      attend("flash", *draw(128, dtype=dtype)[:3], mask, scores, None, seed)
    return str(caught.value)

  assert "tokens in order" in refusal(dataclasses.replace(mask, ordered=False))
  assert "tokens in order" in refusal(mask.over(mask.kv_pos, mask.kv_seg))
  assert "block" in refusal(mask.narrow(block=8))
  assert "spans" in refusal(dataclasses.replace(mask, q_span=spans))
  assert "dropout" in refusal(scores=Scores(0.3, dropout=0.1), seed=seed)
  with jax.enable_x64(True):
    assert "numbers of 64 bits" in refusal()
  assert "q.k from bfloat16" in refusal(scores=Scores(1, f32_product=True), dtype=jnp.bfloat16)
  assert "float16" in refusal(dtype=jnp.float16)
  monkeypatch.setattr(splash, "INTERPRET", False)
  assert "it runs on TPU" in refusal()


@pytest.mark.parametrize("length", [1, 128, 300, 600, 4096, 5000])
@pytest.mark.parametrize("sides", [(512,) * 8, (512, 1024, 256, 2048, 640, 128, 384, 512)])
def test_blocks_divide_the_length_that_is_padded(length, sides):
  padded, blocks = Blocks(*sides).fitted(length)
  fitted = [getattr(blocks, field.name) for field in dataclasses.fields(blocks)][:8]
  assert padded >= length and (sides[0] != sides[1] or padded - length < 512)
  for side, asked in zip(fitted, sides):
    assert side % 128 == padded % side == 0 and side <= asked
  assert blocks.kv % blocks.kv_compute == blocks.kv_dkv % blocks.kv_dkv_compute == 0


COMPILE = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
  from maxtext import sharding
  from maxtext.kernels import Options, Scores, attend
  from maxtext.masks import Mask

  devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
  for sizes, context in (((2, 1, 2), None), ((1, 2, 2), "ulysses"), ((1, 4, 1), "ring")):
    axes = ("fsdp", "context", "tensor")
    mesh = Mesh(np.array(devices).reshape(sizes), axes, axis_types=(AxisType.Auto,) * 3)
    rules = {f"activation_{x}": ("tensor",) for x in ("heads", "kv_heads")}
    rules |= {"activation_batch": ("fsdp",), "activation_length": ("context",)}
    layout = sharding.Layout(mesh, sharding.Rules(rules))
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    like = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=at(*spec))
    q, k, v = (like((2, 1024, n, 128), jnp.bfloat16, *axes) for n in (8, 4, 4))
    marks, sink = [like((2, 1024), jnp.int32, *axes[:2])] * 2, like((8,), jnp.float32, "tensor")
    kernel = "autoselected" if context == "ring" else "flash"

    def loss(q, k, v, sink, positions, segments):
      mask = Mask.of(positions, segments, ordered=True)
      mask = mask.narrow(chunk=512) if context == "ulysses" else mask.narrow(window=300)
      how = Options(kernel, context=context)
      y = attend(how, q, k, v, mask, Scores(0.1, 30.0), sink)
      return y.astype(jnp.float32).sum()

    with sharding.use(layout):
      step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
      compiled = step.lower(q, k, v, sink, *marks).compile()
    print(context, compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.parametrize("topology", FOUR)
def test_it_compiles_for_a_tpu_with_its_gradient_over_four_chips(topology):
  # forward, and the gradients by queries and by keys and values
  assert printed(COMPILE, topology) == ["None 3", "ulysses 3", "ring 0"]
