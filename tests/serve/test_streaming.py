"""Text comes token by token, in whole characters, and all of it."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from maxtext.data import huggingface, sentencepiece_model, tiktoken_ranks
from maxtext.data.bpe import Bpe
from maxtext.data.tokenizers import ByteTokenizer
from maxtext.serve.streaming import BROKEN, TextStream
from tests.data import vocabularies

TEXT = "añ€😀 e\u0301 日本\nلا \u200d👩\u200d🚀."


def bpe():
  """Byte-level tokens without merges, in a shuffled order: a character is up to four of them."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  random.Random(0).shuffle(alphabet)
  vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i for i, c in enumerate(alphabet, 3)}
  made = tokenizers.Tokenizer(models.BPE(vocab, []))
  made.add_special_tokens(["<pad>", "<bos>", "<eos>"])
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  return Bpe(made, {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"})


def words():
  """Whole words, whose decoder drops the space in front of the first."""
  vocab = {"<unk>": 0, "▁to": 1, "▁be": 2, "▁or": 3, "▁not": 4}
  made = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  return Bpe(made, {"bos": None, "eos": None, "pad": None})


def pieces(tokenizer, prompt, ids):
  stream = TextStream(tokenizer, prompt)
  return [*(stream.push(id) for id in ids), stream.finish()]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("prompt", ["", "Ω: "])
def test_only_whole_characters_come_and_together_they_are_the_text(tokenizer, prompt):
  out = pieces(tokenizer, tokenizer.encode(prompt), tokenizer.encode(TEXT))
  assert "".join(out) == TEXT and not any(BROKEN in piece for piece in out)
  assert max(map(len, out)) == 1  # none is kept longer than it must be


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()], ids=["bytes", "bpe"])
def test_bytes_that_are_no_text_come_as_they_decode(tokenizer):
  draw = random.Random(1)
  for _ in range(50):
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(40)]
    assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
  ids = ByteTokenizer().encode("a€")[:-1]
  assert pieces(ByteTokenizer(), [], ids) == ["a", "", "", BROKEN]


def test_bytes_that_cannot_become_a_character_are_held_back_no_longer_than_one_could_take():
  out = pieces(ByteTokenizer(), [], [0x80 + 3] * 6)
  assert out == ["", "", "", 3 * BROKEN, BROKEN, BROKEN, BROKEN]


def test_special_tokens_give_nothing():
  tokenizer = ByteTokenizer()
  ids = [*tokenizer.encode("ab"), 2, 0, *tokenizer.encode("€")]
  assert "".join(pieces(tokenizer, [1], ids)) == "ab€"


def test_spaces_between_words_are_kept():
  tokenizer = words()
  out = pieces(tokenizer, tokenizer.encode("to be"), [3, 4, 1, 2])
  assert out == [" or", " not", " to", " be", ""]


KINDS = {
  "byte_level": lambda folder: huggingface.load(str(vocabularies.huggingface(folder))),
  "byte_fallback": lambda folder: huggingface.load(
    str(vocabularies.huggingface(folder, "byte_fallback"))
  ),
  "sentencepiece": lambda folder: sentencepiece_model.load(
    str(vocabularies.sentencepiece_model(folder))
  ),
  "tiktoken": lambda folder: tiktoken_ranks.load(
    str(vocabularies.tiktoken_file(folder, vocabularies.ranks(600)))
  ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "To be", "😀"])
def test_tokenizers_of_others_give_whole_characters_and_all_of_them(tmp_path, kind, prompt):
  """Also where a decoder gives U+FFFD for each byte, or takes back the characters before."""
  tokenizer, text = KINDS[kind](tmp_path), TEXT + "😀🚀日本 to be" + "é" * 9
  ids = tokenizer.encode(prompt + text)
  before = tokenizer.encode(prompt)
  assert ids[: len(before)] == before
  out = pieces(tokenizer, before, ids[len(before) :])
  whole, shown = tokenizer.decode(ids), tokenizer.decode(before)
  assert "".join(out) == whole[len(shown) :] and whole.startswith(shown)
  assert not any(BROKEN in piece for piece in out) and out[-1] == ""


def test_special_tokens_of_hugging_face_are_shown_as_they_are_written(tmp_path):
  tokenizer = KINDS["byte_level"](tmp_path)
  ids = tokenizer.encode("a<|im_start|>b é<s>")
  assert "".join(pieces(tokenizer, [tokenizer.bos], ids)) == "a<|im_start|>b é<s>"
