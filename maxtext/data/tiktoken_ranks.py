"""Tokenizers of tiktoken: a file of ranks, one token a line, and how a text is cut before them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from maxtext.data.chat import Chat
from maxtext.data.errors import brief
from maxtext.data.tokenizers import joined, package, read, write
from maxtext.errors import DataError
from maxtext.log import log

FILE = "tokenizer.tiktoken"
END = "<|endoftext|>"
LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")

# The published expressions (Llama 3 has that of cl100k).
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}"
  rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
  r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a file of ranks does not say: where a text is cut, and the special tokens."""

  name: str
  pattern: str
  special: Mapping[str, int]
  bos: str | None = None
  eos: str = END
  pad: str | None = None
  stops: tuple[str, ...] = ()


def _llama3() -> Layout:
  """256 special tokens, of which most are reserved, as in Llama 3.1 and later."""
  used = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
  }
  reserved = (f"reserved_special_token_{number}" for number in range(256))
  names = [f"<|{used[i] if i in used else next(reserved)}|>" for i in range(256)]
  special = {name: 128_000 + i for i, name in enumerate(names)}
  ends = "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
  return Layout("llama3", _CL100K, special, names[0], names[1], names[4], ends)


# By the number of ranks in the published file; every other number is a vocabulary of one's own.
LAYOUTS = {
  50_256: Layout("r50k_base", _GPT2, {END: 50_256}),
  50_280: Layout("p50k_base", _GPT2, {END: 50_256}),
  100_256: Layout(
    "cl100k_base",
    _CL100K,
    {
      END: 100_257,
      "<|fim_prefix|>": 100_258,
      "<|fim_middle|>": 100_259,
      "<|fim_suffix|>": 100_260,
      "<|endofprompt|>": 100_276,
    },
  ),
  128_000: _llama3(),
  199_998: Layout("o200k_base", _O200K, {END: 199_999, "<|endofprompt|>": 200_018}),
}


class Tiktoken:
  """Gives the ids and the texts of a `tiktoken.Encoding`.

  A special token is found in no text, and decodes to how it is written.
  """

  chat: Chat | None = None

  def __init__(self, content: bytes, file: Path = Path(FILE)):
    """`content` of the .tiktoken. Raises DataError, which names the `file`."""
    library = package("tiktoken")
    ranks = _ranks(content, file)
    layout = LAYOUTS.get(len(ranks)) or Layout(
      "own", _CL100K, {END: max(ranks.values(), default=0) + 1}
    )
    _check(ranks, layout, file)
    self._content, self._layout = content, layout
    try:
      self._encoding = library.Encoding(
        layout.name,
        pat_str=layout.pattern,
        mergeable_ranks=ranks,
        special_tokens=dict(layout.special),
      )
    except ValueError as error:
      raise DataError(f"{file}: tiktoken refuses it: {brief(error)}; copy it again") from None
    self._known = {*ranks.values(), *layout.special.values()}
    self.vocab_size = max(self._known) + 1
    self.bos, self.eos = layout.special.get(layout.bos or ""), layout.special[layout.eos]
    self.pad = layout.special.get(layout.pad or "")
    self.stops = tuple(layout.special[name] for name in layout.stops or (layout.eos,))

  @property
  def layout(self) -> str:
    """The name of the layout that the number of ranks tells, `own` where it is none."""
    return self._layout.name

  def encode(self, text: str) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return joined(self._encoding.encode_ordinary_batch(list(texts)))

  def decode(self, ids: Iterable[int]) -> str:
    return self._encoding.decode([id for id in map(int, ids) if id in self._known])

  def save(self, folder: Path) -> None:
    """Write the file as it was read. Raises OSError."""
    write(folder / FILE, self._content)

  @functools.cached_property
  def digest(self) -> str:
    said = f"{self._layout.pattern} {sorted(self._layout.special.items())}"
    return hashlib.sha256(self._content + said.encode()).hexdigest()


def load(path: str) -> Tiktoken:
  """The tokenizer of a .tiktoken file. Raises DataError."""
  file = Path(path).expanduser()
  made = Tiktoken(read(file), file)
  log.info("%s: %d tokens, cut as %s", path, made.vocab_size, made.layout)
  return made


def _ranks(content: bytes, file: Path) -> dict[bytes, int]:
  """The tokens and their ranks, line by line. Raises DataError."""
  ranks: dict[bytes, int] = {}
  for number, line in enumerate(content.splitlines(), 1):
    if not line:
      continue
    problem = f"{file}:{number}: is no line of a token in base64 and its rank; copy the file again"
    match = LINE.fullmatch(line)
    if match is None:
      raise DataError(problem)
    try:
      token = base64.b64decode(match[1], validate=True)
    except binascii.Error:
      raise DataError(problem) from None
    if token in ranks:
      raise DataError(f"{file}:{number}: the token has a rank above already; copy the file again")
    ranks[token] = int(match[2])
  return ranks


def _check(ranks: Mapping[bytes, int], layout: Layout, file: Path) -> None:
  """Every id below the highest rank is a token's, and every byte has one. Raises DataError."""
  taken, special = set(ranks.values()), set(layout.special.values())
  if len(taken) < len(ranks) or taken & special:
    raise DataError(f"{file}: two tokens have the same rank; copy the file again")
  if gaps := set(range(max(taken, default=0) + 1)) - taken - special:
    raise DataError(f"{file}: no token has the rank {min(gaps)}; copy the file again")
  if lost := {bytes([byte]) for byte in range(256)} - set(ranks):
    raise DataError(f"{file}: no token is the byte {min(lost)[0]}; copy the file again")
