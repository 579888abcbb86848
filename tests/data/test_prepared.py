"""`python -m maxtext.prepare`: tokens written once, read by runs that tokenise nothing."""

import json
import shutil

import fsspec
import numpy as np
import pytest

from maxtext import prepare
from maxtext.data import feeds
from maxtext.data.corpus import open_corpus
from maxtext.data.pipeline import eval_batches, train_batches
from maxtext.data.records import ArrayRecords
from maxtext.errors import ConfigError, DataError
from tests.data.shards import batches, documents, streamed, texts, write


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source")
  return write(folder, "jsonl", [texts(90), texts(30, 90)])


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
  out = tmp_path_factory.mktemp("prepared") / "out"
  words = ["dataset_type=grain", f"grain_train_files={source}", "eval_fraction=0.1"]
  assert prepare.main([str(out), *words, "documents_per_file=50"]) == 0
  return out


def reading(folder, packer="concat_then_split", **changes):
  changes = {"grain_eval_files": f"{folder}/eval-*.array_record"} | changes
  return streamed(f"{folder}/train-*.array_record", packer, **changes)


def test_what_was_prepared_is_what_is_tokenised_on_the_way(made, source, packer):
  """In both splits, bit for bit, without a tokenizer's work, and on parts of the hosts' rows."""
  on_the_way = streamed(source, packer, eval_fraction=0.1, enable_data_shuffling=False)
  corpus = open_corpus(on_the_way)
  expected = list(train_batches(corpus, on_the_way, 4, 32))
  data = reading(made, packer, enable_data_shuffling=False)
  pairs = [
    (list(batches(data)), expected),
    (
      list(eval_batches(open_corpus(data), data, 4, 32)),
      list(eval_batches(corpus, on_the_way, 4, 32)),
    ),
  ]
  for found, wanted in pairs:
    assert len(found) == len(wanted) > 3
    for one, other in zip(found, wanted):
      assert one.keys() == other.keys()
      assert all((one[name] == other[name]).all() for name in one)
  half = train_batches(open_corpus(data), data, 4, 32, rows=slice(2, 4))
  np.testing.assert_array_equal(next(half)["inputs"], expected[0]["inputs"][2:])


def test_prepared_files_may_be_at_a_url(made, tmp_path):
  fsspec.filesystem("memory").put(f"{made}/*", "/prepared/")
  found = batches(reading("memory://prepared", dataset_cache_dir=str(tmp_path)))
  for one, other in zip(found, batches(reading(made)), strict=True):
    np.testing.assert_array_equal(one["inputs"], other["inputs"])


def test_text_is_prepared_too(tmp_path):
  for n, content in enumerate(texts(12)):
    (tmp_path / f"{n}.txt").write_text(content)
  assert prepare.main([str(tmp_path / "out"), f"dataset_path={tmp_path}", "eval_fraction=0"]) == 0
  found = documents(batches(streamed(f"{tmp_path}/out/train-*")))
  assert sorted(found) == sorted(texts(12))


def test_a_host_reads_only_the_documents_of_its_rows(made, monkeypatch):
  read = []
  whole = ArrayRecords.read
  monkeypatch.setattr(
    ArrayRecords,
    "read",
    lambda file, rows: read.extend((file.path, row) for row in rows) or whole(file, rows),
  )
  monkeypatch.setattr(feeds, "tokenised", None)
  data = reading(made)
  corpus = open_corpus(data)
  for hosts in (1, 4):
    read.clear()
    part = train_batches(corpus, data, 16, 64, rows=slice(0, 16 // hosts))
    count = sum(1 for _ in part)
    assert count > 3
    found = len(set(read))
    assert found == len(corpus.train) if hosts == 1 else found < len(corpus.train) / 2


def test_the_manifest_says_what_there_is(made):
  said = json.loads((made / "manifest.json").read_text())
  assert said["tokenizer"] == "bytes" and said["add_bos"] and said["add_eos"]
  shards = [name for name in said["files"] if name.endswith("array_record")]
  assert sorted(path.name for path in made.iterdir()) == sorted([*said["files"], "manifest.json"])
  assert sum(said["files"][name]["documents"] for name in shards) == 120
  length = sum(len(text) + 2 for text in texts(90) + texts(30, 90))
  assert sum(said["files"][name]["tokens"] for name in shards) == length


@pytest.fixture
def copy(made, tmp_path):
  shutil.copytree(made, tmp_path / "copy")
  return tmp_path / "copy"


def test_a_record_of_another_checksum_is_padding_in_its_place_or_the_end(copy):
  """The mixture and all other documents stay where they are."""
  (name,) = (path for path in copy.glob("train-00000*.index.npy"))
  index = np.load(name)
  index[7, 1] ^= 1
  np.save(name, index)
  manifest = json.loads((copy / "manifest.json").read_text())
  manifest["files"][name.name]["sha256"] = feeds.prepared.sha256(name)
  (copy / "manifest.json").write_text(json.dumps(manifest))
  data = reading(copy, None, enable_data_shuffling=False)
  with pytest.raises(DataError, match="train-00000.*: record 7: .* its checksum is another"):
    list(batches(data, 1, 400))
  data = reading(copy, None, enable_data_shuffling=False, data_errors="1")
  rows = list(batches(data, 1, 400))
  empty = [n for n, row in enumerate(rows) if not row["inputs"].any()]
  assert empty == [7]
  data = reading(copy, None, enable_data_shuffling=False, data_errors="1")
  assert len(list(batches(data, 1, 9))) > 200  # a document of several rows is damaged once


BROKEN = {
  "size": (lambda f: (f / "train-00000-of-00003.array_record").write_bytes(b"x"), "is no whole"),
  "index": (
    lambda f: (f / "train-00000-of-00003.array_record.index.npy").write_bytes(b"x"),
    "index.npy: has not the checksum that manifest.json says; prepare it again",
  ),
  "no index": (
    lambda f: (f / "train-00000-of-00003.array_record.index.npy").unlink(),
    "index.npy: cannot be read",
  ),
  "shard": (
    lambda f: (f / "train-00001-of-00003.array_record").unlink(),
    "train-00001-of-00003.array_record is missing, one of 3",
  ),
  "manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_not_what_was_prepared_are_refused(copy, name):
  act, problem = BROKEN[name]
  act(copy)
  with pytest.raises(DataError, match=problem):
    open_corpus(reading(copy))


def test_another_tokenizer_or_other_ends_are_refused(copy):
  with pytest.raises(DataError, match="was prepared with add_bos=True"):
    open_corpus(reading(copy, add_bos=False))
  said = json.loads((copy / "manifest.json").read_text())
  (copy / "manifest.json").write_text(json.dumps(said | {"tokenizer": "other"}))
  with pytest.raises(DataError, match="was prepared with another tokenizer; set tokenizer_type"):
    open_corpus(reading(copy))


def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(tmp_path, source, capsys):
  files = [f"grain_train_files={source}", "dataset_type=grain"]
  with pytest.raises(ConfigError, match="synthetic tokens need no preparation"):
    prepare.main([str(tmp_path / "out"), "dataset_type=synthetic"])
  with pytest.raises(ConfigError, match="documents_per_file: '0' is no whole number"):
    prepare.main([str(tmp_path / "out"), *files, "documents_per_file=0"])
  with pytest.raises(ConfigError, match="is there already"):
    prepare.main([str(tmp_path), *files])
  (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{')
  with pytest.raises(DataError, match="bad.jsonl:2"):
    prepare.main(
      [
        str(tmp_path / "out"),
        files[1],
        f"grain_train_files={tmp_path}/bad.jsonl",
        "eval_fraction=0",
      ]
    )
  assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
  assert prepare.main([]) == 2 and "usage" in capsys.readouterr().out


def test_the_configuration_is_loaded_as_for_training(tmp_path):
  with pytest.raises(ConfigError, match="did you mean 'grain_train_files'"):
    prepare.main([str(tmp_path / "out"), "grain_train_file=x"])
