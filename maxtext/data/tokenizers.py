"""Text <-> token ids: the byte tokenizer, and what every tokenizer can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

SPECIAL = 3  # ids 0, 1, 2 are pad, bos, eos
BYTES = SPECIAL + 256


class Tokenizer(Protocol):
  """Ids are below vocab_size; those that stand for no text decode to none."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos(self) -> int | None: ...

  @property
  def eos(self) -> int | None: ...

  @property
  def pad(self) -> int: ...

  @property
  def digest(self) -> str:
    """Equal for tokenizers that give equal ids."""

  def encode(self, text: str) -> list[int]:
    """The text alone, without bos and eos; what looks like a special token is text too."""

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """d texts -> ids of all, one after the other [n], int32; how many each has [d], int64."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""

  def save(self, folder: Path) -> None:
    """Write the files that `bpe.load(folder)` reads; bytes need none. Raises OSError."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """A token a byte of UTF-8. Ids from 259 up to `vocab_size` stand for nothing."""

  vocab_size: int = BYTES
  pad: int = 0
  bos: int | None = 1
  eos: int | None = 2

  @property
  def digest(self) -> str:
    return "bytes"

  def encode(self, text: str) -> list[int]:
    return [byte + SPECIAL for byte in text.encode()]

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode() for text in texts]
    ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + SPECIAL
    return ids, np.fromiter(map(len, encoded), np.int64, len(encoded))

  def decode(self, ids: Iterable[int]) -> str:
    kept = bytes(id - SPECIAL for id in ids if SPECIAL <= id < BYTES)
    return kept.decode("utf-8", errors="replace")

  def save(self, folder: Path) -> None:
    """Nothing is to be known of bytes."""
