"""Every kind of cache, whatever it stores how: tokens in parts see what they see in one pass."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtext.caches import DenseCache, PromptCache, RingCache, Size, Storage, bounded
from maxtext.errors import ConfigError
from maxtext.masks import Mask
from tests.caches.cases import (
  KINDS,
  LENGTH,
  PROMPT,
  QUANTS,
  ROWS,
  SIZE,
  STRUCTURES,
  assert_equal,
  in_parts,
  marks,
  one_pass,
  reach,
  tokens,
)
from tests.conftest import forget_programs

PLAIN = Storage(jnp.float32)
COMPACT = ("rows", "row_rings", "paged")  # where padding takes no slot


def check(kind, structure, quant="plain", parts=(PROMPT,), kernel="dot_product", **how):
  storage = Storage(jnp.float32, QUANTS[quant], how.pop("order", (0, 1, 2, 3)), block=8)
  positions, segments = marks(how.pop("padding", "left"), **how)
  mask = Mask.of(positions, segments).narrow(**structure)
  ours, _ = in_parts(KINDS[kind](storage, reach(structure)), tokens(), mask, parts, kernel)
  assert_equal(ours, one_pass(tokens(), mask, storage))


def every(*columns):
  """All combinations of the columns; those are slow that others of the same pairs stand for."""
  params = []
  for at in itertools.product(*(range(len(column)) for column in columns)):
    values = [column[i] for column, i in zip(columns, at)]
    marks = [] if sum(at) % len(columns[-1]) == 0 else [pytest.mark.slow]
    params.append(pytest.param(*values, marks=marks, id="-".join(values)))
  return params


@pytest.mark.parametrize(
  "kind, structure, quant", every(list(KINDS), list(STRUCTURES), list(QUANTS))
)
def test_a_prompt_and_then_token_by_token_is_one_pass(kind, structure, quant):
  check(kind, STRUCTURES[structure], quant)


@pytest.mark.parametrize("kind, structure", every(list(KINDS), list(STRUCTURES)))
def test_a_prompt_in_chunks_is_one_pass(kind, structure):
  check(kind, STRUCTURES[structure], "int8", parts=(4, 1, 6))


@pytest.mark.parametrize("structure, kind", every(list(STRUCTURES), ["dense", "prompt", *COMPACT]))
def test_a_prompt_padded_on_the_right_is_one_pass(kind, structure):
  check(kind, STRUCTURES[structure], padding="right", parts=(5, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_one_row_do_not_see_each_other(kind):
  check(kind, {"window": 5}, packed=True)


@pytest.mark.parametrize(
  "kind, quant, structure", every(list(KINDS), ["plain", "int8"], list(STRUCTURES))
)
def test_the_kernel_that_reads_blocks_sees_the_same(kind, quant, structure):
  check(kind, STRUCTURES[structure], quant, kernel="ragged", order=(2, 0, 3, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_kept_where_they_are_asked_for(kind):
  positions, segments = marks("left", (PROMPT, PROMPT))
  spans = jnp.where((positions > 1) & (positions < 9), 1, 0)
  mask = Mask.of(positions, segments, spans).narrow(5)
  storage = dataclasses.replace(PLAIN, spans=True)
  ours, _ = in_parts(KINDS[kind](storage, 5), tokens(), mask, (PROMPT,))
  assert_equal(ours, one_pass(tokens(), mask))


def test_spans_that_are_not_kept_are_refused():
  positions, segments = marks("left")
  with pytest.raises(ConfigError, match=r"^spans: are not kept .* spans=True"):
    in_parts(KINDS["dense"](PLAIN, None), tokens(), Mask.of(positions, segments, segments), (3,))


@pytest.mark.parametrize("kind", ["dense", "prompt", "paged"])
def test_tokens_that_see_their_whole_block_may_come_block_by_block(kind):
  positions, segments = marks("left", (PROMPT, PROMPT))
  mask = Mask.of(positions, segments).narrow(block=PROMPT)
  ours, _ = in_parts(KINDS[kind](PLAIN, None), tokens(), mask, (PROMPT,))
  first = one_pass(tokens(), mask)[:, :, :PROMPT]
  assert_equal(ours[:, :, :PROMPT], first)
  if kind != "prompt":  # whose prompt is one block here
    ours, _ = in_parts(KINDS[kind](PLAIN, None), tokens(), mask, (PROMPT,) * 3)
    assert_equal(ours, one_pass(tokens(), mask))


@st.composite
def cases(draw):
  """A kind of cache, what it stores how, who sees whom, and in which parts the tokens come."""
  kind = draw(st.sampled_from(sorted(KINDS)))
  window, chunk = draw(st.sampled_from([(None, None), (1, None), (7, None), (None, 9), (4, 6)]))
  structure = {"window": window, "chunk": chunk}
  parts, left = [], PROMPT if kind == "prompt" else draw(st.integers(PROMPT, LENGTH - 1))
  while left:
    parts.append(draw(st.integers(1, left)) if len(parts) < 2 else left)
    left -= parts[-1]
  return {
    "kind": kind,
    "structure": {name: size for name, size in structure.items() if size},
    "quant": draw(st.sampled_from(sorted(QUANTS))),
    "order": tuple(draw(st.permutations(range(4)))),
    "padding": "left" if kind == "ring" else draw(st.sampled_from(["left", "right"])),
    "lengths": draw(st.tuples(st.integers(5, PROMPT), st.integers(5, PROMPT))),
    "packed": draw(st.booleans()),
    "parts": tuple(parts),
    "kernel": draw(st.sampled_from(["dot_product", "ragged"])),
  }


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_any_cache_given_tokens_in_any_parts_is_one_pass(examples):
  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(cases())
  def run(case):
    check(**case)
    if next(count) % 20 == 0:
      forget_programs()  # each case compiles its own, and a process has room for so many only

  count = itertools.count(1)
  run()


def test_a_layer_that_sees_less_keeps_less():
  assert type(bounded(SIZE, ROWS, LENGTH, PLAIN, None)) is DenseCache
  assert type(bounded(SIZE, ROWS, LENGTH, PLAIN, LENGTH)) is DenseCache
  near = bounded(SIZE, ROWS, LENGTH, PLAIN, 5)
  assert type(near) is RingCache and near.slots == 5


def test_keys_and_values_may_have_heads_and_widths_of_their_own():
  cache = DenseCache.empty(Size(3, (1, 16), (1, 4)), 2, 7, Storage(jnp.bfloat16))
  assert cache.store.keys.shape == (3, 2, 7, 1, 16)
  assert cache.store.values.shape == (3, 2, 7, 1, 4)


def test_a_prompt_and_what_follows_are_stored_each_in_its_own_way():
  storages = Storage(jnp.float32, order=(1, 2, 0, 3)), Storage(jnp.bfloat16, QUANTS["int8"])
  cache = PromptCache.empty(SIZE, ROWS, (PROMPT, 4), storages)
  assert cache.prompt.store.keys.data.shape == (2, PROMPT, 2, ROWS, 8)
  assert cache.generated.store.keys.data.shape == (2, ROWS, 4, 2, 8)
  assert cache.generated.store.keys.data.dtype == jnp.int8


@pytest.mark.parametrize(
  "build, problem",
  [
    (lambda: (0, 4), "max_prefill_predict_length: 0 slots: leave at least one"),
    (lambda: (4, 0), "max_target_length: 0 slots: leave at least one"),
  ],
)
def test_a_part_without_slots_is_refused(build, problem):
  with pytest.raises(ConfigError, match=problem):
    PromptCache.empty(SIZE, ROWS, build(), (PLAIN, PLAIN))


@pytest.mark.parametrize(
  "kind, problem",
  [
    ("dense", "slots: 34 .* the 33 slots"),
    ("prompt", "^max_prefill_predict_length: 34 tokens .* its 11 slots; raise it"),
  ],
)
def test_more_tokens_at_once_than_slots_are_refused(kind, problem):
  cache = KINDS[kind](PLAIN, None).at(0)
  like = jax.ShapeDtypeStruct
  k, v = like((ROWS, LENGTH + 1, 2, 8), jnp.float32), like((ROWS, LENGTH + 1, 2, 6), jnp.float32)
  mask = Mask.of(like((ROWS, LENGTH + 1), jnp.int32))
  with pytest.raises(ConfigError, match=problem):
    jax.eval_shape(lambda *args: cache.append(*args), k, v, mask)


def test_positions_far_beyond_a_window_are_true_ones():
  """A ring of five slots, given thirty-three tokens, holds the last five positions."""
  positions, segments = marks("left", (PROMPT, PROMPT))
  mask = Mask.of(positions, segments).narrow(5)
  _, cache = in_parts(KINDS["ring"](PLAIN, 5), tokens(), mask, (PROMPT,))
  held = np.sort(np.asarray(cache.store.positions.data), axis=-1)
  np.testing.assert_array_equal(held, np.broadcast_to(np.arange(28, 33), (2, ROWS, 5)))
