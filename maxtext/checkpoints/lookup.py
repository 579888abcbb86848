"""The checkpoint that a path or a URL leads to: of a run, of its checkpoints, or itself one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from maxtext import hosts
from maxtext.bucket import is_url
from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.folder import STATE, Folder, read_extra
from maxtext.checkpoints.manifest import Damage, Manifest
from maxtext.checkpoints.remote import copied
from maxtext.errors import CheckpointError


def locate(path: str | Path) -> tuple[Path, Manifest]:
  """The newest whole step of a run folder or a checkpoints folder, or a step folder itself: the one
  that process 0 finds.

  Raises CheckpointError, which says what was looked for.
  """
  if is_url(str(path)):
    return _found(_newest(copied(str(path))))
  return _found(Path(hosts.first(lambda: str(_newest(Path(path).expanduser())))))


def _found(found: Path) -> tuple[Path, Manifest]:
  try:
    return found, manifests.read(found)
  except Damage as damage:
    raise CheckpointError(f"{found} {damage}") from None


def locate_with_extra(path: str | Path) -> tuple[Path, Manifest, dict[str, Any]]:
  """As `locate`, and what stands beside the arrays, though a run that trains deletes steps."""
  while True:
    step, manifest = locate(path)
    try:
      return step, manifest, read_extra(step, manifest)
    except CheckpointError:
      if not passed_by(path, step):
        raise


def passed_by(path: str | Path, step: Path) -> bool:
  """Whether a step that `locate` has found at `path` is gone, so that it would find another now."""
  return hosts.alone() and not step.is_dir() and Path(path).expanduser() != step


def _newest(path: Path) -> Path:
  """The step that `locate` means, every byte of it as it was written."""
  wanted = "give a run's folder, its checkpoints folder or one step in it"
  try:
    names = {entry.name for entry in os.scandir(path)}
  except OSError as error:
    raise CheckpointError(f"{path}: {error.strerror}: {wanted}") from error
  if names & {manifests.NAME, STATE}:
    _whole(path)
    return path
  folder = Folder(path / "checkpoints" if "checkpoints" in names else path)
  step = folder.newest()
  if step is None:
    inside = (
      f"in {folder.path}/<step>/"
      if "checkpoints" in names
      else ("in it, in <step>/ and in checkpoints/<step>/")
    )
    raise CheckpointError(
      f"{path} holds no complete checkpoint: looked for {manifests.NAME} {inside}; {wanted}"
    )
  return folder.step(step)


def promising(path: str | Path) -> bool:
  """Whether `locate` has something to look at: judged by names alone, and without a word."""
  path = Path(path).expanduser()
  steps = Folder(path / "checkpoints" if (path / "checkpoints").is_dir() else path).named()
  return bool(steps) or any((path / name).exists() for name in (manifests.NAME, STATE))


def _whole(folder: Path) -> None:
  try:
    manifest = manifests.read(folder)
    manifests.fingerprint(folder, manifest)
    manifests.check_content(folder, manifest)
  except Damage as damage:
    raise CheckpointError(f"{folder} {damage}") from None
