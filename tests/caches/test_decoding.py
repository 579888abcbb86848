"""Decoding with a cache equals one pass."""

import functools
import itertools

import jax
import numpy as np
import pytest

from maxtext import sharding
from maxtext.caches import RingCache, Storage, empty, filled
from maxtext.masks import Mask

LENGTH, SLOTS = 20, 24
MESHES = (
  {"fsdp": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"fsdp_transpose": 2, "fsdp": 2, "tensor": 2},
)


def in_parts(model, parts, ids, positions, segments):
  """Logits [b t v], the tokens given to the decoder a part at a time."""

  def forward(params, caches, ids, positions, segments):
    with sharding.use(model.layout):
      decoder = model.plan.merge(params)
      if caches is None:
        caches = empty(model.spec, len(ids), SLOTS, Storage(decoder.compute.dtype))
      x, caches, _ = decoder.hidden(ids, Mask.of(positions, segments), caches)
      return decoder.logits(x), filled(caches)

  forward, caches, out, start = jax.jit(forward), None, [], 0
  place = model.layout.sharding(("activation_batch", None), ids.shape)
  for size in parts:
    part = [x[:, start : start + size] for x in (ids, positions, segments)]
    logits, caches = forward(model.params, caches, *jax.device_put(part, place))
    out.append(np.asarray(logits))
    start += size
  return np.concatenate(out, axis=1)


def padded(lengths):
  """Rows of tokens that end together, their positions and their segments, 0 before they begin."""
  ids = np.random.default_rng(0).integers(0, 64, (len(lengths), LENGTH)).astype(np.int32)
  positions = np.arange(LENGTH) - (LENGTH - np.array(lengths)[:, None])
  return ids, np.maximum(positions, 0).astype(np.int32), (positions >= 0).astype(np.int32)


def check(model, parts, lengths):
  ids, positions, segments = padded(lengths)
  out = in_parts(model, parts, ids, positions, segments)
  for row, length in enumerate(lengths):
    want = model.logits(ids[row, LENGTH - length :])
    # float32 noise of sums in another order; the logits are of size 10
    np.testing.assert_allclose(out[row, LENGTH - length :], want, atol=1e-5 * np.abs(want).max())


TOKEN_BY_TOKEN = (10, *[1] * 10)


@pytest.mark.parametrize(
  "spec, scan, policy",
  [
    *itertools.product(("grouped", "windowed", "learned", "mixed"), (True,), ("full",)),
    *itertools.product(("grouped", "windowed", "learned", "mixed"), (False,), ("none",)),
    ("linear", True, "full"),
    pytest.param("linear", False, "none", marks=pytest.mark.slow),
  ],
)
def test_decoding_with_a_cache_equals_one_pass_over_each_row_alone(model, spec, scan, policy):
  check(model(spec, scan=scan, policy=policy), TOKEN_BY_TOKEN, [20, 11, 15])


@pytest.mark.parametrize("parts", [(7, 1, 5, 1, 6), (1,) * 20, (2, 18)], ids=str)
@pytest.mark.parametrize("spec", ["mixed", pytest.param("linear", marks=pytest.mark.slow)])
def test_tokens_may_come_in_parts_of_any_size(model, parts, spec):
  check(model(spec), parts, [20, 19])


@pytest.mark.parametrize(
  "spec, sizes",
  [("mixed", sizes) for sizes in MESHES]
  + [pytest.param("linear", sizes, marks=pytest.mark.slow) for sizes in MESHES],
  ids=str,
)
def test_every_mesh_decodes_alike(model, spec, sizes):
  check(model(spec, **sizes), TOKEN_BY_TOKEN, [20, 11, 15, 14, 20, 12, 11, 17])


@pytest.mark.parametrize(
  "spec", ["grouped", "windowed", pytest.param("linear", marks=pytest.mark.slow)]
)
def test_documents_packed_in_one_row_do_not_see_each_other(model, spec):
  ids, _, _ = padded([LENGTH])
  cut, at = 9, np.arange(LENGTH, dtype=np.int32)
  positions, segments = np.where(at < cut, at, at - cut), np.where(at < cut, 1, 2)
  model = model(spec)
  out = in_parts(model, (6, 6, *[1] * 8), ids, positions[None], segments[None].astype(np.int32))[0]
  want = np.concatenate([model.logits(ids[0, :cut]), model.logits(ids[0, cut:])])
  np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


def test_a_layer_with_a_window_keeps_no_more_than_the_window(model):
  caches = jax.eval_shape(
    functools.partial(empty, model("mixed").spec, 2, SLOTS, Storage(np.float32))
  )
  (near, far), (near_alone,) = caches
  assert [type(c) is RingCache for c in (near, far, near_alone)] == [True, False, True]
  assert near.store.keys.shape == (2, 2, 3, 2, 8)
  assert far.store.keys.shape == (2, 2, SLOTS, 2, 8)
  assert near_alone.store.keys.shape == (1, 2, 5, 2, 8)
