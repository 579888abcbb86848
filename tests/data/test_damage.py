"""Damaged documents: counted and passed over up to a budget, or the end, never another mixture."""

import json
import os

import numpy as np
import pyarrow
import pytest

from maxtext.data.corpus import open_corpus
from maxtext.data.errors import Budget, Damaged
from maxtext.errors import DataError
from maxtext.log import log
from tests.data import shards
from tests.data.shards import batches, documents, streamed, texts, write

GOOD = [json.dumps({"text": text}).encode() for text in texts(6)]
BAD = {
  "cut short": (b'{"text": "a"', "not JSON"),
  "not UTF-8": (b'{"text": "na\xefve"}', "byte 0xef at 12 is not UTF-8"),
  "empty": (b'{"text": " "}', "the document is empty"),
  "no object": (b"[1, 2]", "not a JSON object, but a list"),
  "no text": (b'{"text": 5}', "'text' is a int, not text"),
  "half a pair": (b'{"text": "a\\ud800"}', "half of a surrogate pair"),
  "no column": (b'{"txt": "a"}', "no column 'text', did you mean 'txt'"),
  "deep": (b"[" * 100_000, "not JSON"),
  "ids too large": (b'{"text": [5, 259]}', "not of ids from 0 to 258"),
}


@pytest.mark.parametrize("form", ["jsonl", "arrayrecord"])
@pytest.mark.parametrize("name", BAD)
def test_a_damaged_record_is_named_and_passed_over_or_the_end(
  tmp_path, caplog, monkeypatch, name, form
):
  monkeypatch.setattr(log, "propagate", True)
  record, problem = BAD[name]
  records = [*GOOD[:3], record, *GOOD[3:]]
  if form == "jsonl":
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(records))
    where = f"{tmp_path}/a.jsonl:4 (byte {sum(map(len, GOOD[:3])) + 3}): "
  else:
    shards.array_record(tmp_path / "a.array_record", records)
    where = f"{tmp_path}/a.array_record: record 3: "
  with pytest.raises(DataError) as caught:
    list(batches(streamed(tmp_path)))
  said = str(caught.value)
  assert said.startswith(where) and problem in said and "data_errors=NUMBER" in said
  assert "\n" not in said and len(said) < 400
  found = documents(batches(streamed(tmp_path, data_errors="1")))
  assert sorted(found) == sorted(texts(6))
  assert any(where in line and "passed over, 1 of 1 allowed" in line for line in caplog.messages)


@pytest.mark.parametrize("setting, good", [("4", 96), ("0.04", 96), ("3", 0), ("0.03", 0)])
def test_a_budget_is_a_number_or_a_share_of_the_documents(tmp_path, setting, good):
  lines = [json.dumps({"text": text}) for text in texts(100)]
  for place in (3, 30, 60, 90):
    lines[place] = "{}"
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  data = streamed(tmp_path, data_errors=setting)
  if good:
    assert len(documents(batches(data))) == good
  else:
    with pytest.raises(DataError, match=f"with it 4 are damaged, data_errors={setting}"):
      list(batches(data))


def test_a_source_without_a_single_good_document_ends_the_run(tmp_path):
  (tmp_path / "a.jsonl").write_text("{}\n" * 9)
  with pytest.raises(DataError, match="train: none of 10 documents can be used"):
    next(batches(streamed(tmp_path, data_errors="1000000", num_epoch=-1)))


def test_a_share_of_more_than_a_pass_is_of_all_that_was_read():
  budget = Budget("0.01", 100)
  budget.skip(Damaged("a", "b"), 5)
  with pytest.raises(DataError):
    budget.skip(Damaged("a", "b"), 100)
  budget = Budget("0.01", 100)
  for read in (1, 101, 201):
    budget.skip(Damaged("a", "b"), read)


def test_what_is_passed_over_changes_no_share_of_a_mixture_and_is_in_the_state(tmp_path):
  write(tmp_path / "a", "jsonl", [texts(100)])
  lines = [json.dumps({"text": text}) if n % 2 else "{" for n, text in enumerate(texts(200, 500))]
  (tmp_path / "b.jsonl").write_text("\n".join(lines))
  files = f"{tmp_path}/a/*.jsonl,0.5;{tmp_path}/b.jsonl,0.5"
  running = batches(streamed(files, data_errors="200", num_epoch=-1))
  found = documents([next(running) for _ in range(40)])
  late = sum(int(text.split(":")[0]) >= 500 for text in found)
  assert len(found) > 30 and abs(late - len(found) / 2) <= 1
  place = running.state()["place"]
  assert place["skipped"] > 10 and abs(place["drawn"]["b"] if "b" in place["drawn"] else 0) >= 0
  assert f"{place['skipped']} documents passed over" in str(running)
  again = batches(streamed(files, data_errors=str(place["skipped"]), num_epoch=-1))
  again.restore(running.state())
  with pytest.raises(DataError, match=f"with it {place['skipped'] + 1} are damaged"):
    for _ in range(40):
      next(again)


@pytest.mark.parametrize("kind", ["arrayrecord", "parquet"])
def test_a_flipped_bit_is_found_with_its_record(tmp_path, kind):
  write(tmp_path, kind, [texts(200)])
  (path,) = tmp_path.iterdir()
  content = path.read_bytes()
  used = np.flatnonzero(np.frombuffer(content, np.uint8))
  place = content.find(b"100: ") if kind == "parquet" else used[len(used) // 2]
  content = bytearray(content)
  content[place] ^= 4
  path.write_bytes(content)
  with pytest.raises(DataError, match=f"{path.name}: (record|row) [0-9]+: "):
    list(batches(streamed(tmp_path)))
  found = documents(batches(streamed(tmp_path, data_errors="7")))  # a group of the Parquet file
  assert set(found) < set(texts(200)) and len(found) >= 193


def test_arrow_offsets_that_lead_nowhere_are_not_followed(tmp_path):
  write(tmp_path, "arrow", [["aaaa", "bbbb", "cccc"]])
  (path,) = tmp_path.iterdir()
  content = path.read_bytes()
  offsets = np.array([0, 4, 8, 12], "<i4").tobytes()
  assert content.count(offsets) == 1
  path.write_bytes(content.replace(offsets, np.array([0, 4, 2**30, 12], "<i4").tobytes()))
  with pytest.raises(DataError, match=r"part-000.arrow: row [0-9]: "):
    list(batches(streamed(tmp_path)))


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
def test_a_file_that_is_not_the_one_opened_any_more_is_noticed(tmp_path, how):
  files = write(tmp_path, "jsonl", [texts(200), texts(200, 200)])
  running = batches(streamed(files, enable_data_shuffling=False, num_epoch=-1))
  next(running)
  path = tmp_path / "part-001.jsonl"
  if how == "replaced":
    (tmp_path / "other").write_bytes(path.read_bytes())
    os.replace(tmp_path / "other", path)
  elif how == "written to":
    with path.open("ab") as file:
      file.write(b"\n")
  else:
    path.unlink()
  problem = "cannot be read any more" if how == "removed" else "was replaced or written to"
  with pytest.raises(DataError, match=f"part-001.jsonl:1 .*{problem}"):
    for _ in range(10_000):
      next(running)


def test_a_file_that_is_no_whole_file_of_its_kind_is_refused_when_it_is_opened(tmp_path):
  for kind, says in (("arrayrecord", "ArrayRecord"), ("parquet", "Parquet"), ("arrow", "Arrow")):
    files = write(tmp_path / kind, kind, [texts(50)])
    (path,) = (tmp_path / kind).iterdir()
    path.write_bytes(
      path.read_bytes()[: path.stat().st_size // 2] if kind != "arrow" else b"nothing"
    )
    with pytest.raises(DataError, match=f"{path.name}: is no whole {says} file: "):
      open_corpus(streamed(files))


def test_an_arrow_schema_is_of_the_file_and_not_of_its_name(tmp_path):
  table = pyarrow.table({"text": [1, 2]})
  with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
    file.write_table(table)
  with pytest.raises(DataError, match="a.arrow: row [01]: 'text' is a int, not text"):
    list(batches(streamed(tmp_path)))
