"""Documents and tokenizer -> token arrays, and the fingerprint that a resumed run knows them by."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence

import numpy as np

from maxtext.data import bpe, documents, plays
from maxtext.data.cache import Cache
from maxtext.data.documents import Document
from maxtext.data.kinds import given
from maxtext.data.mixtures import Mixture, open_mixture
from maxtext.data.sections import Data
from maxtext.data.synthetic import Noise
from maxtext.data.tokenizers import ByteTokenizer, Tokenizer
from maxtext.errors import DataError

FORMAT = 1  # part of every key: raise it when the same settings begin to give other tokens
HELD_OUT_ROWS = 64  # of synthetic data


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """Documents one after the other: i is `ids[starts[i] : starts[i + 1]]`, two tokens or more."""

  ids: np.ndarray  # [n] int32
  starts: np.ndarray  # [d + 1] int64

  def __len__(self) -> int:
    return len(self.starts) - 1

  @property
  def targets(self) -> np.ndarray:
    """All tokens that a model has to predict: all but the first of each document."""
    return np.delete(self.ids, self.starts[:-1])

  def truncated(self, most: int) -> Tokens:
    """The first `most` tokens of each document."""
    sizes = np.diff(self.starts)
    place = np.arange(len(self.ids)) - np.repeat(self.starts[:-1], sizes)
    ends = np.cumsum([0, *np.minimum(sizes, most)])
    return Tokens(self.ids[place < most], ends)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """What a run reads: `train` and `eval` have no document in common."""

  tokenizer: Tokenizer
  train: Tokens | Noise | Mixture
  eval: Tokens | Noise | Mixture | None  # None: nothing is held out
  fingerprint: str  # sha256; equal fingerprints give equal tokens

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def unigram_entropy(self) -> float | None:
    """Nats per target: the evaluation loss of a model that knows only how often each token occurs.

    It has counted the targets of the training documents, and adds one to each count. A model that
    has learned more has a lower loss. None where the documents are not in memory to be counted.
    Raises DataError if nothing is held out.
    """
    if isinstance(self.train, Noise):
      return math.log(self.train.vocab_size)
    if isinstance(self.train, Mixture):
      return None
    held = held_out(self)
    assert isinstance(held, Tokens)
    counts = np.bincount(self.train.targets, minlength=self.vocab_size) + 1.0
    share = np.bincount(held.targets, minlength=self.vocab_size) / held.targets.size
    return float(share @ (math.log(counts.sum()) - np.log(counts)))

  def __str__(self) -> str:
    if isinstance(self.train, Noise):
      return f"corpus: random tokens below {self.vocab_size}"
    if isinstance(self.train, Mixture):
      held = len(self.eval) if isinstance(self.eval, Mixture) else 0
      return f"corpus: {self.train}, {held} held out"
    parts = [f"{len(self.train)} documents ({self.train.ids.size} tokens) to train on"]
    if isinstance(self.eval, Tokens):
      parts.append(f"{len(self.eval)} ({self.eval.ids.size}) held out")
    return f"corpus: {', '.join(parts)}"


def held_out(corpus: Corpus) -> Tokens | Noise | Mixture:
  """The held-out documents. Raises DataError if there are none."""
  if corpus.eval is None:
    raise DataError("eval_fraction=0: no document is held out to evaluate; set it above 0")
  return corpus.eval


def open_corpus(data: Data) -> Corpus:
  """Read, split and tokenise what the section names; what takes long is kept for the next run.

  Raises DataError, naming file and line, for what cannot be read, and ConfigError for a tokenizer
  without the bos or eos that the section adds.
  """
  if data.dataset_type == "synthetic":
    return _random(data)
  if data.dataset_type != "text":
    return _streamed(data)
  whole = documents.read(data.dataset_path, data.text_column) if data.dataset_path else plays.read()
  train, held = documents.hold_out(whole, data.eval_fraction)
  digests = documents.digest(train), documents.digest(held)
  cache = Cache(data.tokenizer_cache_dir)
  tokenizer = given(data)
  if tokenizer is None:
    texts = [document.text for document in train]
    tokenizer = bpe.train(texts, data.tokenizer_vocab_size, cache, digests[0])
  key = _sha256([FORMAT, *digests, tokenizer.digest, data.add_bos, data.add_eos])
  slow = data.tokenizer_type != "byte"
  kept = cache.find("tokens", key, ".npy") if slow else None
  if kept:
    parts = _unpacked(np.load(kept, mmap_mode="r"))
  else:
    parts = [_tokens(part, tokenizer, data) for part in (train, held)]
    if slow:
      cache.keep("tokens", key, ".npy", _packed(parts))
  return Corpus(tokenizer, parts[0], parts[1] if held else None, key)


def _random(data: Data) -> Corpus:
  tokenizer = given(data) or ByteTokenizer(data.tokenizer_vocab_size)
  size = tokenizer.vocab_size
  train = Noise(size, 1 + data.data_shuffle_seed)
  held = Noise(size, 0, HELD_OUT_ROWS)
  return Corpus(tokenizer, train, held, _sha256([FORMAT, "synthetic", size]))


def _streamed(data: Data) -> Corpus:
  tokenizer = given(data)
  assert tokenizer is not None  # the section demands one
  train, held, digest = open_mixture(data, tokenizer)
  settings = [tokenizer.digest, data.add_bos, data.add_eos, data.train_data_columns]
  return Corpus(tokenizer, train, held, _sha256([FORMAT, digest, *settings]))


def _tokens(part: Sequence[Document], tokenizer: Tokenizer, data: Data) -> Tokens:
  """Encode the documents, each between bos and eos as the section says."""
  ids, lengths = tokenizer.encode_all([document.text for document in part])
  more = data.add_bos + data.add_eos
  starts = np.concatenate([[0], np.cumsum(lengths + more)])
  short = np.flatnonzero(lengths + more < 2)
  if short.size:
    raise DataError(
      f"{part[short[0]].name}: the document is a single token, which leaves nothing to predict; "
      "set add_bos=true or add_eos=true, or leave it out"
    )
  whole, text = np.empty(starts[-1], np.int32), np.ones(starts[-1], bool)
  if data.add_bos:
    whole[starts[:-1]], text[starts[:-1]] = tokenizer.bos, False
  if data.add_eos:
    whole[starts[1:] - 1], text[starts[1:] - 1] = tokenizer.eos, False
  whole[text] = ids
  return Tokens(whole, starts)


def _packed(parts: Sequence[Tokens]) -> bytes:
  """One int32 array in .npy form: how many documents each part has, their lengths, their ids."""
  counts = [len(part) for part in parts]
  lengths = [np.diff(part.starts) for part in parts]
  file = io.BytesIO()
  np.save(file, np.concatenate([counts, *lengths, *(part.ids for part in parts)]).astype(np.int32))
  return file.getvalue()


def _unpacked(array: np.ndarray) -> list[Tokens]:
  first, second = int(array[0]), int(array[1])
  lengths = array[2 : 2 + first + second].astype(np.int64)
  starts = np.concatenate([[0], np.cumsum(lengths)])
  ids = array[2 + first + second :]
  middle = starts[first]
  return [
    Tokens(ids[:middle], starts[: first + 1]),
    Tokens(ids[middle:], starts[first:] - middle),
  ]


def _sha256(content: list) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
