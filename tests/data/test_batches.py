"""Batches over time: resuming, hosts, reading ahead, ends."""

import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxtext.data import bpe
from maxtext.data.cache import Cache
from maxtext.data.corpus import open_corpus
from maxtext.data.pipeline import eval_batches, train_batches
from maxtext.errors import DataError
from tests.data import vocabularies
from tests.data.cases import PACKERS, corpus_of, numbered, section

ROWS, LENGTH = 4, 10
TOKENS = numbered([3, 41, 17, 8, 25, 60, 2, 33])


def kinds():
  """Every way to make rows, over several epochs: (section, corpus)."""
  for packer in PACKERS:
    data = section(packer, num_epoch=4)
    yield pytest.param(data, corpus_of(TOKENS, TOKENS), id=packer or "unpacked")
  data = section(dataset_type="synthetic", num_epoch=-1)
  yield pytest.param(data, open_corpus(data), id="synthetic")


KINDS = list(kinds())


def equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def take(batches, count):
  return list(itertools.islice(batches, count))


@pytest.mark.parametrize("data, corpus", KINDS)
def test_resuming_after_any_batch_equals_going_on(data, corpus):
  whole = take(train_batches(corpus, data, ROWS, LENGTH), 16)
  batches = train_batches(corpus, data, ROWS, LENGTH)
  states = [json.dumps(batches.state())]
  for _ in whole:
    next(batches)
    states.append(json.dumps(batches.state()))
  for done, state in enumerate(states[:-1]):
    resumed = train_batches(corpus, data, ROWS, LENGTH)
    resumed.restore(json.loads(state))
    assert json.dumps(resumed.state()) == state
    for one, other in zip(take(resumed, 2), whole[done:]):
      equal(one, other)


@pytest.mark.parametrize("data, corpus", KINDS)
def test_the_state_is_that_after_the_last_batch_returned(data, corpus):
  """Batches made ahead do not count: the state is the same however far the thread has got."""
  hurried, rested = (train_batches(corpus, data, ROWS, LENGTH) for _ in range(2))
  for _ in range(3):
    next(hurried), next(rested)
  time.sleep(0.1)
  assert hurried.state() == rested.state()
  before = json.dumps(rested.state())
  time.sleep(0.1)
  assert json.dumps(rested.state()) == before
  assert len(before) < 1000


@pytest.mark.parametrize("data, corpus", KINDS)
def test_a_state_is_not_changed_by_going_on(data, corpus):
  batches = train_batches(corpus, data, ROWS, LENGTH)
  next(batches)
  state = batches.state()
  before = json.dumps(state)
  take(batches, 5)
  assert json.dumps(state) == before


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("data, corpus", KINDS)
def test_the_hosts_rows_together_are_the_global_batch(data, corpus, hosts):
  share = ROWS // hosts
  parts = [
    take(train_batches(corpus, data, ROWS, LENGTH, rows=slice(h * share, (h + 1) * share)), 30)
    for h in range(hosts)
  ]
  whole = take(train_batches(corpus, data, ROWS, LENGTH), 30)
  assert {len(part) for part in parts} == {len(whole)}
  for batch, *shares in zip(whole, *parts):
    equal(batch, {name: np.concatenate([part[name] for part in shares]) for name in batch})


@pytest.mark.parametrize("data, corpus", KINDS)
def test_a_state_may_be_restored_on_other_hosts_and_with_another_batch(data, corpus):
  rows = np.concatenate(
    [batch["inputs"] for batch in take(train_batches(corpus, data, ROWS, LENGTH), 8)]
  )
  half = train_batches(corpus, data, ROWS, LENGTH, rows=slice(2, 4))
  take(half, 3)
  resumed = train_batches(corpus, data, 2 * ROWS, LENGTH)
  resumed.restore(half.state())
  np.testing.assert_array_equal(next(resumed)["inputs"], rows[3 * ROWS : 5 * ROWS])


def test_the_data_ends_with_stop_iteration_and_stays_ended(packer):
  batches = train_batches(corpus_of(TOKENS), section(packer), ROWS, LENGTH)
  count = len(list(batches))
  assert count >= TOKENS.ids.size // (ROWS * LENGTH)
  with pytest.raises(StopIteration):
    next(batches)
  ended = train_batches(corpus_of(TOKENS), section(packer), ROWS, LENGTH)
  ended.restore(batches.state())
  with pytest.raises(StopIteration):
    next(ended)


def test_num_epoch_minus_one_does_not_end(packer):
  batches = train_batches(corpus_of(numbered([5, 6])), section(packer, num_epoch=-1), ROWS, LENGTH)
  assert len(take(batches, 50)) == 50


def test_each_evaluation_reads_the_same(packer):
  corpus = corpus_of(numbered([4]), TOKENS)
  first = list(eval_batches(corpus, section(packer), ROWS, LENGTH))
  again = list(eval_batches(corpus, section(packer, data_shuffle_seed=9), ROWS, LENGTH))
  assert len(first) == len(again)
  for one, other in zip(first, again):
    equal(one, other)


def test_evaluating_without_held_out_documents_is_refused():
  with pytest.raises(DataError, match="eval_fraction=0"):
    eval_batches(corpus_of(TOKENS), section(), ROWS, LENGTH)


CHANGES = {
  "dataset_path": (section(), corpus_of(TOKENS, fingerprint="b" * 64), LENGTH),
  "tokenizer_path": (
    section(),
    dataclasses.replace(corpus_of(TOKENS), tokenizer=bpe.train(["ab"], 300, Cache(""), "")),
    LENGTH,
  ),
  "max_target_length": (section(), corpus_of(TOKENS), LENGTH + 1),
  "data_shuffle_seed": (section(data_shuffle_seed=1), corpus_of(TOKENS), LENGTH),
  "enable_data_shuffling": (section(enable_data_shuffling=False), corpus_of(TOKENS), LENGTH),
  "grain_packing_type": (section("best_fit"), corpus_of(TOKENS), LENGTH),
  "packing": (section(None), corpus_of(TOKENS), LENGTH),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_state_of_other_data_is_refused(key):
  batches = train_batches(corpus_of(TOKENS), section(), ROWS, LENGTH)
  take(batches, 2)
  data, corpus, length = CHANGES[key]
  with pytest.raises(DataError, match="checkpoint"):
    train_batches(corpus, data, ROWS, length).restore(batches.state())


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_that_is_allowed_begins_the_data_anew(key):
  batches = train_batches(corpus_of(TOKENS), section(), ROWS, LENGTH)
  take(batches, 2)
  data, corpus, length = CHANGES[key]
  changed = train_batches(corpus, data, ROWS, length)
  changed.restore(batches.state(), changes=[key])
  equal(next(changed), next(train_batches(corpus, data, ROWS, length)))


def test_other_documents_in_the_tokens_of_another_tokenizer_are_refused():
  """A BPE is trained on the documents: to allow other documents is not to allow other ids."""
  batches = train_batches(corpus_of(TOKENS), section(), ROWS, LENGTH)
  _, other, _ = CHANGES["tokenizer_path"]
  other = dataclasses.replace(other, fingerprint="b" * 64)
  with pytest.raises(DataError, match="tokenizer.json in the run's folder"):
    train_batches(other, section(), ROWS, LENGTH).restore(batches.state(), ["dataset_path"])


FILES = {  # a tokenizer, and another one under the same name
  "huggingface": (
    vocabularies.huggingface,
    lambda path: vocabularies.byte_level(370).save(str(path / "tokenizer.json")),
  ),
  "sentencepiece": (
    vocabularies.sentencepiece_model,
    lambda path: vocabularies.sentencepiece_model(path.parent, "unigram"),
  ),
  "tiktoken": (
    lambda folder: vocabularies.tiktoken_file(folder, vocabularies.ranks(600)),
    lambda path: vocabularies.tiktoken_file(path.parent, vocabularies.ranks(590)),
  ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_tokenizer_that_became_another_under_its_name_is_refused(folder, tmp_path_factory, kind):
  place = tmp_path_factory.mktemp("made")
  make, change = FILES[kind]
  path = make(place)
  data = section(
    dataset_path=str(folder),
    tokenizer_type=kind,
    tokenizer_path=str(path),
    tokenizer_cache_dir=str(place / "cache"),
    add_bos=False,
    num_epoch=-1,
  )
  batches = train_batches(open_corpus(data), data, ROWS, LENGTH)
  take(batches, 2)
  again = train_batches(open_corpus(data), data, ROWS, LENGTH)  # from tokens that were kept
  again.restore(batches.state())
  equal(next(again), next(batches))
  change(path)
  changed = train_batches(open_corpus(data), data, ROWS, LENGTH)
  with pytest.raises(DataError, match="the tokenizer is not the checkpoint's"):
    changed.restore(batches.state())


def test_a_state_that_fewer_epochs_do_not_reach_is_refused(packer):
  batches = train_batches(corpus_of(TOKENS), section(packer, num_epoch=3), ROWS, LENGTH)
  take(batches, 12)
  with pytest.raises(DataError, match="num_epoch"):
    train_batches(corpus_of(TOKENS), section(packer), ROWS, LENGTH).restore(batches.state())


def test_closing_ends_the_thread(packer):
  batches = train_batches(corpus_of(TOKENS), section(packer, num_epoch=-1), ROWS, LENGTH)
  before = threading.active_count()
  next(batches)
  assert threading.active_count() == before + 1
  batches.close()
  assert threading.active_count() == before


@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_synthetic_rows_are_a_pure_function_of_seed_and_number(seed, length):
  data = section(dataset_type="synthetic", data_shuffle_seed=seed, num_epoch=-1)
  one, other = (train_batches(open_corpus(data), data, 2, length) for _ in range(2))
  first = next(one)
  equal(first, next(other))
  assert 0 <= first["inputs"].min() <= first["inputs"].max() < 259
  np.testing.assert_array_equal(first["targets"][:, :-1], first["inputs"][:, 1:])


def test_synthetic_tokens_are_uniform_and_no_two_rows_or_seeds_are_equal():
  rows = []
  for seed in (0, 1):
    data = section(dataset_type="synthetic", data_shuffle_seed=seed, num_epoch=-1)
    corpus = open_corpus(data)
    rows += [*next(train_batches(corpus, data, 64, 256))["inputs"]]
  rows += [*next(eval_batches(corpus, data, 64, 256))["inputs"]]
  assert len({row.tobytes() for row in rows}) == 3 * 64
  counts = np.bincount(np.ravel(rows), minlength=259)
  expected = counts.sum() / 259
  chi = ((counts - expected) ** 2 / expected).sum()
  assert chi < 258 + 5 * np.sqrt(
    2 * 258
  )  # mean and deviation of chi squared, 258 degrees of freedom
