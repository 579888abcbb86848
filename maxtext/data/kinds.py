"""The kinds of tokenizers that are read from files, by `tokenizer_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from maxtext.data import bpe, huggingface, sentencepiece_model, tiktoken_ranks
from maxtext.data.sections import Data
from maxtext.data.tokenizers import ByteTokenizer, Tokenizer
from maxtext.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Kind:
  """`load` reads a path and raises DataError; a run keeps its tokenizer as `file` (and others)."""

  load: Callable[[str], Tokenizer]
  file: str


KINDS = {
  "bpe": Kind(bpe.load, bpe.FILE),
  "huggingface": Kind(huggingface.load, bpe.FILE),
  "sentencepiece": Kind(sentencepiece_model.load, sentencepiece_model.FILE),
  "tiktoken": Kind(tiktoken_ranks.load, tiktoken_ranks.FILE),
}


def given(data: Data) -> Tokenizer | None:
  """The tokenizer that is there before the corpus is read; None: one is trained on it.

  Raises DataError for a file that cannot be read, ConfigError where it lacks what the section asks.
  """
  if data.tokenizer_type == "byte":
    return ByteTokenizer()
  if not data.tokenizer_path:
    return None
  tokenizer = KINDS[data.tokenizer_type].load(data.tokenizer_path)
  for role in ("bos", "eos") if data.dataset_type == "text" else ():
    if getattr(data, f"add_{role}") and getattr(tokenizer, role) is None:
      problem = f"{data.tokenizer_path} has no {role} token; set add_{role}=false"
      if data.tokenizer_type in ("bpe", "huggingface"):
        problem += f", or name its {role}_token in {huggingface.CONFIG} beside it"
      raise ConfigError(f"add_{role}", problem)
  return tokenizer


def vocabulary(data: Data) -> int:
  """The tokenizer's vocab_size, known before the corpus is read. Raises as `given` does."""
  tokenizer = given(data)
  return data.tokenizer_vocab_size if tokenizer is None else tokenizer.vocab_size
