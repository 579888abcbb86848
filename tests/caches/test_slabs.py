"""What is stored of one array: the layout, the codes, and what is read back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maxtext.caches import Storage, axis_order
from maxtext.caches.slabs import Slab
from maxtext.errors import ConfigError
from maxtext.specs import CacheQuantSpec
from tests.caches.cases import HASTY

SHAPE = (2, 3, 5, 2, 4)  # l b s g k
X = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)  # two tokens a row
FORMATS = ("int8", "int4", "fp8")
AXES = ("dkv", "heads_and_dkv")
# half the distance between neighbouring codes near the greatest number, as a share of it
STEPS = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 2**-4}


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
def test_any_order_of_axes_is_stored_and_read_back(order):
  slab = Slab.empty(SHAPE, Storage(jnp.float32, order=order))
  slots = jnp.array([[0, 4], [2, 1], [3, 5]])  # the last of them is not there
  put, scattered = slab.put(X, 1, 3), slab.scatter(X, 1, slots)
  want, other = np.zeros((2, *SHAPE), np.float32)
  want[1, :, 3:5] = X
  for b, t in np.ndindex(3, 2):
    if slots[b, t] < 5:
      other[1, b, slots[b, t]] = X[b, t]
  for ours, truth in ((put, want), (scattered, other)):
    np.testing.assert_array_equal(ours.data, truth.transpose(0, *(1 + i for i in order)))
    held = ours.open(jnp.int32(1))
    assert held.shape == truth[1].shape
    np.testing.assert_array_equal(held.dense(), truth[1])
    np.testing.assert_array_equal(held.block(2, 1, 3), truth[1, 2, 1:4])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 3, 0), (3, 2, 0, 1)], ids=str)
def test_pages_are_read_by_their_table_in_any_order_of_axes(order):
  slab = Slab.empty((2, 7, 4, 2, 4), Storage(jnp.float32, order=order), rows=None)
  table = jnp.array([[5, 0], [6, -1], [1, 3]])
  pages, slots = jnp.array([[5, 0], [6, 7], [3, 1]]), jnp.array([[3, 1], [0, 0], [2, 2]])
  slab = slab.scatter_pages(X, 1, pages, slots)  # page 7 is not there
  want = np.zeros((3, 8, 2, 4), np.float32)
  for b, slot, t in ((0, 3, 0), (0, 5, 1), (1, 0, 0), (2, 6, 0), (2, 2, 1)):
    want[b, slot] = X[b, t]
  held = slab.open(jnp.int32(1), table)
  assert held.shape == want.shape
  np.testing.assert_array_equal(held.dense()[::2], want[::2])
  np.testing.assert_array_equal(held.dense()[1, :4], want[1, :4])
  np.testing.assert_array_equal(held.block(2, 4, 4), want[2, 4:])


@pytest.mark.parametrize("given", ["0,1,2", "0,1,2,2", "0,1,2,4", "a,b", (1, 2, 3, 4), (0, None)])
def test_what_is_no_order_of_the_axes_is_refused(given):
  with pytest.raises(ConfigError, match="^ar_cache_axis_order: .* use each of 0,1,2,3 once$"):
    axis_order("ar_cache_axis_order", given)


def test_an_order_may_be_written_or_given():
  assert axis_order("ar_cache_axis_order", "1, 2,0,3") == (1, 2, 0, 3)
  assert axis_order("ar_cache_axis_order", (1, 2, 0, 3)) == (1, 2, 0, 3)


def quantised(format, axis, order=(0, 1, 2, 3), dtype=jnp.float32):
  return Slab.empty(SHAPE, Storage(dtype, CacheQuantSpec(format, axis), order))


def read_back(slab, x):
  return slab.put(x, 1, 2).open(jnp.int32(1)).dense()[:, 2 : 2 + x.shape[1]]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_read_is_the_nearest_code_times_the_shared_scale(format, axis):
  out = np.asarray(read_back(quantised(format, axis), X))
  shared = (3,) if axis == "dkv" else (2, 3)
  top = np.abs(X).max(shared, keepdims=True)
  assert (np.abs(out - X) <= STEPS[format] * top * 1.001).all()
  assert np.abs(out - X).max() > 0  # it was rounded at all
  greatest = np.isclose(np.abs(X), top)
  np.testing.assert_allclose(out[greatest], X[greatest], rtol=1e-6)
  if format != "fp8":
    levels = {"int8": 127, "int4": 7}[format]
    np.testing.assert_allclose(out, np.round(X / top * levels) * top / levels, rtol=1e-5)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_answered_of_new_tokens_is_what_is_read_of_them_later(format, axis):
  for order in ((0, 1, 2, 3), (3, 0, 2, 1)):
    slab = quantised(format, axis, order, jnp.bfloat16)
    assert slab.rounded(X).dtype == read_back(slab, X).dtype == jnp.bfloat16
    np.testing.assert_array_equal(slab.rounded(X), read_back(slab, X))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_are_read_as_zeros(format, axis):
  x = np.where(np.arange(2)[:, None, None] == 0, 0, X)
  out = np.asarray(read_back(quantised(format, axis), x))
  assert np.isfinite(out).all() and (out[:, 0] == 0).all() and (out[:, 1] != 0).any()


@pytest.mark.parametrize("format", FORMATS)
def test_any_finite_numbers_are_read_back_to_the_precision_of_the_codes(format):
  slab = quantised(format, "dkv")
  read = jax.jit(lambda x: read_back(slab, x), compiler_options=HASTY)
  numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)

  @settings(max_examples=100, deadline=None, derandomize=True, database=None)
  @given(arrays(np.float32, X.shape, elements=numbers))
  def check(x):
    out, top = np.asarray(read(x)), np.abs(x).max(-1, keepdims=True)
    # numbers too small for their scale to be a float32 are read as zeros
    assert (np.abs(out - x) <= STEPS[format] * top * 1.001 + 2.0**-110).all()

  check()


@pytest.mark.parametrize("format, bits", [("int8", 8), ("int4", 4), ("fp8", 8)])
def test_codes_take_as_many_bits_as_they_say_and_few_scales(format, bits):
  for axis, scales in (("dkv", 2 * 3 * 5 * 2), ("heads_and_dkv", 2 * 3 * 5)):
    slab = quantised(format, axis)
    info = jnp.finfo if format == "fp8" else jnp.iinfo
    assert info(slab.data.dtype).bits == bits and slab.data.shape == SHAPE
    assert slab.scale.size == scales


@pytest.mark.parametrize(
  "key, given", [("kv_quant_dtype", ("int2", "dkv")), ("kv_quant_axis", ("int8", "k"))]
)
def test_an_unknown_way_to_quantise_is_refused(key, given):
  with pytest.raises(ConfigError, match=f"^{key}: '.*' is none of "):
    CacheQuantSpec(*given)
