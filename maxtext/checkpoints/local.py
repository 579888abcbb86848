"""Copies of a run's state that each process keeps of its own part, on a disk of its own host.

Nothing is sent anywhere, so they can be made often; what a lost host has had is read from the
checkpoints that all hosts share.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxtext import hosts
from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.folder import STATE, Folder
from maxtext.checkpoints.manager import Checkpoints, Extra
from maxtext.checkpoints.manifest import Damage, Manifest
from maxtext.errors import CheckpointError

KEEP = 2  # the last one that all hosts have, and the one that some are writing
OWNER, LAYOUT = "run", "layout"  # what stands beside the state: whose it is, and which parts
MARK = "run.id"  # in a run's checkpoints folder: who moves that away begins anew
Layout = dict[str, list[Any]]  # path -> [dtype, the parts' [begin, end] of each axis]


class Local(Checkpoints):
  """The steps of the run in `run` that all its processes have copies of in
  `local_checkpoint_directory`, and those of `shared`: of both, the nearest is used.

  A copy is used only by the processes that wrote it, for a state that is split as it was then, as
  `like` (of jax.ShapeDtypeStruct with shardings) is.
  """

  def __init__(self, run: Path, shared: Checkpoints, like: Any):
    section = shared._section
    parent = Path(section.local_checkpoint_directory).expanduser() / run.name
    super().__init__(parent / f"process-{hosts.number()}", section)
    self._folder = _Own(self.directory, self._fits)
    self._shared, self._seals = shared, True
    self._layout = layout(like)
    self._mark = shared.directory / MARK
    known = lambda: self._mark.read_text(errors="replace") if self._mark.is_file() else ""
    self._owner = hosts.first(known)
    self._lock: Any = None

  _decide = staticmethod(lambda decide: decide())  # each for its own part

  def save(self, step: int, state: Any, extra: Extra, *, force: bool = False) -> bool:
    self._own()
    beside = {OWNER: self._run, LAYOUT: self._layout}
    return super().save(step, state, {**extra, **beside}, force=force)

  def close(self) -> None:
    """Of both, as of one."""
    try:
      super().close()
    finally:
      self._shared.close()

  def steps(self) -> tuple[int, ...]:
    return tuple(sorted({*self._everywhere(), *self._shared.steps()}))

  def newest(self) -> int | None:
    newest = self._shared.newest()
    return max([*self._everywhere(), *(() if newest is None else (newest,))], default=None)

  def drop(self, step: int) -> None:
    if step in self._folder.named():
      self._folder.drop(step)
    if step in self._shared.steps():
      self._shared.drop(step)

  def restore(self, step: int, target: Any) -> Any:
    if step not in self._everywhere():
      return self._shared.restore(step, target)
    folder = self._folder.step(step)
    try:
      return read(folder / STATE, target)
    except OSError as error:
      raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error

  def extra(self, step: int) -> dict[str, Any]:
    return super().extra(step) if step in self._everywhere() else self._shared.extra(step)

  def _manifest(self, step: int) -> Manifest:
    return self._folder.manifest(step, content=False)

  def _arrays(self, state: Any) -> tuple[()]:
    return ()  # a copy is for its own process only, whose layout says it all

  def _make_writer(self) -> Writer:
    return Writer()

  def _seal(
    self, building: Path, step: int, arrays: tuple[Array, ...], files: dict[str, tuple[str, bytes]]
  ) -> int:
    self._shared.keep_up()  # as for any checkpoint, the metrics must not end before it
    return super()._seal(building, step, arrays, files)

  def _retire(self, step: int) -> None:
    self._folder.retire(KEEP, step)

  @property
  def _run(self) -> dict[str, Any]:
    return {"id": self._owner, "processes": jax.process_count()}

  def _everywhere(self) -> list[int]:
    """The steps that every process has whole, ascending; a line says what one has damaged."""
    self._join()
    found = hosts.each({step: self._folder.problem(step) for step in self._folder.named()})
    for problem in sorted({problem for each in found for problem in each.values()} - {""}):
      self._folder.report([problem], "not used")
    return sorted(int(s) for s in found[0] if all(each.get(s) == "" for each in found))

  def _fits(self, folder: Path, manifest: Manifest) -> None:
    """Whether a copy is this run's, and of the parts that this process has. Raises Damage."""
    beside = {
      name: json.loads((folder / file).read_text())
      for name, file in manifest.extra.items()
      if name in (OWNER, LAYOUT)
    }
    if beside.get(OWNER, {}).get("id") != self._owner:
      raise Damage("is of another run, or from before this one was begun anew")
    if beside != {OWNER: self._run, LAYOUT: self._layout}:
      raise Damage("is of a state that was split in another way")

  def _own(self) -> None:
    """Before the first save: have the folder for this run alone, with nothing in it that is of no
    use. Raises CheckpointError.
    """
    if self._lock is not None:
      return

    def mark() -> str:
      self._mark.parent.mkdir(parents=True, exist_ok=True)
      manifests.write_synced(self._mark, uuid.uuid4().hex.encode())
      return self._mark.read_text()

    try:
      self._owner = self._owner or hosts.first(mark)
      self.directory.mkdir(parents=True, exist_ok=True)
      self._lock = (self.directory / ".lock").open("w")
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      what = "another run writes there" if error.errno == errno.EAGAIN else error.strerror
      place = error.filename or self.directory  # the mark is on the disk that all share
      raise CheckpointError(f"{place} cannot be used: {what}") from error
    used = self._everywhere()
    for step in self._folder.named():
      if step not in used:
        self._folder.drop(step)
    hosts.each(None)  # none saves before all have dropped what they have of another time


class _Own(Folder):
  """A folder whose steps are whole only where they fit, too: `fits` raises Damage."""

  def __init__(self, path: Path, fits: Callable[[Path, Manifest], None]):
    super().__init__(path)
    self._fits = fits

  def _check(self, step: int) -> Manifest:
    manifest = super()._check(step)
    self._fits(self.step(step), manifest)
    return manifest


class Writer:
  """Writes this process's parts of a state, one after the other, into one file."""

  def start(self, folder: Path, state: Any) -> None:
    """Copy them to the host's memory."""
    arrays = [x for _, x in _named(state)]
    for x in arrays:
      x.copy_to_host_async()
    self._path = folder
    self._parts = [part for x in arrays for part in _parts(x)]

  def finish(self) -> None:
    """Write them. Raises OSError."""
    with self._path.open("wb") as file:
      for part in self._parts:
        file.write(part.reshape(-1).view(np.uint8).data)
    self._parts = []

  def close(self) -> None:
    """There is nothing to let go."""


def read(path: Path, target: Any) -> Any:
  """The state that `target` describes from this process's parts of it. Raises OSError."""
  made = {}
  with path.open("rb") as file:
    for name, like in _named(target):
      parts = {}
      for index in _indices(like):
        shape, dtype = [end - begin for begin, end in index], np.dtype(like.dtype)
        content = np.fromfile(file, np.uint8, math.prod(shape) * dtype.itemsize)
        parts[index] = content.view(dtype).reshape(shape)
      pick = lambda index, shape=like.shape, parts=parts: parts[_spelt(index, shape)]
      made[name] = jax.make_array_from_callback(like.shape, like.sharding, pick)
  return jax.tree_util.tree_map_with_path(lambda path, _: made[_name(path)], target)


def layout(tree: Any) -> Layout:
  """Which parts of a tree of jax.Array or jax.ShapeDtypeStruct this process has."""
  as_json = lambda index: [list(span) for span in index]
  return {name: [str(x.dtype), *map(as_json, _indices(x))] for name, x in _named(tree)}


Index = tuple[tuple[int, int], ...]


def _parts(x: jax.Array) -> Iterator[np.ndarray]:
  """Copies of the different parts that this process has of an array, in order."""
  parts = {_spelt(shard.index, x.shape): shard.data for shard in x.addressable_shards}
  return (np.array(parts[index], copy=True, order="C") for index in sorted(parts))


def _indices(x: jax.Array | jax.ShapeDtypeStruct) -> list[Index]:
  found = x.sharding.addressable_devices_indices_map(x.shape).values()
  return sorted({_spelt(index, x.shape) for index in found})


def _spelt(index: Any, shape: tuple[int, ...]) -> Index:
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _named(tree: Any) -> list[tuple[str, Any]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return sorted(((_name(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0])


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
