"""Tokenizers of SentencePiece: a .model file."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from maxtext.data.chat import Chat
from maxtext.data.errors import brief
from maxtext.data.tokenizers import joined, package, read, write
from maxtext.errors import DataError

FILE = "tokenizer.model"


class SentencePiece:
  """Gives the ids and the texts of SentencePiece's own processor.

  Control symbols, as bos and eos, are found in no text and decode to nothing.
  """

  chat: Chat | None = None

  def __init__(self, content: bytes, file: Path = Path(FILE)):
    """`content` of the .model. Raises DataError, which names the `file`."""
    library = package("sentencepiece")
    self._content = content
    try:
      self._model = library.SentencePieceProcessor(model_proto=content)
      self.vocab_size = int(self._model.get_piece_size())
    except Exception as error:  # the library raises no narrower class
      problem = f"is cut short, or no SentencePiece model: {brief(error)}; copy it again"
      raise DataError(f"{file}: {problem}") from None
    if not self.vocab_size:
      raise DataError(f"{file}: is no SentencePiece model: it has no pieces; copy it again")
    self.bos, self.eos = self._id("bos_id"), self._id("eos_id")
    self.pad = self._id("pad_id")
    self.stops: tuple[int, ...] = () if self.eos is None else (self.eos,)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text, out_type=int)

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return joined(self._model.encode(list(texts), out_type=int) if texts else [])

  def decode(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(id) for id in ids if id < self.vocab_size])

  def save(self, folder: Path) -> None:
    """Write the .model as it was read. Raises OSError."""
    write(folder / FILE, self._content)

  @functools.cached_property
  def digest(self) -> str:
    return hashlib.sha256(self._content).hexdigest()

  def _id(self, role: str) -> int | None:
    id = int(getattr(self._model, role)())
    return None if id < 0 else id


def load(path: str) -> SentencePiece:
  """The tokenizer of a .model file. Raises DataError."""
  file = Path(path).expanduser()
  return SentencePiece(read(file), file)
