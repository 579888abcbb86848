"""Files at URLs (gs://, s3://, hf:// ...) -> copies here, through fsspec."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from maxtext.bucket import PACKAGES
from maxtext.data.errors import brief
from maxtext.data.prepared import INDEX, MANIFEST
from maxtext.data.records import package
from maxtext.errors import DataError


def find(where: str, pattern: str, cache: str) -> list[tuple[str, str]]:
  """(path of the copy, URL) of each file, in the order of their names. Raises DataError."""
  protocol = pattern.split("://")[0]
  fsspec = package("fsspec", f"{where}: URLs")
  if not cache:
    raise DataError(f"{where}: files at URLs are copied here first; set dataset_cache_dir")
  if protocol in PACKAGES:
    package(PACKAGES[protocol], f"{where}: {protocol}:// URLs")
  try:
    system, path = fsspec.core.url_to_fs(pattern)
    several = any(sign in path for sign in "*?[")
    found = system.glob(path, detail=True) if several else {path: system.info(path)}
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    if not names:
      raise DataError(f"{where}: no file there matches")
    return [(str(_copy(system, name, cache)), f"{protocol}://{name}") for name in names]
  except DataError:
    raise
  except FileNotFoundError:
    raise DataError(f"{where}: no file there matches") from None
  except PermissionError as error:
    what = f"access is denied ({brief(error)}); give credentials that may list and read it"
    raise DataError(f"{where}: {what}") from None
  except Exception as error:  # what a store's client raises is its own
    raise DataError(f"{where}: {type(error).__name__}: {brief(error)}") from None


def _copy(system: Any, name: str, cache: str) -> Path:
  """The file of a name and of the version that is there now, copied once."""
  key = hashlib.sha256(f"{name} {system.ukey(name)}".encode()).hexdigest()[:24]
  folder, _, last = name.rpartition("/")
  path = Path(cache).expanduser() / key / last
  if not path.is_file():
    path.parent.mkdir(parents=True, exist_ok=True)
    # of prepared files; the file itself is last
    beside = [f"{folder}/{MANIFEST}", f"{name}{INDEX}"]
    for each in [*filter(system.isfile, beside), name]:
      with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        system.get_file(each, str(Path(scratch, "file")))
        os.replace(Path(scratch, "file"), path.parent / each.rpartition("/")[2])
  return path
