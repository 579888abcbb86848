"""The manifest of a step folder: every file's size and checksum. Without it there is no checkpoint.

Orbax takes a folder as complete by its name alone and reads flipped bits without a word, so the
manifest is written last and everything is held against it before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maxtext.checkpoints.arrays import Array

NAME = "manifest.json"
FORMAT = 1
CHUNK = 1 << 22  # bytes read at a time

Fingerprint = tuple[tuple[str, int, int, int], ...]


class Damage(Exception):
  """What is wrong with a step folder, in words that follow its path."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """`files` is path in the folder -> (size, crc32), `extra` is name -> path in the folder."""

  step: int
  arrays: tuple[Array, ...]
  extra: Mapping[str, str]
  files: Mapping[str, tuple[int, int]]

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(size for size, _ in self.files.values())


def write(folder: Path, step: int, arrays: tuple[Array, ...], extra: Mapping[str, str]) -> Manifest:
  """Make what stands in `folder` a checkpoint: all of it safe on disk, then the manifest of it."""
  manifest = Manifest(step, arrays, extra, measured(folder, sync=True))
  for parent in sorted({(folder / name).parent for name in manifest.files}):
    sync_folder(parent)
  write_synced(folder / NAME, render(manifest))
  return manifest


def measured(folder: Path, sync: bool = False) -> dict[str, tuple[int, int]]:
  """Size and crc32 of each file in `folder`, by its path below it."""
  return {name: measure(folder / name, sync) for name in sorted(_files(folder))}


def read(folder: Path) -> Manifest:
  """The manifest of `folder`, itself whole. Raises Damage."""
  try:
    raw = (folder / NAME).read_bytes()
  except FileNotFoundError:
    what = "is no complete checkpoint" if folder.is_dir() else "does not exist"
    raise Damage(f"{what}: there is no {folder.name}/{NAME}") from None
  except OSError as error:
    raise Damage(f"cannot be read: {NAME}: {error.strerror}") from error
  return parse(raw, folder.name)


def parse(raw: bytes, name: str) -> Manifest:
  """The manifest that a file of the step folder `name` holds. Raises Damage."""
  try:
    body = json.loads(raw)
    if body["format"] != FORMAT and raw == _seal(body):
      raise Damage(f"is of format {body['format']}, this version reads format {FORMAT}")
    manifest = _parse(body)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise Damage(f"is damaged: {NAME} is not as it was written") from None
  if raw != render(manifest):
    raise Damage(f"is damaged: {NAME} is not as it was written")
  if name.isdecimal() and name != str(manifest.step):
    raise Damage(f"is a copy of step {manifest.step} under another name")
  return manifest


def fingerprint(folder: Path, manifest: Manifest) -> Fingerprint:
  """What the file system says of each file. Raises Damage when one is not of its size."""
  prints = []
  for name, (size, _) in manifest.files.items():
    try:
      stat = (folder / name).stat()
    except FileNotFoundError:
      raise Damage(f"is damaged: {name} is missing") from None
    except OSError as error:
      raise Damage(f"cannot be read: {name}: {error.strerror}") from error
    if stat.st_size != size:
      raise Damage(f"is damaged: {name} has {stat.st_size} bytes, not {size}")
    prints.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
  return tuple(prints)


def check_content(folder: Path, manifest: Manifest) -> None:
  """Read every file and hold it against its checksum. Raises Damage."""

  def verdict(name: str) -> str | None:
    try:
      found = measure(folder / name)
    except OSError as error:
      return f"cannot be read: {name}: {error.strerror}"
    return None if found == manifest.files[name] else f"is damaged: {name} is not as it was written"

  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # crc32 and reads free the GIL
    for problem in threads.map(verdict, manifest.files):
      if problem:
        raise Damage(problem)


def measure(path: Path, sync: bool = False) -> tuple[int, int]:
  """A file's size and crc32, which sees every flipped bit; with `sync` it outlives the power."""
  size = crc = 0
  with path.open("rb", buffering=0) as file:
    buffer = memoryview(bytearray(min(CHUNK, os.fstat(file.fileno()).st_size + 1)))
    while count := file.readinto(buffer):
      crc = zlib.crc32(buffer[:count], crc)
      size += count
    if sync:
      os.fsync(file.fileno())
  return size, crc


def write_synced(path: Path, content: bytes) -> None:
  """Write a file that is there whole or not at all, whenever the process or the machine stops."""
  temporary = path.with_name(path.name + ".writing")
  with temporary.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
  """Make the names in `folder` outlive a loss of power."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _files(folder: Path) -> Iterator[str]:
  for parent, _, names in os.walk(folder):
    for name in names:
      yield (Path(parent) / name).relative_to(folder).as_posix()


def render(manifest: Manifest) -> bytes:
  """What stands in the file."""
  return _seal({"format": FORMAT, **dataclasses.asdict(manifest)})


def _seal(body: dict[str, Any]) -> bytes:
  """JSON that ends with the checksum of the rest of it."""
  rest = {key: value for key, value in body.items() if key != "crc32"}
  crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
  return (json.dumps({**rest, "crc32": crc}) + "\n").encode()


def _parse(body: dict[str, Any]) -> Manifest:
  arrays = tuple(Array(**{**a, "shape": tuple(a["shape"])}) for a in body["arrays"])
  files = {name: (size, crc) for name, (size, crc) in body["files"].items()}
  return Manifest(body["step"], arrays, body["extra"], files)
