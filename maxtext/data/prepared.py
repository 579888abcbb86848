"""Documents prepared as tokens: ArrayRecord files, an index beside each, a manifest of all.

A record is the ids of a document, little-endian int32. `NAME.index.npy` [documents 2] uint32 has
how many they are, and the crc32 of their bytes; `manifest.json` has the checksum of every file, and
which tokenizer gave the ids. It is written last: a folder without it is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxtext.data.errors import Damaged, brief
from maxtext.data.records import ArrayRecords, File, Record
from maxtext.errors import DataError

MANIFEST, INDEX, FORMAT = "manifest.json", ".index.npy", 1


def manifest(folder: str) -> dict[str, Any] | None:
  """What the manifest of a folder says; None without one. Raises DataError."""
  path = Path(folder, MANIFEST)
  try:
    found = json.loads(path.read_bytes())
    if found["format"] != FORMAT:
      raise DataError(f"{path}: is of format {found['format']}, not {FORMAT}; prepare it again")
    return found
  except FileNotFoundError:
    return None
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise DataError(f"{path}: is damaged: {brief(error)}; prepare it again") from None


def index(files: Sequence[File]) -> np.ndarray | None:
  """[documents 2] of prepared files; None where they are not. Raises DataError for a wrong sum."""
  folders = {os.path.dirname(file.path) for file in files}
  manifests = {folder: manifest(folder) for folder in folders}
  if not any(manifests.values()):
    return None
  parts = []
  for file in files:
    folder, name = os.path.split(file.path)
    said = (manifests[folder] or {}).get("files", {})
    if name not in said:
      raise DataError(f"{file.shown}: is not in {folder}/{MANIFEST}; name prepared files alone")
    if os.path.getsize(file.path) != said[name]["bytes"]:
      raise DataError(f"{file.shown}: has not the size that {MANIFEST} says; prepare it again")
    path = _index_of(Path(file.path))
    if sha256(path) != said.get(path.name, {}).get("sha256"):
      raise DataError(f"{path}: has not the checksum that {MANIFEST} says; prepare it again")
    assert isinstance(file, ArrayRecords)
    file.raw = True
    parts.append(np.load(path, allow_pickle=False))
  return np.concatenate(parts)


def tokens(
  record: Record | Damaged, length: int, crc: int, where: Callable[[], str]
) -> np.ndarray | Damaged:
  """The ids of a document, or what is wrong with it."""
  if isinstance(record, Damaged):
    return record
  content = record["record"]
  if len(content) != 4 * length or zlib.crc32(content) != crc:
    return Damaged(where(), "not what was prepared: its checksum is another")
  return np.frombuffer(content, "<i4")


def check(folder: str, settings: dict[str, Any], where: str) -> None:
  """Refuse another tokenizer than the one that gave the ids, or other ends. Raises DataError."""
  said = manifest(folder) or settings
  for key, value in settings.items():
    if said[key] != value:
      other = f"{key}={said[key]}"
      if key == "tokenizer":
        other = f"another tokenizer; set tokenizer_type and tokenizer_path to that in {folder}"
      raise DataError(f"{where}: was prepared with {other}")


def write(path: Path, documents: Iterable[np.ndarray]) -> dict[str, Any]:
  """Write a file and its index; what the manifest says of them. Raises OSError."""
  from array_record.python.array_record_module import ArrayRecordWriter

  writer, said = ArrayRecordWriter(str(path), "group_size:1"), []
  for ids in documents:
    record = ids.astype("<i4").tobytes()
    writer.write(record)
    said.append((len(ids), zlib.crc32(record)))
  writer.close()
  beside = _index_of(path)
  np.save(beside, np.array(said, np.uint32).reshape(len(said), 2), allow_pickle=False)
  sums = {
    each.name: {"bytes": each.stat().st_size, "sha256": sha256(each)} for each in (path, beside)
  }
  counts = {"documents": len(said), "tokens": int(sum(length for length, _ in said))}
  return {path.name: sums[path.name] | counts, beside.name: sums[beside.name]}


def sha256(path: Path) -> str:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise DataError(f"{path}: cannot be read: {error.strerror}; prepare it again") from None


def _index_of(path: Path) -> Path:
  return path.with_name(f"{path.name}{INDEX}")
