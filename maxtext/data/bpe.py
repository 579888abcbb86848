"""Byte-pair encoding: trained on the corpus and kept, or read from a tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from maxtext.data.cache import Cache
from maxtext.data.chat import Chat
from maxtext.data.errors import brief
from maxtext.data.tokenizers import joined, read, read_json, write
from maxtext.errors import DataError
from maxtext.log import log

FILE = "tokenizer.json"
# What the vocabularies in use call the token, the commonest first.
NAMES = {
  "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>"),
  "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]"),
  "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Between a visible ASCII character and ASCII whitespace the byte-level rule always cuts, and what
# follows the cut does not depend on what precedes it.
_CUT = re.compile(r"(?<=[!-~])(?=[ \t\r\n])")


Names = dict[str, str | None]  # bos, eos, pad -> the token


class Bpe:
  """A `tokenizers.Tokenizer` that never finds a special token in a text."""

  chat: Chat | None = None

  def __init__(self, tokenizer: tokenizers.Tokenizer, named: Names, vocab_size: int = 0):
    """`named` says what bos, eos and pad are called; `vocab_size` may be above the largest id."""
    tokenizer.encode_special_tokens = True  # `<eos>` in a text is five characters
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer, self._names = tokenizer, named
    ids = {role: tokenizer.token_to_id(name) if name else None for role, name in named.items()}
    self.bos, self.eos, self.pad = ids["bos"], ids["eos"], ids["pad"]
    self.stops: tuple[int, ...] = () if self.eos is None else (self.eos,)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    self.vocab_size = max(largest + 1, vocab_size)

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

  def save(self, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, each whole or not at all. Raises OSError."""
    config = {f"{role}_token": name for role, name in self._names.items()}
    write(folder / FILE, self._tokenizer.to_str().encode())
    write(folder / "tokenizer_config.json", json.dumps(config).encode())

  @functools.cached_property
  def digest(self) -> str:
    filler = next(id for id in (self.pad, self.eos, 0) if id is not None)
    content = f"{self._tokenizer.to_str()} {self.bos} {self.eos} {filler} {self.vocab_size}"
    return hashlib.sha256(content.encode()).hexdigest()

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """d texts -> ids [n], lengths [d]; each distinct word is encoded once, which is 5x faster."""
    if not self._splits_at_spaces:
      return joined(self._all(texts))
    index: dict[str, int] = {}
    words = [[index.setdefault(word, len(index)) for word in _CUT.split(text)] for text in texts]
    counts = np.fromiter(map(len, words), np.int64, len(words))
    order = np.fromiter(itertools.chain.from_iterable(words), np.int64, counts.sum())  # [w]
    ids, sizes = joined(self._all(list(index)))
    starts = np.cumsum(sizes) - sizes
    lengths = sizes[order]
    ends = np.cumsum(lengths)
    shift = np.repeat(starts[order] - (ends - lengths), lengths)
    total = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(counts)])]
    return ids[np.arange(len(shift)) + shift], np.diff(total)

  def _all(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  @functools.cached_property
  def _splits_at_spaces(self) -> bool:
    """Whether _CUT holds: the byte-level rule alone decides where a token may end."""
    rules = json.loads(self._tokenizer.to_str())
    split = rules["pre_tokenizer"] or {}
    return (
      rules["normalizer"] is None
      and {key: split.get(key) for key in _BYTE_LEVEL} == _BYTE_LEVEL
      and all(token["special"] for token in rules["added_tokens"])
    )


def train(texts: Sequence[str], vocab_size: int, cache: Cache, key: str) -> Bpe:
  """A byte-level BPE of these texts, whose digest is `key`: the one kept if there is one."""
  key = hashlib.sha256(f"{key} {vocab_size} {tokenizers.__version__}".encode()).hexdigest()
  named: Names = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
  if path := cache.find("bpe", key, ".json"):
    return Bpe(tokenizers.Tokenizer.from_file(str(path)), named, vocab_size)
  began = time.monotonic()
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=["<pad>", "<bos>", "<eos>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  cache.keep("bpe", key, ".json", tokenizer.to_str(pretty=True).encode())
  found = tokenizer.get_vocab_size()
  log.info("trained a BPE of %d tokens in %.1f s", found, time.monotonic() - began)
  if found < vocab_size:
    log.warning(
      "tokenizer_vocab_size=%d: the corpus gives %d tokens only; no text has the others",
      vocab_size,
      found,
    )
  return Bpe(tokenizer, named, vocab_size)


def load(path: str) -> Bpe:
  """The tokenizer of a tokenizer.json, or of the folder that holds one. Raises DataError.

  Its bos, eos and pad are what a tokenizer_config.json beside it says, else the usual names.
  """
  file = find(path)
  tokenizer = parse(file, read(file))
  return Bpe(tokenizer, name(tokenizer, read_json(file.with_name("tokenizer_config.json"))))


def find(path: str) -> Path:
  """The tokenizer.json that `path` names, or that its folder holds. Raises DataError."""
  file = Path(path).expanduser()
  if not file.is_dir():
    return file
  if not (file / FILE).is_file():
    raise DataError(f"{path}: holds no {FILE}; name a folder that does, or the file itself")
  return file / FILE


def parse(file: Path, content: bytes) -> tokenizers.Tokenizer:
  """What a tokenizer.json holds. Raises DataError, which names the file."""
  try:
    return tokenizers.Tokenizer.from_str(content.decode())
  except Exception as error:  # the library raises no narrower class
    problem = f"is cut short, or no file of the tokenizers library: {brief(error)}; copy it again"
    raise DataError(f"{file}: {problem}") from None


def name(tokenizer: tokenizers.Tokenizer, written: Mapping[str, Any]) -> Names:
  """What bos, eos and pad are called: as a tokenizer_config.json writes, else the usual names."""
  usual: Names = {
    role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
    for role, names in NAMES.items()
  }
  for role in usual:
    if f"{role}_token" in written:
      token = written[f"{role}_token"]
      usual[role] = token["content"] if isinstance(token, dict) else token
  return usual
