"""The words of a command line: a configuration file, and key=value."""

from __future__ import annotations

import re
from collections.abc import Sequence

from maxtext.config import complaints, documents
from maxtext.config.complaints import Complain, Complaint
from maxtext.config.sections import SECTION_OF
from maxtext.config.sources import COMMAND_LINE, Setting, value_node
from maxtext.config.values import brief
from maxtext.errors import closest

WHERE = complaints.COMMAND_LINE


def split(argv: Sequence[str], complain: Complain) -> tuple[str | None, list[Setting]]:
  """The configuration file, if one is named, and the settings."""
  paths, settings, words = [], [], list(argv)
  while words:
    word = words.pop(0)
    key, equals, text = word.partition("=")
    if equals and not text and key in SECTION_OF and words and _is_stray(words[0]):
      complain(_spaced(key, words.pop(0)))
    elif equals and re.fullmatch(r"\w+", key):
      settings.append(Setting(key, key, WHERE, COMMAND_LINE, value_node(key, text)))
    elif not equals and words and words[0].startswith("="):
      text = words.pop(0)[1:] or (words.pop(0) if words else "")
      complain(_spaced(key, text))
    elif word.startswith("-"):
      complain(_dashed(word))
    elif equals and not _is_path(word):
      complain(_misnamed(key, text))
    elif word in SECTION_OF:
      complain(Complaint(WHERE, word, f"has no value; write {word}=VALUE, without spaces"))
    elif not word.strip():
      complain(Complaint(WHERE, repr(word), "is an empty argument; remove it"))
    else:
      paths.append(word)
  for extra in paths[1:]:
    problem = "is a second file; name one, and name the other in it as base_config"
    if documents.find(extra) is None:
      problem = (
        f"is neither key=value nor the only file{closest(extra, SECTION_OF)}; write key=value"
      )
    complain(Complaint(WHERE, brief(extra), problem))
  return paths[0] if paths else None, settings


def _spaced(key: str, text: str) -> Complaint:
  written = brief(f"{key.strip()}={text.strip() or 'VALUE'}")
  return Complaint(WHERE, brief(key.strip()), f"write {written}, without spaces around the =")


def _is_stray(word: str) -> bool:
  """Whether a word means nothing by itself, so that it belongs to what stands before it."""
  return not word.startswith("-") and "=" not in word and not _is_path(word)


def _dashed(word: str) -> Complaint:
  key, equals, text = word.lstrip("-").partition("=")
  key = key.replace("-", "_")
  if key not in SECTION_OF:
    problem = f"no such option{closest(key, SECTION_OF)}; write key=value, or --help"
    return Complaint(WHERE, brief(word), problem)
  written = brief(f"{key}={text if equals else 'VALUE'}")
  return Complaint(WHERE, brief(word), f"settings have no dashes; write {written}")


def _is_path(word: str) -> bool:
  return word.endswith((".yml", ".yaml")) or documents.find(word) is not None


def _misnamed(key: str, text: str) -> Complaint:
  if re.fullmatch(r"\w+", key.strip()):
    return _spaced(key, text)
  if (inner := key.rpartition(".")[2]) in SECTION_OF:
    return Complaint(WHERE, brief(key), f"keys stand alone here; write {inner}=VALUE")
  near = closest(key, SECTION_OF) or "; write key=value"
  return Complaint(WHERE, brief(key) or "=", f"is not the name of a key{near}")
