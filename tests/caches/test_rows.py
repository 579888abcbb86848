"""Rows that go on by themselves: prefilled, continued, taken over and emptied one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtext.caches import Ledger, PagedCache, RowCache, Storage
from maxtext.errors import ConfigError
from maxtext.kernels import attend
from maxtext.masks import Mask
from maxtext.specs import CacheQuantSpec
from tests.caches.cases import HASTY, LAYERS, ROWS, SCORES, SIZE, assert_equal, one_pass, tokens

SLOTS, WINDOW = 16, 6
PLAIN = Storage(jnp.float32)
QUANT = Storage(jnp.float32, CacheQuantSpec("int8", "dkv"), order=(1, 0, 2, 3))


def paged(storage):
  cache = PagedCache.empty(SIZE, ROWS, 8, 4, 4, storage)
  return cache.paged([[7, 0, 2, 4], [1, 5, 6, 3]])


KINDS = {
  "rows": lambda storage: RowCache.empty(SIZE, ROWS, SLOTS, storage),
  "rings": lambda storage: RowCache.empty(SIZE, ROWS, WINDOW, storage, ring=True),
  "paged": paged,
}


def give(cache, arrays, positions, segments):
  """[l b t h k] of tokens given to every layer, and the cache with them."""
  mask, out = Mask.of(jnp.asarray(positions), jnp.asarray(segments)), []
  for layer in range(LAYERS):
    q, k, v = (x[layer] for x in arrays)
    cache, k, v, held = cache.at(jnp.int32(layer)).append(k, v, mask)
    out.append(attend("dot_product", q, k, v, held.narrow(WINDOW), SCORES))
  return jnp.stack(out), cache.at(None)


give = jax.jit(give, compiler_options=HASTY)


def part(row, begin, end, seed=0):
  """Tokens `begin` to `end` of a row alone: q, k, v [l 1 t heads k]."""
  return tuple(x[:, row : row + 1, begin:end] for x in tokens(seed))


def alone(row, length, seed=0, storage=PLAIN):
  """What a row's first tokens see in one pass: [l 1 t h k]."""
  mask = Mask.of(jnp.arange(length)[None]).narrow(WINDOW)
  return one_pass(part(row, 0, length, seed), mask, storage)


def at(begin, end):
  return np.arange(begin, end)[None], np.ones((1, end - begin), int)


@pytest.mark.parametrize("storage", [PLAIN, QUANT], ids=["plain", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_prefilled_continued_and_emptied_one_by_one(kind, storage):
  cache, slot = KINDS[kind](storage), jnp.int32(1)
  want, other = alone(1, 12, storage=storage), alone(0, 8, 1, storage)
  y, row = give(cache.row(1), part(1, 0, 5), *at(0, 5))
  assert_equal(y, want[:, :, :5])
  cache = jax.jit(lambda cache, row, slot: cache.insert(row, slot))(cache, row, slot)
  y, row = give(cache.row(0), part(0, 0, 7, 1), *at(0, 7))  # another prompt, in the other row
  assert_equal(y, other[:, :, :7])
  cache = cache.insert(row, 0)
  y, row = give(cache.row(1), part(1, 5, 9), *at(5, 9))  # the first is continued alone
  assert_equal(y, want[:, :, 5:9])
  cache = cache.insert(row, slot)
  both = [jnp.concatenate(pair, 1) for pair in zip(part(0, 7, 8, 1), part(1, 9, 10))]
  y, cache = give(cache, tuple(both), [[7], [9]], [[1], [1]])  # a step of both
  assert_equal(y, jnp.concatenate([other[:, :, 7:8], want[:, :, 9:10]], 1))
  cache = jax.jit(lambda cache, slot: cache.reset(slot))(cache, jnp.int32(0))
  y, row = give(cache.row(0), part(0, 0, 5), *at(0, 5))  # the emptied row begins anew
  assert_equal(y, alone(0, 5, storage=storage))
  y, _ = give(cache.insert(row, 0).row(1), part(1, 10, 12), *at(10, 12))
  assert_equal(y, want[:, :, 10:12])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_given_only_padding_stays_as_it_is(kind):
  cache = KINDS[kind](PLAIN)
  positions, segments = np.arange(4)[None].repeat(2, 0), np.array([[1] * 4, [0] * 4])
  _, after = give(cache, tuple(x[:, :, :4] for x in tokens()), positions, segments)
  jax.tree.map(np.testing.assert_array_equal, cache.row(1).written, after.row(1).written)
  assert after.written[:, 0].tolist() == [4] * LAYERS
  if kind != "paged":
    jax.tree.map(np.testing.assert_array_equal, cache.row(1), after.row(1))


def test_a_row_of_fewer_slots_may_be_inserted():
  short = RowCache.empty(SIZE, 1, 5, PLAIN)
  _, row = give(dataclasses.replace(short, fresh=True), part(1, 0, 5), *at(0, 5))
  cache = KINDS["rows"](PLAIN).insert(row.filled(), 1)
  y, _ = give(cache.row(1), part(1, 5, 7), *at(5, 7))
  assert_equal(y, alone(1, 7)[:, :, 5:])


@pytest.mark.parametrize(
  "row",
  [
    RowCache.empty(SIZE, 1, 5, QUANT),
    RowCache.empty(SIZE, 1, SLOTS + 1, PLAIN),
    RowCache.empty(SIZE, 2, 5, PLAIN),
    RowCache.empty(SIZE, 1, 5, PLAIN, ring=True),
  ],
)
def test_a_row_that_does_not_fit_is_refused(row):
  with pytest.raises(ConfigError, match="^insert: "):
    KINDS["rows"](PLAIN).insert(row, 0)


def test_pages_that_nobody_has_are_not_written():
  cache = paged(PLAIN).paged([[2, -1, -1, -1], [-1] * 4])
  arrays = tuple(x[:, :, :6] for x in tokens())
  _, after = give(cache, arrays, np.arange(6)[None].repeat(2, 0), np.ones((2, 6), int))
  touched = np.abs(np.asarray(after.pool.keys.data)).sum((0, 2, 3, 4)) > 0
  np.testing.assert_array_equal(np.flatnonzero(touched), [2])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20))))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_no_page_is_lost_or_given_to_two_rows(steps):
  """Tokens 0: the row's pages are freed."""
  ledger = Ledger(rows=3, pages=10, page=4, most=5)
  for row, count in steps:
    before = ledger.table.copy()
    if count == 0:
      ledger.free(row)
      before[row] = -1
    elif ledger.assign(row, count):
      had = (before[row] >= 0).sum()
      assert (ledger.table[row] >= 0).sum() == max(had, -(-count // 4))
      np.testing.assert_array_equal(ledger.table[row, :had], before[row, :had])
      before[row] = ledger.table[row]
    np.testing.assert_array_equal(ledger.table, before)
    given = ledger.table[ledger.table >= 0]
    assert len(set(given.tolist())) == len(given) == 10 - ledger.left


def test_a_row_never_gets_more_pages_than_it_may_have():
  ledger = Ledger(rows=1, pages=10, page=4, most=2)
  with pytest.raises(ConfigError, match="9 tokens are more than the 2 pages of 4"):
    ledger.assign(0, 9)
