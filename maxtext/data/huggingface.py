"""Tokenizers of Hugging Face: a tokenizer.json, and what the files beside it add to it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from maxtext.data import bpe
from maxtext.data.bpe import Bpe
from maxtext.data.chat import Chat
from maxtext.data.tokenizers import read, read_json, write
from maxtext.errors import DataError

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
TEMPLATE, MAP = "chat_template.jinja", "special_tokens_map.json"
# What a model's vocabulary may call special besides keys of its own, which end alike.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
# What `clean_up_tokenization_spaces` takes the spaces from.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class HuggingFace(Bpe):
  """Gives the ids and the texts of transformers' AutoTokenizer, with add_special_tokens=False.

  So a special token that is written in a text is that token, and decodes to how it is written.
  """

  def __init__(
    self,
    content: bytes,
    config: Mapping[str, Any],
    stops: Iterable[int],
    file: Path = Path(bpe.FILE),
  ):
    """`content` of tokenizer.json, `config` as in tokenizer_config.json with the chat template,
    `stops`: ids that end a text besides eos. Raises DataError, which names the `file`.
    """
    self._content, self._config = content, dict(config)
    made = bpe.parse(file, content)
    try:
      made.add_tokens(list(_listed(config)))
      made.add_tokens(list(_named(config, made)))
      super().__init__(made, bpe.name(made, config))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
      problem = f"names a special token in a way that is not known ({error}); correct it"
      raise DataError(f"{file.with_name(CONFIG)}: {problem}") from None
    made.encode_special_tokens = bool(config.get("split_special_tokens", False))
    own = () if self.eos is None else (self.eos,)
    self.stops = tuple(dict.fromkeys((*own, *stops)))
    self.chat = _chat(config)
    model = type(made.model).__name__
    self._cleans = bool(config.get("clean_up_tokenization_spaces")) and model != "BPE"

  def decode(self, ids: Iterable[int]) -> str:
    text = self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)
    for spaced in SPACED if self._cleans else ():
      text = text.replace(spaced, spaced.strip())
    return text

  def save(self, folder: Path) -> None:
    """Write three files that make the same tokenizer, here and in transformers. Raises OSError."""
    stops = {"eos_token_id": list(self.stops)}
    write(folder / bpe.FILE, self._content)
    write(folder / CONFIG, json.dumps(self._config, indent=2).encode())
    write(folder / GENERATION, json.dumps(stops).encode())

  @functools.cached_property
  def digest(self) -> str:
    """Of tokenizer.json as it is, and of all in tokenizer_config.json that may change an id."""
    said = {key: value for key, value in self._config.items() if _is_of_ids(key)}
    told = [self.bos, self.eos, self.pad, self.vocab_size, said]
    return hashlib.sha256(self._content + json.dumps(told, sort_keys=True).encode()).hexdigest()

  @functools.cached_property
  def _splits_at_spaces(self) -> bool:
    """As for a Bpe, and no special token that a text may hold reaches over a space."""
    added = self._tokenizer.get_added_tokens_decoder().values()
    plain = lambda token: not (token.lstrip or token.rstrip or token.single_word)
    alone = all(plain(token) and not any(map(str.isspace, token.content)) for token in added)
    return alone and super()._splits_at_spaces


def load(path: str) -> HuggingFace:
  """The tokenizer of a folder, or of its tokenizer.json. Raises DataError."""
  file = bpe.find(path)
  content, beside = read(file), file.with_name
  config = read_json(beside(CONFIG))
  if "added_tokens_decoder" not in config:  # written by versions that put all into one file
    config |= read_json(beside(MAP))
  if beside(TEMPLATE).is_file():
    try:
      config["chat_template"] = read(beside(TEMPLATE)).decode()
    except UnicodeDecodeError:
      raise DataError(f"{beside(TEMPLATE)}: is not UTF-8 text; copy it again") from None
  return HuggingFace(content, config, _stops(beside(GENERATION)), file)


def _stops(file: Path) -> list[int]:
  """The ids that end a text, by a generation_config.json. Raises DataError."""
  ids = read_json(file).get("eos_token_id")
  listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
  if not all(type(id) is int and id >= 0 for id in listed):
    raise DataError(f"{file}: eos_token_id is neither an id nor a list of ids; correct it")
  return listed


def _token(written: Any) -> tokenizers.AddedToken:
  """A special token as its files write it: its text, or a mapping."""
  if isinstance(written, str):
    return tokenizers.AddedToken(written, special=True)
  flags = {key: value for key, value in written.items() if key != "__type"}
  return tokenizers.AddedToken(**{"special": True, **flags})


def _listed(config: Mapping[str, Any]) -> Iterator[tokenizers.AddedToken]:
  """The tokens that tokenizer_config.json lists by their ids."""
  listed = config.get("added_tokens_decoder") or {}
  for _, written in sorted(listed.items(), key=lambda item: int(item[0])):
    yield _token(written)


def _named(
  config: Mapping[str, Any], made: tokenizers.Tokenizer
) -> Iterator[tokenizers.AddedToken]:
  """The tokens that have a role, and that neither file lists."""
  known = {token.content for token in made.get_added_tokens_decoder().values()}
  extra: Any = next((config[key] for key in EXTRA if config.get(key)), [])
  more = extra.values() if isinstance(extra, dict) else extra
  for token in map(_token, itertools.chain(_roles(config).values(), more)):
    if token.content not in known:
      known.add(token.content)
      yield token


def _roles(config: Mapping[str, Any]) -> dict[str, Any]:
  """bos_token, eos_token ... as they are written, keys of the model's own last."""
  usual = [f"{role}_token" for role in ROLES]
  own = [key for key in config if key.endswith("_token") and key not in usual]
  text = [key for key in own if isinstance(config[key], str)]
  return {key: config[key] for key in (*usual, *text) if config.get(key) is not None}


def _is_of_ids(key: str) -> bool:
  listed = key in ("added_tokens_decoder", "split_special_tokens", *EXTRA)
  return listed or key.endswith("_token") and not key.startswith("add_")


def _chat(config: Mapping[str, Any]) -> Chat | None:
  """The template, the one called default where there are several."""
  template = config.get("chat_template")
  if isinstance(template, list):
    template = {each.get("name"): each.get("template") for each in template}.get("default")
  if not isinstance(template, str):
    return None
  extra = config.get(EXTRA[0])
  roles = _roles(config) | (extra if isinstance(extra, dict) else {})
  return Chat(template, {role: _token(written).content for role, written in roles.items()})
