"""Text <-> token ids: the byte tokenizer, what every tokenizer can do, how its files are read."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maxtext.data.chat import Chat
from maxtext.data.errors import brief
from maxtext.errors import DataError

SPECIAL = 3  # ids 0, 1, 2 are pad, bos, eos
BYTES = SPECIAL + 256
POINTER = b"version https://git-lfs"  # what stands in a clone for a file that was not fetched


class Tokenizer(Protocol):
  """Ids are below vocab_size; those that no token has decode to nothing."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos(self) -> int | None: ...

  @property
  def eos(self) -> int | None: ...

  @property
  def pad(self) -> int | None: ...

  @property
  def stops(self) -> tuple[int, ...]:
    """The ids that end a text when a model writes them: eos, and others that its files name."""

  @property
  def chat(self) -> Chat | None:
    """How a message is put to the model; None: as it is."""

  @property
  def digest(self) -> str:
    """Equal for tokenizers that give equal ids."""

  def encode(self, text: str) -> list[int]:
    """The text alone, without bos and eos.

    What looks like a special token is text too, but for tokenizers of Hugging Face, whose texts may
    hold special tokens.
    """

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """d texts -> ids of all, one after the other [n], int32; how many each has [d], int64."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text; bytes that are not UTF-8 give U+FFFD.

    Special tokens give nothing where no text encodes to them, but for those of tiktoken files.
    """

  def save(self, folder: Path) -> None:
    """Write the files that the same kind's `load` reads again; bytes need none. Raises OSError."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """A token a byte of UTF-8. Ids from 259 up to `vocab_size` stand for nothing."""

  vocab_size: int = BYTES
  pad: int | None = 0
  bos: int | None = 1
  eos: int | None = 2
  chat: Chat | None = None

  @property
  def stops(self) -> tuple[int, ...]:
    return () if self.eos is None else (self.eos,)

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


def joined(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """The ids of d texts -> all, one after the other [n], int32; how many each has [d], int64."""
  lengths = np.fromiter(map(len, ids), np.int64, len(ids))
  return np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()), lengths


def read(path: Path) -> bytes:
  """The content of a tokenizer's file. Raises DataError where there is none to be had."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise DataError(f"{path}: cannot be read: {error.strerror}; name a file that can") from None
  if not content:
    raise DataError(f"{path}: is empty; copy it again")
  if content.startswith(POINTER):
    raise DataError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull`")
  return content


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object beside a tokenizer, {} where there is none. Raises DataError."""
  if not path.is_file():
    return {}
  try:
    content = json.loads(read(path))
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: is not JSON: {brief(error)}; copy it again") from None
  if not isinstance(content, dict):
    raise DataError(f"{path}: holds no JSON object; copy it again")
  return content


def write(path: Path, content: bytes) -> None:
  """Write a file whole or not at all. Raises OSError."""
  writing = path.with_name(f"{path.name}.writing")
  writing.write_bytes(content)
  writing.replace(path)


def package(name: str) -> Any:
  """A package that only some kinds of tokenizers need. Raises DataError where it is missing."""
  try:
    return importlib.import_module(name)
  except ImportError:
    raise DataError(
      f"the package {name} is not installed; pip install 'maxtext[hf]', or pip install {name}"
    ) from None
