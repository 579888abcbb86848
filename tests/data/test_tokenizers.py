"""Text there and back, and tokenizers that are kept."""

import json
import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from maxtext.data import bpe
from maxtext.data.cache import Cache
from maxtext.data.tokenizers import ByteTokenizer
from maxtext.errors import DataError

TEXTS = [
  "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n",
  "The slings and arrows of outrageous fortune,\n  Or to take arms against a sea of troubles\r\n",
] * 3


@pytest.fixture(scope="module")
def trained():
  return bpe.train(TEXTS, 320, Cache(""), "key")


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request, trained):
  return trained if request.param == "bpe" else ByteTokenizer()


# Text with much of what decides where tokens end: spaces, line ends, quotes, special tokens.
tricky = st.lists(
  st.one_of(
    st.text(),
    st.sampled_from(
      [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\u00a0", "\u2028", "'s", "'tis", "to be"]
    ),
    st.sampled_from(["<pad>", "<bos>", "<eos>", "é", "👍🏽", "\x00", "12", "_", "!!"]),
  ),
  max_size=12,
).map("".join)


@given(tricky)
def test_any_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(0 <= id < tokenizer.vocab_size for id in ids)


@given(tricky)
def test_no_text_encodes_to_a_special_token(tokenizer, text):
  assert not {tokenizer.pad, tokenizer.bos, tokenizer.eos} & set(tokenizer.encode(text))


@given(st.lists(tricky, max_size=6))
def test_encoding_many_texts_equals_encoding_each(tokenizer, texts):
  ids, lengths = tokenizer.encode_all(texts)
  assert ids.dtype == np.int32 and len(lengths) == len(texts)
  each = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
  assert [part.tolist() for part in each] == [tokenizer.encode(text) for text in texts]


@given(st.lists(st.integers(0, 319), max_size=20))
def test_any_ids_decode_and_special_tokens_give_nothing(tokenizer, ids):
  between = [token for id in ids for token in (tokenizer.bos, id, tokenizer.pad)]
  assert tokenizer.decode(between) == tokenizer.decode(ids)
  assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(ids)


def test_bytes_are_the_utf8_bytes_after_three_special_tokens():
  assert ByteTokenizer().encode("é") == [0xC3 + 3, 0xA9 + 3]
  assert ByteTokenizer().vocab_size == 259


def test_a_bpe_merges_what_is_frequent_in_the_texts(trained):
  ids, _ = trained.encode_all(TEXTS)
  assert len(ids) < 0.75 * sum(map(len, TEXTS))


def test_training_twice_gives_the_same_tokenizer():
  one, other = (bpe.train(TEXTS, 320, Cache(""), "key") for _ in range(2))
  assert one.digest == other.digest


def test_a_vocabulary_that_the_texts_cannot_fill_keeps_its_size(caplog):
  small = bpe.train(["ab"], 1000, Cache(""), "key")
  assert small.vocab_size == 1000
  assert "tokenizer_vocab_size=1000: the corpus gives 260 tokens only" in caplog.text


def test_a_kept_tokenizer_is_read_and_not_trained_again(tmp_path, monkeypatch):
  first = bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  monkeypatch.delattr(bpe, "trainers")
  again = bpe.train(["other text"], 320, Cache(str(tmp_path)), "key")
  assert again.digest == first.digest


@pytest.mark.parametrize("key, size", [("key", 319), ("another key", 320)])
def test_other_texts_or_sizes_are_trained_apart(tmp_path, key, size):
  bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  bpe.train(TEXTS, size, Cache(str(tmp_path)), key)
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_tokenizer_is_warned_of_and_trained_again(tmp_path, caplog, damage):
  first = bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  (file,) = tmp_path.iterdir()
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
  again = bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  assert again.digest == first.digest
  assert f"{file} is damaged" in caplog.text
  assert Cache(str(tmp_path)).find("bpe", file.name.split("-")[1], ".json") == file


def test_a_kept_tokenizer_is_a_tokenizer_json(tmp_path):
  first = bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  (file,) = tmp_path.iterdir()
  read = bpe.load(str(file))
  assert (read.digest, read.bos, read.eos, read.pad) == (first.digest, 1, 2, 0)


def test_a_saved_tokenizer_is_the_same_when_loaded(tmp_path, trained):
  trained.save(tmp_path)
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    read = bpe.load(str(path))
    assert (read.bos, read.eos, read.pad) == (trained.bos, trained.eos, trained.pad)
    assert read.digest == trained.digest
  assert sorted(file.name for file in tmp_path.iterdir()) == [
    "tokenizer.json",
    "tokenizer_config.json",
  ]


def test_a_saved_tokenizer_keeps_what_its_special_tokens_are_called(tmp_path):
  config = {"bos_token": None, "eos_token": "<|end|>"}
  read = bpe.load(str(foreign(tmp_path, ("<s>", "<|end|>"), config)))
  (tmp_path / "again").mkdir()
  read.save(tmp_path / "again")
  again = bpe.load(str(tmp_path / "again"))
  assert (again.bos, again.eos, again.digest) == (None, 4, read.digest)


def test_nothing_half_written_is_left_or_found(tmp_path, monkeypatch, caplog):
  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", fail)
    bpe.train(TEXTS, 320, Cache(str(tmp_path)), "key")
  assert "is not kept: No space left on device" in caplog.text
  assert list(tmp_path.iterdir()) == []


def foreign(folder, special=("<s>", "</s>"), config=None):
  """A tokenizer.json as others write them: a normalizer, other rules, a template, truncation."""
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?")
  )
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(list(special))
  tokenizer.enable_truncation(2)
  tokenizer.save(str(folder / "tokenizer.json"))
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def test_a_tokenizer_json_is_read_by_path_or_folder(tmp_path):
  foreign(tmp_path)
  for path in (tmp_path, tmp_path / "tokenizer.json"):
    read = bpe.load(str(path))
    assert (read.bos, read.eos, read.pad, read.vocab_size) == (3, 4, None, 5)
    assert read.encode("Hello world hello hello") == [0, 1, 0, 0]
    ids, lengths = read.encode_all(["World", "hello Hello world"])
    assert (ids.tolist(), lengths.tolist()) == ([1, 0, 0, 1], [1, 3])


def test_tokenizer_config_names_the_special_tokens(tmp_path):
  config = {"bos_token": None, "eos_token": {"content": "<|end|>"}}
  read = bpe.load(str(foreign(tmp_path, ("<s>", "<|end|>"), config)))
  assert (read.bos, read.eos) == (None, 4)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(DataError, match="tokenizer.json: ") as caught:
    bpe.load(str(tmp_path / "tokenizer.json"))
  assert "\n" not in str(caught.value)
  with pytest.raises(DataError, match="missing: cannot be read: No such file"):
    bpe.load(str(tmp_path / "missing"))
