"""What the GPU's flash kernel is asked for equals the reference; JAX's plain form of it answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maxtext import sharding
from maxtext.errors import ConfigError
from maxtext.kernels import Scores, attend, cudnn
from maxtext.masks import Mask

LENGTH, SCORES = 30, Scores(0.3)
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
RESTARTED = jnp.array([[*range(12), *range(13), *range(5)], [*range(LENGTH)]])
PACKED = jnp.array([[1] * 12 + [2] * 13 + [0] * 5, [1] * LENGTH])
SPANS = jnp.where(POSITIONS % 10 < 4, 1 + POSITIONS // 10, 0)
ONE, MANY = Mask.of(POSITIONS, ordered=True), Mask.of(RESTARTED, PACKED, ordered=True)


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(monkeypatch):
  """The same request, computed in JAX's plain form."""
  mapping = cudnn.attention
  monkeypatch.setattr(cudnn, "attention", lambda _, *case: mapping("xla", *case))
  monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
  monkeypatch.setattr(cudnn, "planned", lambda: True)


def draw(dtype=jnp.bfloat16, queries=LENGTH, keys=LENGTH, head_dim=8):
  """q, k, v and a cotangent."""
  random = np.random.default_rng(0)
  shapes = [(2, t, n, head_dim) for t, n in ((queries, 4), (keys, 2), (keys, 2), (queries, 4))]
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def run(name, arrays, mask, place=None):
  """The result and the gradients by q, k, v."""

  def step(q, k, v, cotangent, mask):
    y, back = jax.vjp(lambda *x: attend(name, *x, mask, SCORES), q, k, v)
    return y, *back(cotangent)

  with sharding.use(place):
    return jax.jit(step)(*arrays, mask)


def assert_like_reference(mask, place=None, **sizes):
  arrays = draw(**sizes)
  ours = run("cudnn_flash", arrays, mask, place)
  exact = run("dot_product", [x.astype(jnp.float32) for x in arrays], mask)
  for a, b in zip(ours, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    # scores, weights and results are rounded to 8 bits
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-2 * max(1.0, np.abs(b).max()))


MASKS = {
  "causal": ONE,
  "window": ONE.narrow(7),
  "both ways": ONE.narrow(causal=False),
  "packed": MANY,
  "packed window": MANY.narrow(5),
  "packed both ways window": MANY.narrow(5, causal=False),
  "chunk": ONE.narrow(chunk=8),
  "block": MANY.narrow(block=4),
  "spans": Mask.of(RESTARTED, PACKED, SPANS, ordered=True).narrow(3),
  "shuffled": Mask.of(POSITIONS[:, ::-1]).narrow(9),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_it_equals_the_reference(mask):
  assert_like_reference(mask)


def test_a_cache_of_keys_is_read_by_their_positions():
  held = jnp.where(POSITIONS < 20, 1, 0)
  mask = ONE.over(POSITIONS, held)
  mask = dataclasses.replace(mask, q_pos=POSITIONS[:, 14:20], q_seg=jnp.ones((2, 6), int))
  assert_like_reference(mask, queries=6)


def test_memory_holds_a_mask_only_where_one_is_needed():
  for name, mask in MASKS.items():
    trace = jax.make_jaxpr(lambda mask: cudnn._plain(mask) or mask.dense())(mask)
    assert bool(trace.jaxpr.eqns) == (name not in ("causal", "window", "both ways"))


def test_rows_and_heads_may_be_split():
  grid = np.array(jax.devices()[:4]).reshape(2, 2)
  rules = {f"activation_{x}": ("tensor",) for x in ("heads", "kv_heads")}
  rules |= {"activation_batch": ("fsdp",), "activation_length": ()}
  mesh = Mesh(grid, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
  assert_like_reference(MANY.narrow(5), sharding.Layout(mesh, sharding.Rules(rules)))


def test_what_it_cannot_do_is_said(monkeypatch):
  def refusal(mask=ONE, scores=SCORES, sink=None, seed=None, **sizes):
    with pytest.raises(ConfigError) as caught:
      attend("cudnn_flash", *draw(**sizes)[:3], mask, scores, sink, seed)
    return str(caught.value)

  assert "float32" in refusal(dtype=jnp.float32)
  assert "head_dim" in refusal(head_dim=12) and "head_dim" in refusal(head_dim=136)
  assert "soft cap" in refusal(scores=Scores(0.3, 2.0))
  assert "sink" in refusal(sink=jnp.zeros(4))
  seed = jnp.array([1, 2], jnp.uint32)
  assert "dropout" in refusal(scores=Scores(0.3, dropout=0.1), seed=seed)
  assert "float32 product" in refusal(scores=Scores(0.3, f32_product=True))
  odd = Mask.of(POSITIONS[:, :29], jnp.ones((2, 29), int))
  assert "not even" in refusal(odd, queries=29, keys=29)
  monkeypatch.setattr(cudnn, "platform", lambda: "cpu")
  assert "it runs on NVIDIA GPUs" in refusal()
