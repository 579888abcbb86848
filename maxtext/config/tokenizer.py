"""What a run demands of its tokenizer: before it is opened, and once its size is known."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from maxtext.config.checks import Problem, Purpose, settle
from maxtext.config.complaints import Complaint, lines
from maxtext.config.config import Config
from maxtext.config.values import shown
from maxtext.data.sections import FILES
from maxtext.errors import ConfigError, ConfigErrors, DataError

BYTES = 259  # vocabulary of the byte tokenizer
PACKAGES = {"sentencepiece": "sentencepiece", "tiktoken": "tiktoken"}
IN_FOLDERS = "tokenizer.json"  # what the kinds that may be named by a folder have in it


def unopened(config: Config, purpose: Purpose) -> Iterator[Problem]:
  """What is wrong with its file, its packages and its size, as far as no package has to tell."""
  data = config.data
  if purpose != "launch" and data.tokenizer_type in FILES:
    yield from _package("tokenizer_type", PACKAGES.get(data.tokenizer_type), data.tokenizer_type)
  if purpose != "launch" and config.decode.use_chat_template:
    yield from _package("use_chat_template", "jinja2", "use_chat_template")
  if purpose in ("train", "read") and data.tokenizer_path and data.tokenizer_type != "byte":
    yield from _file(data.tokenizer_path, data.tokenizer_type)
  if not data.tokenizer_path and data.tokenizer_type not in FILES:
    bpe = data.tokenizer_type == "bpe"
    key = "tokenizer_vocab_size" if bpe else "tokenizer_type"
    yield from _size(config, data.tokenizer_vocab_size if bpe else BYTES, key)


def check_vocabulary(config: Config, size: int) -> None:
  """Whether the model has a row for each of the tokenizer's tokens. Raises ConfigErrors."""
  _refuse(config, list(_size(config, size, "tokenizer_path")))


def placed(config: Config, error: ConfigError | DataError) -> ConfigError | DataError:
  """An error of opening the tokenizer, at the place that names it or asks too much of it."""
  if isinstance(error, ConfigError):
    return ConfigErrors(lines(settle(config, [(error.where, error.problem, "tokenizer_path")])))
  source = config.sources["tokenizer_path"]
  return DataError(lines([Complaint(source.where, source.typed, str(error))])[0])


def _refuse(config: Config, problems: list[Problem]) -> None:
  if problems:
    raise ConfigErrors(lines(settle(config, problems)))


def _size(config: Config, least: int, decider: str) -> Iterator[Problem]:
  rows = config.architecture.vocab_size
  if rows and rows < least and config.data.dataset_type != "synthetic":
    problem = f"{rows} rows are fewer than the tokenizer's {least} tokens; "
    yield "vocab_size", f"{problem}use at least {least}, or null", decider


def _package(key: str, name: str | None, what: str) -> Iterator[Problem]:
  if name and importlib.util.find_spec(name) is None:
    install = f"pip install 'maxtext[hf]', or pip install {name}"
    yield key, f"{what} needs the package {name}, which is not installed; {install}"


def _file(path: str, kind: str) -> Iterator[Problem]:
  """A file or folder that is plainly not there."""
  place, wanted = os.path.expanduser(path), FILES.get(kind, FILES["huggingface"])
  if not os.path.exists(place):
    offer = f"name {wanted}" + (", or leave it empty to train one" if kind == "bpe" else "")
    yield "tokenizer_path", f"{shown(path)}: no such file; {offer}"
  elif os.path.isdir(place) and kind in PACKAGES:
    yield "tokenizer_path", f"{shown(path)}: is a folder; name {wanted}"
  elif os.path.isdir(place) and not os.path.isfile(os.path.join(place, IN_FOLDERS)):
    yield "tokenizer_path", f"{shown(path)}: holds no {IN_FOLDERS}; name {wanted}"
