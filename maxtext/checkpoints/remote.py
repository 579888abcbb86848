"""Steps in a bucket. One is there once its manifest is, which is written last of all.

Nothing here imports jax. What is used is copied here first, and held against its manifest.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import re
import shutil
import tempfile
from pathlib import Path

from maxtext import hosts
from maxtext.bucket import Bucket
from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.folder import FACTS, LOSS, Folder
from maxtext.checkpoints.manifest import Damage, Manifest
from maxtext.errors import CheckpointError
from maxtext.log import log

UNFINISHED = "unfinished"  # stands in a step that is being written or deleted
CACHE = "maxtext-read-"  # folders of what is only read, gone as the process ends


class Steps(Folder):
  """The steps in a bucket; `path` has copies of those that were asked for, one at a time."""

  def __init__(self, path: Path, bucket: Bucket):
    super().__init__(path)
    self.bucket = bucket

  def place(self, step: int) -> str:
    return f"{self.bucket.url}/{step}"

  def named(self) -> list[int]:
    return sorted(int(name) for name in self._folders() - self._litter())

  def clean(self) -> None:
    super().clean()
    if hosts.is_first():
      for name in self._litter():
        self._clear(int(name))

  def manifest(self, step: int, content: bool = True) -> Manifest:
    return super().manifest(step)

  def steps(self) -> tuple[int, ...]:
    """Those of which every file is there in its size; a step's content is read as it is used."""
    return tuple(step for step in self.named() if self._complete(step))

  def drop(self, step: int) -> None:
    try:
      self.begin(step)
      self._clear(step)
    except OSError as error:
      log.warning("%s: cannot be deleted: %s", self.place(step), error.strerror)
    shutil.rmtree(self.step(step), ignore_errors=True)
    self._whole.pop(step, None)

  def begin(self, step: int) -> None:
    """Say that what stands in a step is none. Raises OSError."""
    self.bucket.write(f"{step}/{UNFINISHED}", b"")
    self.bucket.delete([f"{step}/{manifests.NAME}"])

  def commit(self, step: int, manifest: Manifest) -> None:
    """Say that a step is there. Raises OSError."""
    self.bucket.write(f"{step}/{manifests.NAME}", manifests.render(manifest))
    self.bucket.delete([f"{step}/{UNFINISHED}"])

  def _clear(self, step: int) -> None:
    """Delete what stands in an unfinished step. Raises OSError."""
    mark = f"{step}/{UNFINISHED}"
    self.bucket.delete([name for name in self.bucket.files(str(step)) if name != mark])
    self.bucket.delete([mark])

  def _folders(self) -> set[str]:
    names = {name.partition("/")[0] for name in self._listed()}
    return {n for n in names if n.isascii() and n.isdecimal() and str(int(n)) == n}

  def _litter(self) -> set[str]:
    """Steps that are marked as unfinished, and are."""
    there = self._listed()
    marked = {
      name.removesuffix(f"/{UNFINISHED}") for name in there if name.endswith(f"/{UNFINISHED}")
    }
    return {step for step in marked & self._folders() if f"{step}/{manifests.NAME}" not in there}

  def _is_named(self, step: int) -> bool:
    return step in self.named()

  def _check(self, step: int) -> Manifest:
    raw, here = self._raw(step), self.step(step) / manifests.NAME
    if not here.is_file() or here.read_bytes() != raw:
      self._fetch(step, raw)
    return super()._check(step)

  def _fetch(self, step: int, raw: bytes) -> None:
    """Copy a step here, in place of others. Raises Damage or CheckpointError."""
    try:
      for old in super().named():
        shutil.rmtree(self.step(old))
      folder = self.prepare(step)
      (folder / manifests.NAME).write_bytes(raw)
      names = manifests.read(folder).files
      self.bucket.below(str(step)).fetch(names, folder)
      folder.rename(self.step(step))
    except FileNotFoundError as error:
      name = str(error.filename).removeprefix(f"{self.place(step)}/")
      raise Damage(f"is damaged: {name} is missing") from None
    except OSError as error:
      why = f"cannot be copied to {self.path}: {error.strerror}"
      raise CheckpointError(f"{self.place(step)} {why}") from error

  def _complete(self, step: int) -> bool:
    with contextlib.suppress(Damage):
      files = manifests.parse(self._raw(step), str(step)).files
      there = self._listed(str(step))
      return all(there.get(f"{step}/{name}") == size for name, (size, _) in files.items())
    return False

  def _loss(self, step: int) -> float:
    with contextlib.suppress(Damage, KeyError, ValueError, TypeError, OSError):
      name = manifests.parse(self._raw(step), str(step)).extra[FACTS]
      return float(json.loads(self.bucket.read(f"{step}/{name}"))[LOSS])
    return math.inf

  def _raw(self, step: int) -> bytes:
    """The manifest of a step as it is there. Raises Damage or CheckpointError."""
    try:
      return self.bucket.read(f"{step}/{manifests.NAME}")
    except FileNotFoundError:
      what = f"is no complete checkpoint: there is no {step}/{manifests.NAME}"
      raise Damage(what) from None
    except OSError as error:
      raise CheckpointError(f"{self.place(step)} cannot be read: {error.strerror}") from error

  def _listed(self, folder: str = "") -> dict[str, int]:
    try:
      return self.bucket.files(folder)
    except OSError as error:
      why = f"cannot be listed: {error.strerror}"
      raise CheckpointError(f"{self.bucket.url}: {why}") from error


def copied(url: str) -> Path:
  """A copy of the run, the checkpoints or the step at a URL, for this process alone, with the
  newest whole step, or the one that is named. Raises CheckpointError.
  """
  match = re.fullmatch(r"(.*?)(/checkpoints(?:/(\d+))?)?/?", url)
  assert match is not None
  run, below, wanted = match.groups()
  scratch = tempfile.mkdtemp(prefix=CACHE)
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  folder = Path(scratch) / run.rpartition("/")[2]
  try:
    mirror = hosts.Mirror(Bucket(run), folder)
    mirror.pull()
  except OSError as error:
    raise CheckpointError(f"{url}: {error.strerror}") from None
  steps = Steps(folder / "checkpoints", mirror.bucket.below("checkpoints"))
  step = hosts.first(lambda: int(wanted) if wanted else steps.newest())
  if step is None:
    raise CheckpointError(f"{url} holds no complete checkpoint: looked for {manifests.NAME} in it")
  steps.manifest(step)
  return folder / below.strip("/") if below else folder
