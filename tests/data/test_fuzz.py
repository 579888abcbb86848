"""Mutated files: documents, or a line that says what is wrong; no other end, and no hang."""

import functools

import numpy as np
import pytest

from maxtext.data.corpus import open_corpus
from maxtext.errors import DataError
from tests.data import shards
from tests.data.shards import KINDS, batches, documents, streamed, texts, write
from tests.mutation import mutated

FORMS = [kind for kind in KINDS if kind != "text"]


@functools.cache
def whole(kind, folder):
  """A good file of a kind: its name and content."""
  write(folder / kind, kind, [texts(12)])
  (path,) = (folder / kind).iterdir()
  return path.name, path.read_bytes()


def read(folder, kind, seed):
  """What comes of a mutated file under both policies; raises what nobody should see."""
  random = np.random.default_rng([seed, FORMS.index(kind)])
  name, content = whole(kind, folder)
  place = folder / "mutated"
  place.mkdir(exist_ok=True)
  (place / name).write_bytes(mutated(content, random))
  ends = []
  for errors in ("stop", "0.5"):
    data = streamed(place / name, data_errors=errors, enable_data_shuffling=False)
    try:
      ends.append(documents(batches(data, 2, 512)))
    except DataError as error:
      line = str(error)
      assert "\n" not in line and name in line and len(line) < 500, line
      ends.append(None)
  if ends[0] is not None:
    assert ends[0] == ends[1]  # nothing is passed over where nothing is damaged
  (place / name).unlink()


@pytest.mark.parametrize("kind", FORMS)
def test_a_mutated_file_gives_documents_or_a_line(tmp_path, kind):
  for seed in range(25):
    read(tmp_path, kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMS)
def test_ten_thousand_mutated_files_give_documents_or_a_line(tmp_path, kind):
  for seed in range(1000, 3000):
    read(tmp_path, kind, seed)


def test_a_tf_example_of_random_bytes_is_no_document(tmp_path):
  random = np.random.default_rng(0)
  records = [b"\n" + random.bytes(int(random.integers(0, 40))) for _ in range(300)]
  good = shards.example(text=[b"the one that is"])
  shards.array_record(tmp_path / "a.array_record", [*records, good])
  data = streamed(tmp_path, data_errors="300")
  assert "the one that is" in documents(batches(data))
  assert len(open_corpus(data).train) == 301
