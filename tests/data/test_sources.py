"""Documents read as they are needed: every kind of file, columns, globs, what is held out."""

import dataclasses
import json
import sys

import fsspec
import numpy as np
import pyarrow
import pytest

from maxtext.data.corpus import open_corpus
from maxtext.data.pipeline import eval_batches
from maxtext.errors import DataError
from tests.data import shards
from tests.data.shards import KINDS, batches, documents, streamed, texts, write


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_document_of_every_kind_of_file_once(tmp_path, kind, shuffled):
  parts = [texts(40), texts(25, 40), texts(1, 65)]
  data = streamed(write(tmp_path, kind, parts), enable_data_shuffling=shuffled)
  found = documents(batches(data))
  whole = [text for part in parts for text in part]
  assert found != whole if shuffled else found == whole
  assert sorted(found) == sorted(whole)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_epoch_has_an_order_of_its_own(tmp_path, kind):
  data = streamed(write(tmp_path, kind, [texts(60)]), num_epoch=2)
  found = documents(batches(data))
  assert sorted(found[:60]) == sorted(found[60:]) == sorted(texts(60))
  assert found[:60] != found[60:]


def test_a_parquet_file_is_shuffled_over_few_groups_at_a_time(tmp_path):
  """So that a group is decoded about once, and not for each of its rows."""
  data = streamed(write(tmp_path, "parquet", [texts(280)]))
  found = documents(batches(data))
  groups = [int(text.split(":")[0]) // 7 for text in found]
  windows = [set(groups[at : at + 28]) for at in range(0, 280, 28)]
  assert all(len(window) == 4 for window in windows) and len(set(groups)) == 40
  assert groups != sorted(groups)


def test_columns_stand_one_below_the_other(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"q": "What?", "a": "That.", "n": 1}))
  data = streamed(tmp_path / "a.jsonl", train_data_columns=("q", "a"))
  assert documents(batches(data)) == ["What?\nThat."]


@pytest.mark.parametrize("form", ["jsonl", "tfds"])
def test_a_column_of_ids_is_taken_as_it_is(tmp_path, form):
  ids = [5, 250, 7, 258]
  if form == "jsonl":
    (tmp_path / "a.jsonl").write_text(json.dumps({"ids": ids}))
  else:
    shards.array_record(tmp_path / "a.array_record", [shards.example(ids=ids)])
  batch = next(batches(streamed(tmp_path, train_data_columns=("ids",)), 1, 8))
  assert batch["inputs"][0].tolist() == [5, 250, 7, 0, 0, 0, 0, 0]
  assert batch["targets"][0].tolist() == [250, 7, 258, 0, 0, 0, 0, 0]


def test_a_column_that_a_file_lacks_is_named_with_the_nearest(tmp_path):
  files = write(tmp_path, "parquet", [["a", "b"]])
  with pytest.raises(DataError, match="no column 'txt', did you mean 'text'"):
    open_corpus(streamed(files, train_data_columns=("txt",)))
  (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
  data = streamed(tmp_path / "a.jsonl", train_data_columns=("txt",))
  with pytest.raises(DataError, match=r"a.jsonl:1 \(byte 0\): no column 'txt', did you mean"):
    next(batches(data))


def test_files_of_tfds_are_known_by_their_names(tmp_path):
  for number in range(2):
    name = f"books-train.array_record-{number:05}-of-00002"
    shards.array_record(tmp_path / name, [shards.example(text=[f"book {number}".encode()])])
  assert sorted(documents(batches(streamed(tmp_path)))) == ["book 0", "book 1"]


def exported(folder, splits):
  """As TFDS writes a version of a dataset with file_format=array_record."""
  folder.mkdir(parents=True)
  (folder / "dataset_info.json").write_text('{\n "fileFormat": "array_record"\n}')
  (folder / "features.json").write_text('{\n "pythonClassName": "FeaturesDict"\n}')
  for split, parts in splits.items():
    for number, part in enumerate(parts):
      name = f"books-{split}.array_record-{number:05}-of-{len(parts):05}"
      records = [shards.example(text=[text.encode()], label=[n]) for n, text in enumerate(part)]
      shards.array_record(folder / name, records)


def test_a_folder_that_tfds_has_exported_is_its_records_of_one_split(tmp_path):
  exported(tmp_path / "one/1.0.0", {"train": [texts(5), texts(3, 5)]})
  found = documents(batches(streamed(tmp_path / "one/1.0.0")))
  assert sorted(found) == sorted(texts(5) + texts(3, 5))
  place = tmp_path / "books/1.0.0"
  exported(place, {"train": [texts(5)], "test": [texts(4, 90)]})
  with pytest.raises(DataError, match=r"name the files of one: books-test\.\*, books-train\.\*$"):
    open_corpus(streamed(place))
  data = streamed(place / "books-train.*", grain_eval_files=str(place / "books-test.*"))
  corpus = open_corpus(data)
  assert sorted(documents(batches(data))) == sorted(texts(5))
  assert sorted(documents(eval_batches(corpus, data, 2, 16))) == sorted(texts(4, 90))


def test_files_of_a_kind_are_what_hf_trains_and_evaluates_on(tmp_path):
  train, held = write(tmp_path / "a", "jsonl", [texts(9)]), write(tmp_path / "b", "jsonl", [["no"]])
  for name in ("", "json"):
    data = streamed("", dataset_type="hf", hf_path=name, hf_train_files=train, hf_eval_files=held)
    assert sorted(documents(batches(data))) == sorted(texts(9))
    assert documents(eval_batches(open_corpus(data), data, 2, 16)) == ["no"]
  with pytest.raises(DataError, match="part-000.jsonl: is no whole Parquet file"):
    open_corpus(dataclasses.replace(data, hf_path="parquet"))


def test_a_configuration_of_a_saved_dataset_is_a_folder_in_it(tmp_path):
  for name in ("en", "de"):
    saved(tmp_path / name / "train", [[f"{name} text"]])
  data = streamed("", dataset_type="hf", hf_path=str(tmp_path), hf_name="de")
  assert documents(batches(data)) == ["de text"]


def saved(folder, parts):
  """As `datasets.Dataset.save_to_disk` writes."""
  folder.mkdir(parents=True)
  names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
  for name, part in zip(names, parts):
    table = pyarrow.table({"text": part})
    with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
      stream.write_table(table)
  state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
  (folder / "state.json").write_text(json.dumps(state))


def test_a_saved_dataset_is_read_and_its_splits_are_what_is_evaluated(tmp_path):
  saved(tmp_path / "set/train", [texts(9), texts(9, 9)])
  saved(tmp_path / "set/test", [texts(4, 90)])
  (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  data = streamed("", dataset_type="hf", hf_path=str(tmp_path / "set"), eval_split="test")
  assert sorted(documents(batches(data))) == sorted(texts(9) + texts(9, 9))
  assert sorted(documents(eval_batches(open_corpus(data), data, 2, 16))) == sorted(texts(4, 90))
  with pytest.raises(DataError, match="holds several splits; name one of its folders: train, test"):
    open_corpus(streamed(tmp_path / "set"))


def test_what_is_held_out_is_not_trained_on_and_nothing_is_lost(tmp_path):
  files = write(tmp_path, "jsonl", [texts(100), texts(100, 100)])
  data = streamed(files, eval_fraction=0.1)
  corpus = open_corpus(data)
  held = documents(eval_batches(corpus, data, 4, 32))
  assert 8 < len(held) < 35
  assert sorted([*held, *documents(batches(data))]) == sorted(texts(100) + texts(100, 100))
  other = dataclasses.replace(data, data_shuffle_seed=5)
  assert documents(eval_batches(open_corpus(other), other, 4, 32)) == held
  assert f"{200 - len(held)} documents in 2 files, {len(held)} held out" in str(corpus)


def test_named_files_are_what_is_evaluated(tmp_path):
  train, held = write(tmp_path / "a", "jsonl", [texts(20)]), tmp_path / "b.jsonl"
  held.write_text(json.dumps({"body": "held out"}))
  data = streamed(train, grain_eval_files=str(held), eval_data_columns=("body",))
  corpus = open_corpus(data)
  assert documents(eval_batches(corpus, data, 2, 16)) == ["held out"]
  assert len(documents(batches(data))) == 20 and corpus.unigram_entropy() is None


def test_files_at_urls_are_copied_once_and_read(tmp_path):
  system = fsspec.filesystem("memory")
  for number in range(2):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(5, 5 * number))
    system.pipe(f"/bucket/{number}.jsonl", lines.encode())
  data = streamed("memory://bucket/*.jsonl", dataset_cache_dir=str(tmp_path))
  assert sorted(documents(batches(data))) == sorted(texts(5) + texts(5, 5))
  copies = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
  open_corpus(data)
  assert copies == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
  assert len(copies) == 2
  with pytest.raises(DataError, match="memory://bucket/x.jsonl: no file there matches"):
    open_corpus(dataclasses.replace(data, grain_train_files="memory://bucket/x.jsonl"))


def test_a_document_of_a_stream_is_cut_at_a_row_where_that_is_asked_for(tmp_path):
  data = streamed(write(tmp_path, "jsonl", [texts(30)]), None, use_truncation=True)
  inputs = np.concatenate([batch["inputs"] for batch in batches(data, 5, 16)])
  rows = sorted(bytes((row[row > 2] - 3).astype(np.uint8)).decode() for row in inputs)
  assert rows == sorted(text[:15] for text in texts(30))


REFUSED = {
  "absent": (FileNotFoundError("x"), "memory://[^ ]*: no file there matches$"),
  "denied": (PermissionError("Forbidden"), r"access is denied \(Forbidden\); give credentials"),
  "broken": (RuntimeError("no route\nto host"), "RuntimeError: no route$"),
}


@pytest.mark.parametrize("name", ["bucket/0.jsonl", "bucket/*.jsonl"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_a_store_refuses_is_a_line(tmp_path, monkeypatch, how, name):
  error, problem = REFUSED[how]

  def refuse(*args, **kwargs):
    raise error

  fsspec.filesystem("memory").pipe("/bucket/0.jsonl", b'{"text": "a"}')
  for method in ("info", "glob"):
    monkeypatch.setattr(type(fsspec.filesystem("memory")), method, refuse)
  with pytest.raises(DataError, match=problem):
    open_corpus(streamed(f"memory://{name}", dataset_cache_dir=str(tmp_path)))


@pytest.mark.parametrize(
  "pattern, name",
  [("gs://b/*.jsonl", "gcsfs"), ("s3://b/a.jsonl", "s3fs"), ("x.parquet", "pyarrow")],
)
def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, pattern, name):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, "parquet", [["a", "b"]])
  (tmp_path / "part-000.parquet").rename("x.parquet")
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(DataError, match=f"need the package {name}, .* pip install {name}"):
    open_corpus(streamed(pattern, dataset_cache_dir=str(tmp_path)))


WRONG = {
  "trian.jsonl": "no such file, and none matches, did you mean 'train.jsonl'?",
  "*.arrow": "no such file, and none matches",
  "train.csv": "does not say its kind; set grain_file_type",
  "empty.jsonl": "no record in any",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_names_no_documents_is_refused(tmp_path, name):
  (tmp_path / "train.jsonl").write_text('{"text": "a"}')
  (tmp_path / "train.csv").write_text("a")
  (tmp_path / "empty.jsonl").write_text("\n")
  with pytest.raises(DataError, match=WRONG[name].replace("?", r"\?")):
    open_corpus(streamed(tmp_path / name))


def test_a_shard_that_is_missing_is_named_unless_the_pattern_leaves_it_out(tmp_path):
  for number in (0, 1, 3):
    (tmp_path / f"a-0000{number}-of-00004.jsonl").write_text(json.dumps({"text": f"is {number}"}))
  with pytest.raises(DataError, match="a-00002-of-00004.jsonl is missing, one of 4"):
    open_corpus(streamed(tmp_path / "*.jsonl"))
  assert len(documents(batches(streamed(tmp_path / "a-0000[01]-of-*.jsonl")))) == 2
  assert len(documents(batches(streamed(tmp_path / "a-00000-of-00004.jsonl")))) == 1


def test_a_batch_of_a_stream_mixes_documents(tmp_path):
  files = write(tmp_path, "jsonl", [texts(300)])
  batch = next(batches(streamed(files, None), 16, 400))
  first = [int(text.split(":")[0]) for text in documents([batch])]
  assert len(first) == 16 and np.ptp(first) > 100
