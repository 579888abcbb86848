"""A run's checkpoints: saved while it trains on, restored onto any mesh, used only when whole."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from maxtext import hosts
from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.arrays import Array, difference
from maxtext.checkpoints.folder import STATE, Folder, read_extra
from maxtext.checkpoints.lookup import locate, passed_by
from maxtext.checkpoints.manifest import Manifest
from maxtext.checkpoints.sections import Checkpoint
from maxtext.errors import CheckpointError
from maxtext.log import log

HISTORY = "history"  # of a state: what a guard knows of the last steps
Extra = Mapping[str, str | Mapping[str, Any]]


def preload() -> threading.Thread:
  """Import Orbax in the background, for instance while the step compiles; join() is not needed."""
  thread = threading.Thread(target=_storage, name="import orbax")
  thread.start()
  return thread


class Checkpoints:
  """The steps of one run. `directory` is `<run>/checkpoints`, untouched before the first save.

  Use it in a `with`, so that a save under way is finished. With several processes each of them
  makes the same calls; process 0 decides, seals and deletes.
  """

  _decide = staticmethod(hosts.first)

  def __init__(self, directory: Path, section: Checkpoint):
    self.directory = Path(directory)
    self.place = str(directory)  # for people
    self._section = section
    self._folder = Folder(self.directory)
    self._writer: Any = None
    self._thread: threading.Thread | None = None
    self._failure: CheckpointError | None = None
    self._broken = False  # whether the last save failed, which closing Orbax may say once more
    self._seals = hosts.is_first()
    self.under_way: tuple[int, float] | None = None  # the step of a save, and when it began

  def due(self, step: int) -> bool:
    """Whether `checkpoint_period` asks for a checkpoint after `step` finished steps."""
    return self._section.enable_checkpointing and step % self._section.checkpoint_period == 0

  def save(self, step: int, state: Any, extra: Extra, *, force: bool = False) -> bool:
    """Save the state after `step` finished steps; returns whether it did.

    It does when the step is due or forced, and not there yet. `state` is any tree of jax.Array, and
    may be donated as soon as this returns. A mapping in `extra` is kept as JSON, a text as YAML.
    Raises CheckpointError, also for the save before: what it was writing is gone, older steps stay.
    """
    begun = time.monotonic()
    self.wait()
    if not self._section.enable_checkpointing or not (force or self.due(step)):
      return False
    if self._decide(lambda: self._folder.whole(step)):
      return False
    files = {name: _file(name, value) for name, value in extra.items()}
    arrays = self._arrays(state)
    building = self._begin(step)
    try:
      self._writer = self._writer or self._make_writer()
      self._writer.start(building / STATE, state)
      self._broken = False
    except Exception as error:  # Orbax and TensorStore raise whatever the layer below raised
      self._broken = True
      self._abandon(building)
      raise self._trouble(step, error) from error
    waited = time.monotonic() - begun
    self.under_way = step, begun

    def finish() -> None:
      try:
        self._writer.finish()
        if self._seals:
          size = self._seal(building, step, arrays, files)
          took = time.monotonic() - begun
          line = "saved %s: %.1f MB in %.1f s, training waited %.2f s"
          blocked = waited if self._section.async_checkpointing else took
          log.info(line, self._folder.place(step), size / 1e6, took, blocked)
      except Exception as error:  # raised where the caller can see it
        self._failure, self._broken = self._trouble(step, error), True
        self._abandon(building)
      finally:
        self.under_way = None

    self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
    self._thread.start()
    if not self._section.async_checkpointing:
      self.wait()
    return True

  def wait(self) -> None:
    """Wait until what was saved is on disk. Raises CheckpointError when it could not be written."""
    self._join()
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def close(self) -> None:
    """wait(), then let Orbax's threads go. Raises CheckpointError."""
    try:
      self.wait()
    finally:
      self._release()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
    """close(); when an error is on its way already, a failed save is logged beside it."""
    try:
      self.close()
    except CheckpointError as failure:
      if error is None:
        raise
      log.error(str(failure))

  def steps(self) -> tuple[int, ...]:
    """The steps that are whole, ascending: complete, and every byte as it was written; the same in
    every process.
    """
    self._join()
    return tuple(hosts.first(lambda: list(self._folder.steps())))

  def newest(self) -> int | None:
    """The newest whole step, the same in every process; a line says what was passed over."""
    self._join()
    return hosts.first(self._folder.newest)

  def damaged(self) -> tuple[int, ...]:
    """The steps that have a folder and are not whole, ascending, the same in every process."""
    self._join()
    broken = lambda: [step for step in self._folder.named() if not self._folder.whole(step)]
    return tuple(hosts.first(broken))

  def drop(self, step: int) -> None:
    """Delete a step."""
    hosts.first(lambda: self._folder.drop(step))

  def restore(self, step: int, target: Any) -> Any:
    """The state of a step, as `target` (of jax.ShapeDtypeStruct with shardings) describes it; a
    history that it has not, or of another length, is left out.

    Raises CheckpointError when the step is not whole, or is of another model.
    """
    self.wait()
    arrays, once = self._manifest(step).arrays, self._section.enable_single_replica_ckpt_restoring
    return _restore(self._folder.step(step), arrays, target, once)

  def extra(self, step: int) -> dict[str, Any]:
    """What was saved beside the state: mappings as they were, texts as they were."""
    return read_extra(self._folder.step(step), self._manifest(step))

  def keep_up(self) -> None:
    """Have all else of the run where its checkpoints are, as far as that works."""

  def _release(self) -> None:
    writer, self._writer = self._writer, None
    try:
      if writer is not None:
        writer.close()
    except Exception as error:  # Orbax and TensorStore raise whatever the layer below raised
      if not self._broken:
        cause = _cause(error)
        raise CheckpointError(f"{self.place}: cannot be closed: {cause}") from error

  def _join(self) -> None:
    """Let a save under way come to its end, whichever that is."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None

  def _manifest(self, step: int) -> Manifest:
    """The manifest of a step that process 0 has found whole. Raises CheckpointError."""
    hosts.first(lambda: self._folder.manifest(step).step)
    return self._folder.manifest(step, content=False)

  def _begin(self, step: int) -> Path:
    """The folder in which a step is built, made by process 0."""

    def make() -> None:
      try:
        if self._writer is None:
          self._folder.clean()
        self._folder.prepare(step)
      except OSError as error:
        raise self._trouble(step, error) from error

    self._decide(make)
    return self.directory / f"{step}.saving"

  def _arrays(self, state: Any) -> tuple[Array, ...]:
    """What a manifest says of the arrays. Raises ValueError."""
    return _storage().describe(state)

  def _make_writer(self) -> Any:
    return _storage().Writer(self._section)

  def _retire(self, step: int) -> None:
    """Delete what is not to be kept beside a new step."""
    if (keep := self._section.max_num_checkpoints_to_keep) > 0:
      period, best = self._section.checkpoint_keep_period, self._section.checkpoint_keep_best
      self._folder.retire(keep, step, period, best)

  def _seal(
    self, building: Path, step: int, arrays: tuple[Array, ...], files: dict[str, tuple[str, bytes]]
  ) -> int:
    """Make a checkpoint of what is written and delete the oldest; returns its size in bytes."""
    for name, content in files.values():
      (building / name).write_bytes(content)
    manifest = manifests.write(
      building, step, arrays, {key: name for key, (name, _) in files.items()}
    )
    self._folder.publish(building, step)
    self._folder.remember(step, manifest)
    self._retire(step)
    return manifest.size

  def _abandon(self, building: Path) -> None:
    if self._seals:
      self._folder.discard(building)

  def _trouble(self, step: int, error: Exception) -> CheckpointError:
    trouble = CheckpointError(f"{self._folder.place(step)}: cannot be saved: {_cause(error)}")
    trouble.__cause__ = error
    return trouble


def restore_state(path: str | Path, target: Any, once: bool = False) -> tuple[Any, dict[str, Any]]:
  """State and extra of the newest step of a run or a checkpoints folder, or of one step; `once`
  reads each part in one process only.
  """
  folder, manifest = locate(path)
  return _restore(folder, manifest.arrays, target, once), read_extra(folder, manifest)


def restore_parameters(path: str | Path, target_params: Any, once: bool = False) -> Any:
  """The parameters alone, from where `path` leads as in restore_state; no optimizer state is read.

  Raises CheckpointError when nothing whole is there, or the parameters are of another model.
  """
  return read_parameters(*locate(path), target_params, once)


def read_parameters(
  folder: Path, manifest: Manifest, target_params: Any, once: bool = False
) -> Any:
  """As restore_parameters, of a step that `locate` has found.

  They are rounded to the target's dtypes if they have others, which a line says.
  """
  params = tuple(array for array in manifest.arrays if array.path.startswith("params/"))
  kinds = {array.path: array.dtype for array in params}

  def saved(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    name = f"params/{jax.tree_util.keystr(path, simple=True, separator='/')}"
    return like.update(dtype=kinds.get(name, like.dtype))

  there = jax.tree_util.tree_map_with_path(saved, target_params)
  found = _restore(folder, params, {"params": there}, once)["params"]
  pairs = zip(jax.tree.leaves(there), jax.tree.leaves(target_params), strict=True)
  changes = {f"{a.dtype} as {b.dtype}" for a, b in pairs if a.dtype != b.dtype}
  if changes:
    log.info(f"{folder}: taking {', '.join(sorted(changes))}")
  return jax.tree.map(lambda x, like: x.astype(like.dtype), found, target_params)


def restore_newest(
  path: str | Path, step: Path, manifest: Manifest, target_params: Any
) -> tuple[Manifest, Any]:
  """read_parameters of a `step` that `locate` has found at `path`; where a run that trains on has
  deleted it since, of the one that is its newest now. Raises CheckpointError.
  """
  while True:
    try:
      return manifest, read_parameters(step, manifest, target_params)
    except CheckpointError:
      if not passed_by(path, step):
        raise
    step, manifest = locate(path)


def _restore(folder: Path, arrays: tuple[Array, ...], target: Any, once: bool) -> Any:
  storage = _storage()
  here = {array.path: array for array in storage.describe(target)}
  there = {array.path: array for array in arrays}
  if str(there.get(HISTORY)) != str(here.get(HISTORY)):  # no part of the model
    target = {name: part for name, part in target.items() if name != HISTORY}
    here.pop(HISTORY, None), there.pop(HISTORY, None)
  if different := difference(there.values(), here.values()):
    raise CheckpointError(f"{folder} is of another model: {different}")
  if once:
    replicas = importlib.import_module("maxtext.checkpoints.replicas")  # imports TensorStore
    return replicas.read(folder, arrays, target)
  try:
    return storage.read(folder / STATE, target)
  except Exception as error:  # Orbax and TensorStore raise whatever the layer below raised
    raise CheckpointError(f"{folder} cannot be read: {_cause(error)}") from error


def _storage() -> ModuleType:
  """The module that imports Orbax, when it is first needed."""
  return importlib.import_module("maxtext.checkpoints.storage")


def _file(name: str, value: str | Mapping[str, Any]) -> tuple[str, bytes]:
  """File name and content as they are now; the caller may go on and change the value."""
  if isinstance(value, str):
    return f"{name}.yml", value.encode()
  return f"{name}.json", json.dumps(value).encode()


def _cause(error: BaseException) -> str:
  """One line that says why, in the operating system's own words where they are passed on."""
  seen: BaseException | None = error
  while seen is not None:
    if isinstance(seen, OSError) and seen.strerror:
      return seen.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(seen)):
      return os.strerror(int(code[1]))
    if str(seen).startswith("NOT_FOUND:"):
      return os.strerror(errno.ENOENT)
    seen = seen.__cause__ or seen.__context__
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]
