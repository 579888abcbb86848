"""The stream of batches is a function of seed and step alone: hosts, workers, stops, mixtures."""

import collections
import hashlib
import itertools
import json

import numpy as np
import pytest

from maxtext.data.corpus import open_corpus
from maxtext.data.pipeline import train_batches
from maxtext.errors import DataError
from tests.data.cases import PACKERS
from tests.data.shards import batches, documents, streamed, texts, write

ROWS, LENGTH, STEPS = 8, 48, 24


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
  """Three sources of other kinds, whose weights change with the steps: the file that says so."""
  folder = tmp_path_factory.mktemp("mixture")
  said = {
    "lines": {"path": write(folder / "a", "jsonl", [texts(50), texts(30, 50)]), "weight": 0.5},
    "rows": {
      "path": write(folder / "b", "parquet", [texts(70, 200)]),
      "weight": [[0, 0.5], [9, 2]],
    },
    "records": {"path": write(folder / "c", "tfds", [texts(40, 400)]), "weight": [[4, 0], [5, 1]]},
  }
  (folder / "mixture.json").write_text(json.dumps(said))
  return folder / "mixture.json"


def section(mixture, packer, **changes):
  changes = {"grain_train_mixture_config_path": str(mixture), "num_epoch": -1} | changes
  return streamed("", packer, eval_fraction=0.1, **changes)


def digest(columns):
  total = hashlib.sha256()
  for name in sorted(columns):
    total.update(np.ascontiguousarray(columns[name]).tobytes())
  return total.hexdigest()


def hashes(corpus, data, hosts, spans):
  """The sha256 of each batch, put together of what so many hosts read; states are JSON between.

  `spans` are steps; each goes on with the state of the one before it, and the hosts of its own.
  """
  found, state = [], None
  for count, steps in zip(hosts, spans):
    share = ROWS // count
    parts = [
      train_batches(corpus, data, ROWS, LENGTH, rows=slice(h * share, (h + 1) * share))
      for h in range(count)
    ]
    if state is not None:
      for part in parts:
        part.restore(json.loads(state))
    for _ in range(steps):
      columns = [next(part) for part in parts]
      found.append(digest({n: np.concatenate([c[n] for c in columns]) for n in columns[0]}))
    (state,) = {json.dumps(part.state()) for part in parts}  # that of one host is that of all
    for part in parts:
      part.close()
  return found


@pytest.mark.parametrize("packer", PACKERS)
def test_the_stream_is_the_same_for_any_hosts_and_when_they_change_in_mid_run(mixture, packer):
  data = section(mixture, packer)
  corpus = open_corpus(data)
  whole = hashes(corpus, data, [1], [STEPS])
  assert len(set(whole)) == STEPS
  for hosts in (2, 4, 8):
    assert hashes(corpus, data, [hosts], [STEPS]) == whole
  assert hashes(corpus, data, [4, 1, 8, 2], [5, 3, 9, STEPS - 17]) == whole
  other = section(mixture, packer, data_shuffle_seed=1)
  assert not set(hashes(open_corpus(other), other, [1], [STEPS])) & set(whole)


def test_the_stream_is_the_same_for_any_number_of_workers(mixture):
  found = []
  for workers in (0, 1, 3):
    data = section(mixture, "first_fit", grain_worker_count=workers)
    found.append(hashes(open_corpus(data), data, [1, 2], [7, 5]))
  assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_state_is_small_readable_and_goes_on_after_every_batch(mixture, packer):
  data = section(mixture, packer)
  corpus = open_corpus(data)
  whole = hashes(corpus, data, [1], [12])
  running = batches_of(corpus, data)
  for step in range(11):
    next(running)
    state = running.state()
    assert len(json.dumps(state)) < 700
    assert set(state["place"]["drawn"]) == {"lines", "rows", "records"}
    again = batches_of(corpus, data)
    again.restore(json.loads(json.dumps(state)))
    assert digest(next(again)) == whole[step + 1]
    again.close()


def batches_of(corpus, data):
  return train_batches(corpus, data, ROWS, LENGTH)


def test_shares_are_within_one_document_of_the_weights(tmp_path):
  a, b, c = (write(tmp_path / n, "jsonl", [texts(90, at)]) for n, at in zip("abc", (0, 100, 200)))
  data = streamed(f"{a},5; {b},3;{c},2", enable_data_shuffling=False, num_epoch=-1)
  numbers = [
    int(text.split(":")[0]) // 100 for text in documents(itertools.islice(batches(data), 60))
  ]
  assert len(numbers) > 70
  for count in range(1, len(numbers)):
    drawn = collections.Counter(numbers[:count])
    for source, weight in enumerate((0.5, 0.3, 0.2)):
      assert abs(drawn[source] - weight * count) < 1


def test_weights_follow_their_schedule(tmp_path):
  """All of a until step 4, half each on the line at step 6, all of b from step 8."""
  said = {
    "a": {"path": write(tmp_path / "a", "jsonl", [texts(200)]), "weight": [[4, 1], [8, 0]]},
    "b": {"path": write(tmp_path / "b", "jsonl", [texts(200, 500)]), "weight": [[4, 0], [8, 1]]},
  }
  (tmp_path / "mixture.json").write_text(json.dumps(said))
  path = str(tmp_path / "mixture.json")
  data = streamed("", None, grain_train_mixture_config_path=path, num_epoch=-1)
  shares = []
  for batch in itertools.islice(batches(data, 64, 400), 10):
    numbers = [int(text.split(":")[0]) for text in documents([batch])]
    shares.append(sum(number >= 500 for number in numbers) / len(numbers))
  assert shares[:5] == [0] * 5 and shares[8:] == [1, 1]
  np.testing.assert_allclose(shares[5:8], [0.25, 0.5, 0.75], atol=0.04)


def test_a_mixture_ends_when_its_first_source_does(tmp_path):
  a, b = (write(tmp_path / n, "jsonl", [texts(at, at)]) for n, at in (("a", 10), ("b", 91)))
  data = streamed(f"{a},1;{b},1", num_epoch=2)
  found = documents(batches(data))
  assert sum(text in texts(10, 10) for text in found) == 20
  assert len(found) in (39, 40)


WRONG = {
  "[]": "it is no object like",
  '{"a": {"path": "x"}}': "a: has not the two entries path and weight",
  '{"a": {"path": "x", "weight": -1}}': "-1.0 is no weight",
  '{"a": {"path": "x", "weight": [[5, 1], [2, 1]]}}': "a: the steps of weight do not rise",
  '{"a": {"path": "x", "weight": "much"}}': "could not convert",
  '{"a": ': "Expecting value",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_mixture_that_is_none_is_refused_with_its_file(tmp_path, content):
  (tmp_path / "mixture.json").write_text(content)
  path = str(tmp_path / "mixture.json")
  with pytest.raises(DataError, match=f"mixture.json: .*{WRONG[content]}"):
    open_corpus(streamed("", grain_train_mixture_config_path=path))
  with pytest.raises(DataError, match="did you mean 'mixture.json'"):
    open_corpus(
      streamed("", grain_train_mixture_config_path=path.replace("mixture.json", "mixtrue.json"))
    )


@pytest.mark.parametrize("files", ["a/*,x;b/*,1", "a/*;b/*", "a/*,-1;b/*,2"])
def test_an_inline_mixture_that_is_none_is_refused(files):
  with pytest.raises(DataError, match="is not PATTERN,WEIGHT"):
    open_corpus(streamed(files))


def test_weights_that_are_all_zero_are_refused(tmp_path):
  files = write(tmp_path, "jsonl", [texts(5)])
  with pytest.raises(DataError, match="all weights are 0 at step 0"):
    next(batches(streamed(f"{files},0;{tmp_path}/part-*.jsonl,0")))


def test_a_state_of_other_files_is_refused(tmp_path):
  files = write(tmp_path, "jsonl", [texts(50)])
  data = streamed(files, num_epoch=-1)
  state = batches(data).state()
  write(tmp_path, "jsonl", [texts(51)])
  with pytest.raises(DataError, match="documents, their split or their tokens are not"):
    batches(data).restore(state)
