"""SentencePiece models and tiktoken files, beside the libraries that they belong to."""

import base64
import random
import sys

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public as published

from maxtext.data import sentencepiece_model, tiktoken_ranks
from maxtext.errors import DataError
from tests.data import vocabularies

PARTS = (
  "To be| |  |\n|\r\n|\t|é|日本|👍🏽|\u0301|<s>|</s>|<pad>|<unk>|'S|'ll|fortune|1234567|\u00a0"
)
PARTS = [*PARTS.split("|"), "<|endoftext|>", "?!/", "ǅʰ", "½", "TOo", "▁", "\x00", "  \n  "]


@pytest.fixture(scope="module")
def texts():
  draw = random.Random(0)
  return ["", *("".join(draw.choices(PARTS, k=draw.randrange(12))) for _ in range(500))]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request, tmp_path_factory):
  """A SentencePiece model as we read it, and its own processor."""
  path = vocabularies.sentencepiece_model(tmp_path_factory.mktemp("made"), request.param)
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
  return sentencepiece_model.load(str(path)), theirs


def test_a_model_gives_what_its_processor_gives(model, texts):
  ours, theirs = model
  want = [theirs.encode(text) for text in texts]
  assert [ours.encode(text) for text in texts] == want
  assert [ours.decode(ids) for ids in want] == [theirs.decode(ids) for ids in want]
  draw = random.Random(1)
  for _ in range(300):
    ids = draw.choices(range(ours.vocab_size), k=draw.randrange(9))
    assert ours.decode(np.array(ids, np.int32)) == theirs.decode(ids)
  found = (ours.vocab_size, ours.bos, ours.eos, ours.pad, ours.stops)
  assert found == (320, theirs.bos_id(), theirs.eos_id(), theirs.pad_id(), (theirs.eos_id(),))


def test_many_texts_are_encoded_as_each_is(model, texts):
  ours, _ = model
  ids, lengths = ours.encode_all(texts)
  each = np.split(ids, np.cumsum(lengths)[:-1])
  assert [part.tolist() for part in each] == [ours.encode(text) for text in texts]
  assert ids.dtype == np.int32 and [part.size for part in ours.encode_all([])] == [0, 0]


def test_no_text_has_a_control_symbol(model, texts):
  ours, _ = model
  assert not {ours.bos, ours.eos, ours.pad} & set(ours.encode_all(texts)[0].tolist())


def test_a_saved_model_is_the_same(model, tmp_path):
  model[0].save(tmp_path)
  again = sentencepiece_model.load(str(tmp_path / sentencepiece_model.FILE))
  assert again.digest == model[0].digest
  assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


def test_another_model_has_another_digest(tmp_path):
  digests = {
    sentencepiece_model.load(str(vocabularies.sentencepiece_model(tmp_path, kind))).digest
    for kind in ("bpe", "unigram")
  }
  assert len(digests) == 2


def truth(name, ranks, monkeypatch):
  """The library's own encoding of this name, with these ranks instead of a download."""
  monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *_, **__: ranks)
  return tiktoken.Encoding(**getattr(published, name)())


@pytest.mark.parametrize(
  "name, count, skip",
  [
    ("r50k_base", 50_256, ()),
    ("p50k_base", 50_280, (50_256,)),
    ("cl100k_base", 100_256, ()),
    ("o200k_base", 199_998, ()),
  ],
)
def test_published_layouts_are_known_by_their_number_of_ranks(
  tmp_path, texts, name, count, skip, monkeypatch
):
  ranks = vocabularies.ranks(count, skip)
  assert len(ranks) == count
  ours = tiktoken_ranks.load(str(vocabularies.tiktoken_file(tmp_path, ranks)))
  theirs = truth(name, ranks, monkeypatch)
  want = [theirs.encode(text, disallowed_special=()) for text in texts]
  assert [ours.encode(text) for text in texts] == want
  assert [ours.decode(ids) for ids in want] == texts
  assert (ours.layout, ours.eos, ours.stops) == (name, theirs.eot_token, (theirs.eot_token,))
  assert (ours.vocab_size, ours.bos, ours.pad) == (theirs.n_vocab, None, None)
  specials = list(theirs._special_tokens.values())
  assert ours.decode(specials) == theirs.decode(specials)


def test_llama3_is_known_by_its_number_of_ranks(tmp_path, texts, monkeypatch):
  ranks = vocabularies.ranks(128_000)
  ours = tiktoken_ranks.load(str(vocabularies.tiktoken_file(tmp_path, ranks)))
  pattern = truth("cl100k_base", vocabularies.ranks(300), monkeypatch)._pat_str
  theirs = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
  assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
  assert (ours.layout, ours.vocab_size) == ("llama3", 128_256)
  assert (ours.bos, ours.eos, ours.pad) == (128_000, 128_001, 128_004)
  assert ours.stops == (128_001, 128_008, 128_009)
  assert ours.decode([128_000, 128_006, 128_009, 128_011, 128_255]) == (
    "<|begin_of_text|><|start_header_id|><|eot_id|><|reserved_special_token_3|>"
    "<|reserved_special_token_247|>"
  )


def test_a_file_of_ones_own_is_cut_as_cl100k_and_ends_with_one_token(tmp_path, texts, monkeypatch):
  ranks = vocabularies.ranks(600)
  ours = tiktoken_ranks.load(str(vocabularies.tiktoken_file(tmp_path, ranks)))
  theirs = tiktoken.Encoding(
    "own",
    pat_str=truth("cl100k_base", vocabularies.ranks(300), monkeypatch)._pat_str,
    mergeable_ranks=ranks,
    special_tokens={"<|endoftext|>": 600},
  )
  want = [theirs.encode(text, disallowed_special=()) for text in texts]
  assert [ours.encode(text) for text in texts] == want
  ids, lengths = ours.encode_all(texts)
  assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == want
  draw = random.Random(1)
  for _ in range(300):
    ids = draw.choices(range(601), k=draw.randrange(9))
    assert ours.decode(np.array(ids, np.int32)) == theirs.decode(ids)
  assert (ours.layout, ours.bos, ours.eos, ours.pad) == ("own", None, 600, None)
  assert ours.vocab_size == 601


def test_saved_ranks_are_the_same_and_others_have_another_digest(tmp_path):
  first = tiktoken_ranks.load(str(vocabularies.tiktoken_file(tmp_path, vocabularies.ranks(600))))
  first.save(tmp_path)
  assert tiktoken_ranks.load(str(tmp_path / tiktoken_ranks.FILE)).digest == first.digest
  vocabularies.tiktoken_file(tmp_path, vocabularies.ranks(601))
  assert tiktoken_ranks.load(str(tmp_path / "ranks.tiktoken")).digest != first.digest


LINES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
BROKEN_RANKS = {
  "empty": ([], "is empty; copy it again"),
  "binary": ([b"\x0a\x0e\x00"], ":2: is no line of a token in base64 and its rank"),
  "padding": ([*LINES, b"YWI=a 256"], ":257: is no line of a token in base64"),
  "length": ([*LINES, b"YWIab 256"], ":257: is no line of a token in base64"),
  "token": ([*LINES, b"YW"], ":257: is no line of a token in base64"),
  "rank": ([*LINES, b"YWI= 25"], "two tokens have the same rank"),
  "twice": ([*LINES, b"YQ== 256"], ":257: the token has a rank above already"),
  "gap": ([*LINES, b"YWI= 257"], "no token has the rank 256"),
  "byte": ([LINES[0], LINES[1]], "no token is the byte 2"),
  "blank": ([b"", b""], "no token has the rank 0"),
}


@pytest.mark.parametrize("lines, words", BROKEN_RANKS.values(), ids=BROKEN_RANKS)
def test_broken_ranks_are_named_in_a_line(tmp_path, lines, words):
  file = tmp_path / "a.tiktoken"
  file.write_bytes(b"\n".join(lines))
  one_line(tiktoken_ranks, file, words)


@pytest.mark.parametrize(
  "damage, words",
  [
    (lambda content: b"", "is empty; copy it again"),
    (lambda content: content[: len(content) // 2], "is cut short, or no SentencePiece model"),
    (lambda content: content[:-1], "is cut short, or no SentencePiece model"),
    (lambda content: b'{"a": 1}', "is cut short, or no SentencePiece model"),
    (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
  ],
  ids=["empty", "half", "last byte", "JSON", "pointer"],
)
def test_a_broken_model_is_named_in_a_line(tmp_path, damage, words):
  file = vocabularies.sentencepiece_model(tmp_path)
  file.write_bytes(damage(file.read_bytes()))
  one_line(sentencepiece_model, file, words)


def one_line(module, file, words):
  with pytest.raises(DataError) as refused:
    module.load(str(file))
  assert words in str(refused.value) and str(refused.value).startswith(str(file))
  assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
  "module, name", [(sentencepiece_model, "sentencepiece"), (tiktoken_ranks, "tiktoken")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name):
  (tmp_path / "file").write_text("x")
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(DataError, match=f"the package {name} is not installed; pip install"):
    module.load(str(tmp_path / "file"))
