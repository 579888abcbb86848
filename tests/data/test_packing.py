"""What rows hold, compared with the documents themselves."""

import itertools
import sys

import grain
import numpy as np
import pytest
from grain import experimental
from hypothesis import given
from hypothesis import strategies as st

from maxtext.data.corpus import Tokens
from maxtext.data.packing import Ordered, Passes, Pieces, training_rows
from maxtext.data.pipeline import eval_batches, train_batches
from maxtext.data.plans import BINS
from tests.data.cases import PACKERS, corpus_of, numbered, section

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)
packers = st.sampled_from(PACKERS)


def columns(batches):
  """All batches one below the other: {column: [rows length]}."""
  found = list(batches)
  return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def pairs(table):
  """The (input, target) of every place that is not padding, in order of the input."""
  real = table["targets_segmentation"] > 0
  return sorted(zip(table["inputs"][real].tolist(), table["targets"][real].tolist()))


def all_pairs(tokens):
  """Every token of every document with the one that follows it there."""
  documents = [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts, tokens.starts[1:])]
  return sorted(pair for document in documents for pair in zip(document, document[1:]))


@given(lengths, packers, st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_an_epoch_holds_every_pair_of_neighbouring_tokens_once(
  sizes, packer, length, rows, shuffled
):
  data = section(packer, enable_data_shuffling=shuffled)
  tokens = numbered(sizes)
  table = columns(train_batches(corpus_of(tokens), data, rows, length))
  assert pairs(table) == all_pairs(tokens)


@given(lengths, packers, st.integers(2, 3))
def test_num_epoch_passes_hold_every_pair_so_often(sizes, packer, epochs):
  tokens = numbered(sizes)
  table = columns(train_batches(corpus_of(tokens), section(packer, num_epoch=epochs), 3, 8))
  assert pairs(table) == sorted(all_pairs(tokens) * epochs)


@given(lengths, packers)
def test_evaluation_holds_every_pair_of_the_held_out_documents_once(sizes, packer):
  corpus = corpus_of(numbered([5]), numbered(sizes))
  table = columns(eval_batches(corpus, section(packer, num_epoch=7), 3, 8))
  assert pairs(table) == all_pairs(corpus.eval)


@given(lengths, packers, st.integers(1, 12))
def test_targets_are_inputs_shifted_left_within_a_segment(sizes, packer, length):
  table = columns(train_batches(corpus_of(numbered(sizes)), section(packer), 4, length))
  segment = table["inputs_segmentation"]
  inside = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
  np.testing.assert_array_equal(table["targets"][:, :-1][inside], table["inputs"][:, 1:][inside])


@given(lengths, packers, st.integers(1, 12))
def test_segments_count_from_one_without_gaps_and_padding_comes_last(sizes, packer, length):
  table = columns(train_batches(corpus_of(numbered(sizes)), section(packer), 4, length))
  for row in table["inputs_segmentation"]:
    real = row[: np.count_nonzero(row)]
    assert (real > 0).all()
    assert set(np.diff(real, prepend=0)) <= {0, 1}


@given(lengths, packers, st.integers(1, 12))
def test_a_segment_is_a_run_of_one_document_with_positions_from_zero(sizes, packer, length):
  tokens = numbered(sizes)
  table = columns(train_batches(corpus_of(tokens), section(packer), 4, length))
  document = np.repeat(np.arange(len(sizes)), sizes)
  for inputs, segments, positions in zip(
    table["inputs"], table["inputs_segmentation"], table["inputs_position"]
  ):
    for segment in range(1, segments.max() + 1):
      run = inputs[segments == segment]
      np.testing.assert_array_equal(np.diff(run), 1)  # tokens are numbered
      assert len(set(document[run - 1])) == 1
      np.testing.assert_array_equal(positions[segments == segment], np.arange(run.size))


@given(lengths, packers, st.integers(1, 12))
def test_padding_is_zero_in_every_column_and_columns_of_a_pair_agree(sizes, packer, length):
  table = columns(train_batches(corpus_of(numbered(sizes)), section(packer), 4, length))
  padding = table["inputs_segmentation"] == 0
  assert not any(column[padding].any() for column in table.values())
  for name in ("position", "segmentation"):
    np.testing.assert_array_equal(table[f"inputs_{name}"], table[f"targets_{name}"])


@given(lengths, packers)
def test_every_batch_is_contiguous_int32_of_one_shape(sizes, packer):
  for batch in train_batches(corpus_of(numbered(sizes)), section(packer), 3, 8):
    assert {(c.shape, c.dtype.name, c.flags.c_contiguous) for c in batch.values()} == {
      ((3, 8), "int32", True)
    }


@given(lengths, st.integers(1, 12))
def test_concat_then_split_leaves_one_row_short(sizes, length):
  batches = train_batches(corpus_of(numbered(sizes)), section(), 1, length)
  filled = [np.count_nonzero(batch["inputs_segmentation"]) for batch in batches]
  assert sum(size < length for size in filled) <= 1


@given(lengths, st.sampled_from(["first_fit", "best_fit"]))
def test_a_document_that_fits_is_never_cut(sizes, packer):
  tokens = numbered(sizes)
  table = columns(train_batches(corpus_of(tokens), section(packer), 3, 39))
  for row in table["inputs_segmentation"]:
    found = np.bincount(row)[1:].tolist()
    assert all(size + 1 in sizes for size in found)


@pytest.mark.parametrize("packer", ["first_fit", "best_fit"])
@pytest.mark.parametrize("most", [1, 3])
def test_a_row_has_at_most_max_segments_per_seq_documents(packer, most):
  data = section(packer, max_segments_per_seq=most)
  table = columns(train_batches(corpus_of(numbered([3] * 40)), data, 4, 32))
  assert table["inputs_segmentation"].max() == most


@pytest.mark.parametrize("packer", PACKERS)
def test_a_document_is_cut_at_a_row_where_that_is_asked_for(packer):
  """It is as if the documents ended there."""
  sizes = (3, 30, 9, 12, 65)
  whole = numbered(sizes)
  short = Tokens(
    np.concatenate([whole.ids[a : min(b, a + 9)] for a, b in itertools.pairwise(whole.starts)]),
    np.cumsum([0, *(min(size, 9) for size in sizes)]),
  )
  rows = [
    training_rows(tokens, section(packer, use_truncation=cut), 8).take(99, slice(0, 99))
    for tokens, cut in ((whole, True), (short, False))
  ]
  np.testing.assert_array_equal(*rows)


def test_unpacked_rows_hold_one_document_each():
  table = columns(train_batches(corpus_of(numbered([5, 9, 3])), section(None), 2, 8))
  assert table["inputs_segmentation"].max() == 1


def rows_in_order(packer, **changes):
  tokens = numbered([41] * 25)
  return columns(train_batches(corpus_of(tokens), section(packer, **changes), 4, 10))["inputs"]


def test_rows_without_shuffling_follow_the_documents(packer):
  first = rows_in_order(packer, enable_data_shuffling=False)[:, 0]
  assert (np.diff(first[first > 0]) > 0).all()


def test_every_epoch_has_its_own_order(packer):
  both = rows_in_order(packer, num_epoch=2)
  if packer in (None, "concat_then_split"):
    first, second = both[:100], both[100:200]
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
  assert (both[:50] != both[100:150]).any()


def test_another_seed_is_another_order_and_the_same_seed_the_same(packer):
  one, same = rows_in_order(packer), rows_in_order(packer)
  other = rows_in_order(packer, data_shuffle_seed=1)
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


def test_no_epoch_of_one_seed_is_an_epoch_of_the_next():
  of_first = rows_in_order(None, num_epoch=3).reshape(3, -1)
  of_second = rows_in_order(None, num_epoch=3, data_shuffle_seed=1).reshape(3, -1)
  assert not any((a == b).all() for a in of_first for b in of_second)


def test_a_batch_mixes_documents(packer):
  """Neighbouring rows are of one document in the corpus, and must not be in a batch."""
  tokens = numbered([161] * 20)
  batch = next(train_batches(corpus_of(tokens), section(packer), 16, 10))
  documents = batch["inputs"][:, 0] // 161
  assert len(set(documents.tolist())) > 8  # 16 draws of 20 documents give 11 on average


@pytest.mark.parametrize("most", [-1, 2])
@pytest.mark.parametrize("name", ["first_fit", "best_fit"])
def test_rows_that_fit_are_those_of_grains_own_packers(name, most):
  """In their order too, and over several blocks of bins, whose last one is not full."""
  tokens = numbered(np.random.default_rng(0).integers(2, 40, 500).tolist())
  data = section(name, max_segments_per_seq=most, data_shuffle_seed=3)
  pieces = Ordered(Pieces(tokens, 24), Passes(3, 1))
  source = [
    {"ids": ids[:-1], "targets": ids[1:]} for ids in map(pieces.__getitem__, range(len(pieces)))
  ]
  pack = {
    "first_fit": experimental.FirstFitPackIterDataset,
    "best_fit": experimental.BestFitPackIterDataset,
  }[name]
  packed = pack(
    grain.MapDataset.source(source).to_iter_dataset(),
    length_struct={"ids": 24, "targets": 24},
    num_packing_bins=BINS,
    seed=3,
    max_sequences_per_bin=None if most == -1 else most,
  )
  columns_of = ("ids", "targets", "ids_segment_ids", "ids_positions")
  expected = [np.stack([row[name] for name in columns_of]) for row in packed]
  rows = training_rows(tokens, data, 24).take(len(expected) + 9, slice(0, sys.maxsize))
  assert len(expected) > 2 * BINS
  np.testing.assert_array_equal(rows, expected)
