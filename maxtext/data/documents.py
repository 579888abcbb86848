"""Text files -> documents, and which of them are held out."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from maxtext.errors import DataError, closest
from maxtext.log import log

SUFFIXES = (".txt", ".jsonl", ".md", ".py")


@dataclasses.dataclass(frozen=True)
class Document:
  """A text; what stands before or after it in a row is not its context."""

  text: str
  name: str  # the file it came from, with the line where a file holds several
  work: str = ""  # documents of one work are held out together; '' = a work of its own

  def __post_init__(self):
    if not self.text.strip():
      raise DataError(f"{self.name}: the document is empty; delete it, or do not name it")


def read(path: str, text_column: str) -> list[Document]:
  """The documents of a file, folder or glob, in the order of their paths.

  A .jsonl file holds a document a line, in the field `text_column`; any other file is one document.
  Empty files among others, as an __init__.py, are left out. Raises DataError, naming file and line,
  for what is missing, unreadable or not UTF-8, or empty where it is all there is.
  """
  documents: list[Document] = []
  files, empty = _files(os.path.expanduser(path)), 0
  for file in files:
    found = list(_documents(file, text_column, alone=len(files) == 1))
    documents.extend(found)
    empty += not found
  if not documents:
    raise DataError(f"dataset_path={path}: all {empty} files there are empty; name others")
  if empty:
    log.info("%s: %d empty files are left out", path, empty)
  return documents


def _files(path: str) -> list[Path]:
  known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
  if os.path.isdir(path):
    found = list(_walk(path))
  elif os.path.isfile(path):
    found = [Path(path)]
  else:
    found = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
  chosen = sorted((file for file in found if file.suffix in SUFFIXES), key=Path.as_posix)
  if chosen:
    if len(chosen) < len(found):
      log.info("%s: %d files that are not %s are left out", path, len(found) - len(chosen), known)
    return chosen
  if found:
    raise DataError(f"dataset_path={path}: no file there is {known}, as {found[0].name} is not")
  if os.path.isdir(path):
    raise DataError(f"dataset_path={path}: the folder is empty; put {known} files there")
  if glob.has_magic(path):
    raise DataError(f"dataset_path={path}: no file matches; ** stands for any number of folders")
  raise DataError(f"dataset_path={path}: no such file or folder")


def _walk(folder: str) -> Iterator[Path]:
  """All files but the hidden ones, at any depth."""

  def refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

  for here, folders, names in os.walk(folder, onerror=refuse):
    folders[:] = [name for name in folders if not name.startswith(".")]
    yield from (Path(here, name) for name in names if not name.startswith("."))


def _documents(file: Path, text_column: str, alone: bool) -> Iterator[Document]:
  try:
    content = file.read_bytes()
  except OSError as error:
    raise DataError(f"{file}: cannot be read: {error.strerror}") from error
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    bad = f"byte 0x{content[error.start]:02x}"
    raise DataError(f"{file}:{line}: {bad} is not UTF-8; convert the file, as by iconv") from None
  if file.suffix != ".jsonl":
    if alone or text.strip():
      yield Document(text, str(file))
    return
  if not text.strip():
    raise DataError(f"{file}: the file is empty; put a JSON object on each line")
  lines = text.rstrip().split("\n")  # not splitlines: JSON may hold U+2028
  for number, record in enumerate(lines, 1):
    yield Document(_field(record, text_column, f"{file}:{number}"), f"{file}:{number}")


def _field(line: str, column: str, where: str) -> str:
  if not line.strip():
    raise DataError(f"{where}: the line is empty; delete it")
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: not JSON: {error}") from None
  if not isinstance(record, dict):
    raise DataError(
      f'{where}: not an object like {{"{column}": "..."}}, but a {type(record).__name__}'
    )
  if column not in record:
    names = ", ".join(list(record)[:8]) or "none"
    hint = closest(column, record)
    raise DataError(f"{where}: no field '{column}'{hint or ';'} set text_column to one of: {names}")
  text = record[column]
  if not isinstance(text, str):
    kind = type(text).__name__
    raise DataError(f"{where}: '{column}' is a {kind}, not text; set text_column to another field")
  if not text.isascii() and re.search("[\ud800-\udfff]", text):
    raise DataError(f"{where}: '{column}' has half of a surrogate pair, which no UTF-8 can hold")
  return text


def digest(documents: Iterable[Document]) -> str:
  """The sha256 of the texts and of where one ends, in order; names do not count."""
  total = hashlib.sha256()
  for document in documents:
    total.update(_digest(document.text))
  return total.hexdigest()


def hold_out(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
  """-> documents to train on, documents held out: `fraction` of the works, at least one if not 0.

  The sha256 of a work's text decides, so that neither seed nor file name matters, equal texts fall
  on one side, and a work that is added moves few others. A corpus of one document gives its end.
  """
  if fraction == 0:
    return documents, []
  works: dict[str | int, list[str]] = {}
  for index, document in enumerate(documents):
    works.setdefault(document.work or index, []).append(document.text)
  keys = {work: _digest("\0".join(texts)) for work, texts in works.items()}
  ranked = sorted(set(keys.values()))
  if len(ranked) == 1:
    return _cut(documents, fraction)
  chosen = set(ranked[: max(1, round(fraction * len(ranked)))])
  train: list[Document] = []
  held: list[Document] = []
  for index, document in enumerate(documents):
    (held if keys[document.work or index] in chosen else train).append(document)
  return train, held


def _cut(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
  if len(documents) > 1:
    raise DataError(
      f"{documents[0].name}: all {len(documents)} documents are equal, so none can be held out; "
      "set eval_fraction=0"
    )
  (whole,) = documents
  at = len(whole.text) - max(1, round(fraction * len(whole.text)))
  at = whole.text.find("\n", at, -1) + 1 or at
  if not whole.text[:at].strip() or not whole.text[at:].strip():
    raise DataError(f"{whole.name}: too short to hold out its end; set eval_fraction=0")
  log.info(
    "%s: one document only; its last %d characters are held out", whole.name, len(whole.text) - at
  )
  return (
    [dataclasses.replace(whole, text=whole.text[:at])],
    [dataclasses.replace(whole, text=whole.text[at:])],
  )


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()
