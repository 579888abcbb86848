"""Files named by patterns -> sources of documents, and which of them are held out."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence

import numpy as np

from maxtext.bucket import is_url
from maxtext.data import prepared, remote
from maxtext.data.errors import Damaged
from maxtext.data.permutation import noise, permutation
from maxtext.data.records import HELD, KINDS, File, Record, kind_of
from maxtext.errors import DataError, closest
from maxtext.log import log

HOLD, GROUPS = 2**63, 2**62  # keys of what is held out, and of the order of groups


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Files whose records are documents: of `kept` among all of theirs."""

  name: str
  files: tuple[File, ...]
  kept: np.ndarray  # [n] int64, ascending
  index: np.ndarray | None = None  # [all 2] uint32: tokens and crc32 of each, where prepared

  def __len__(self) -> int:
    return len(self.kept)

  @functools.cached_property
  def firsts(self) -> np.ndarray:
    """[files + 1]: the number of each file's first record."""
    return np.cumsum([0, *(file.count for file in self.files)])

  def read(self, numbers: np.ndarray) -> list[Record | Damaged]:
    """The records of these numbers among `kept`, in their order."""
    found: list[Record | Damaged] = [{}] * len(numbers)
    files, rows = self.locate(numbers)
    for file in np.unique(files):
      places = np.flatnonzero(files == file)
      records = self.files[file].read(rows[places].tolist())
      for place, record in zip(places.tolist(), records):
        found[place] = record
    return found

  def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers among `kept` -> files, and rows in them."""
    records, firsts = self.kept[numbers], self.firsts
    files = firsts.searchsorted(records, side="right") - 1
    return files, records - firsts[files]

  def where(self, number: int) -> str:
    """Where the record of a number among `kept` stands."""
    (file,), (row,) = self.locate(np.array([number]))
    return self.files[file].where(int(row))

  def order(self, key: int) -> np.ndarray:
    """A permutation of all numbers. Where a group of rows is read at a time, few groups are mixed
    at once: any `HELD` that follow each other in an order of the groups.
    """
    if all(file.far for file in self.files):
      return permutation(key, len(self))
    sizes = [size for file in self.files for size in file.group_sizes or [file.count]]
    groups = np.cumsum([0, *sizes]).searchsorted(self.kept, side="right") - 1
    rank = np.argsort(permutation(key ^ GROUPS, len(sizes)))
    return np.lexsort((noise(key, 0, len(self)), rank[groups] // HELD))

  def digest(self) -> str:
    files = "".join(file.digest() for file in self.files)
    total = hashlib.sha256(f"{self.name} {files}".encode())
    total.update(self.kept.tobytes())
    return total.hexdigest()


def hold_out(source: Source, fraction: float) -> tuple[Source, Source | None]:
  """-> to train on, held out: `fraction` of the records, at least one if not 0, by their number."""
  if not fraction:
    return source, None
  if len(source) < 2:
    raise DataError(f"{source.name}: one document only, and none can be held out of it; name more")
  chance = noise(HOLD, 0, len(source))
  held = chance < np.uint64(int(fraction * 2**64))
  held[chance.argmin()] = True
  return (
    dataclasses.replace(source, kept=source.kept[~held]),
    dataclasses.replace(source, kept=source.kept[held]),
  )


def find(key: str, pattern: str, kind: str, columns: Sequence[str], cache: str) -> Source:
  """The source of a glob, a file or a folder, here or at a URL. Raises DataError."""
  where = f"{key}={pattern}"
  found = remote.find(where, pattern, cache) if is_url(pattern) else _here(where, pattern)
  files = []
  for path, shown in found:
    if shown.endswith(prepared.INDEX):
      continue
    one = kind_of(os.path.basename(shown)) if kind == "auto" else kind
    if one is None:
      raise DataError(f"{where}: the name {shown} does not say its kind; set grain_file_type")
    files.append(KINDS[one](path, shown, columns))
  _complete(where, pattern, [shown for _, shown in found])
  if not sum(file.count for file in files):
    raise DataError(f"{where}: {len(files)} files, and no record in any; name others")
  kinds = {name for name, made in KINDS.items() if any(type(file) is made for file in files)}
  index = prepared.index(files) if kinds == {"arrayrecord"} else None
  what = "prepared tokens" if index is not None else ", ".join(sorted(kinds))
  log.info("%s: %d files (%s)", where, len(files), what)
  count = sum(file.count for file in files)
  return Source(pattern, tuple(files), np.arange(count), index)


def _here(where: str, pattern: str) -> list[tuple[str, str]]:
  """(path, how it is shown) of the files of a pattern, in the order of their names."""
  path = os.path.expanduser(pattern)
  if os.path.isdir(path):
    names = _saved(where, path) or _exported(where, path)
    names = names or sorted(name for name in os.listdir(path) if kind_of(name))
    found = [os.path.join(path, name) for name in names]
  elif os.path.isfile(path):
    found = [path]
  else:
    found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
  if not found:
    folder, name = os.path.split(path)
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    hint = closest(name, there) or "; name a file, a folder or a quoted glob"
    raise DataError(f"{where}: no such file, and none matches{hint}")
  return [(each, each) for each in found]


def _saved(where: str, folder: str) -> list[str]:
  """The files of a dataset that the package `datasets` has saved; none where it is not one."""
  try:
    with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
      splits = ", ".join(json.load(file)["splits"])
    raise DataError(f"{where}: holds several splits; name one of its folders: {splits}")
  except FileNotFoundError:
    pass
  except (OSError, ValueError, LookupError) as error:
    raise DataError(f"{where}: dataset_dict.json cannot be read: {error}") from None
  try:
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
      state = json.load(file)
    if state.get("_indices_files"):
      raise DataError(f"{where}: is a selection of another dataset; save it by flatten_indices()")
    return [each["filename"] for each in state["_data_files"]]
  except FileNotFoundError:
    return []
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise DataError(f"{where}: state.json cannot be read: {error}") from None


def _exported(where: str, folder: str) -> list[str]:
  """The records of a folder that TFDS has written, of one split; none where it is not one."""
  names = os.listdir(folder)
  if not {"dataset_info.json", "features.json"} <= {*names}:
    return []
  names = sorted(name for name in names if kind_of(name) == "arrayrecord")
  splits = sorted({name.partition(".array_record")[0] for name in names})
  if len(splits) > 1:
    patterns = ", ".join(f"{split}.*" for split in splits)
    raise DataError(f"{where}: holds several splits; name the files of one: {patterns}")
  return names


def _complete(where: str, pattern: str, names: Sequence[str]) -> None:
  """Refuse a pattern that matches a shard of NAME-00000-of-00005 that is not there."""
  wanted = os.path.basename(pattern)
  for folder, name in {os.path.split(name) for name in names}:
    if not (match := re.search(r"-(\d+)-of-(\d+)", name)):
      continue
    for number in range(int(match[2])):
      other = f"{name[: match.start(1)]}{number:0{len(match[1])}}{name[match.end(1) :]}"
      path = f"{folder}/{other}" if folder else other
      if path not in names and (fnmatch.fnmatch(other, wanted) or not glob.has_magic(wanted)):
        if wanted != name:
          raise DataError(f"{where}: {path} is missing, one of {int(match[2])}; bring it back")
