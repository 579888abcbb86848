"""Files kept from run to run, named by what they hold, so that a damaged one is never read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from maxtext.log import log


class Cache:
  """A folder of files KIND-KEY-SHA256.SUFFIX: KEY is of what a file is made from, SHA256 its own.

  A key must always give the same content; any number of processes may then write at once.
  """

  def __init__(self, folder: str):
    """`folder` may begin with `~`; the empty string keeps nothing."""
    self.folder = Path(folder).expanduser() if folder else None

  def find(self, kind: str, key: str, suffix: str) -> Path | None:
    """The file of this key, or None. One that its name belies is deleted, with a warning."""
    if self.folder is None:
      return None
    for path in sorted(self.folder.glob(f"{kind}-{key[:24]}-*{suffix}")):
      with contextlib.suppress(OSError):
        if _sha256(path) == path.name.removesuffix(suffix).rpartition("-")[2]:
          return path
        log.warning("%s is damaged, and made again", path)
        path.unlink()
    return None

  def keep(self, kind: str, key: str, suffix: str, content: bytes) -> None:
    """Write a file at once or not at all; a folder that cannot be written is warned of."""
    if self.folder is None:
      return
    path = self.folder / f"{kind}-{key[:24]}-{hashlib.sha256(content).hexdigest()}{suffix}"
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
        Path(scratch, "file").write_bytes(content)
        os.replace(Path(scratch, "file"), path)
    except OSError as error:
      log.warning("tokenizer_cache_dir: %s is not kept: %s", path, error.strerror)


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
