"""Arrays to and from a step folder's `state/`. Only this file imports Orbax, which takes 0.5 s."""

from __future__ import annotations

import logging
import math
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.sections import Checkpoint
from maxtext.log import log

# Orbax gives up after 10 minutes unless told otherwise: too early for a large model.
TIMEOUT_SECONDS = 6 * 3600
# Bytes of what stands at an index of leading axes, in all and on one device, that are a file's
# chunk by themselves: so that a layer, or an expert of it, can be read without all others.
PIECE, SHARE = 1 << 18, 1 << 14


class Writer:
  """Writes states, one at a time: `start` returns when the arrays are needed no more.

  `apart`: each process to a disk of its own, what all have written being one state. Databases of
  several processes cannot be laid together, so arrays are in files of their own then.
  """

  def __init__(self, section: Checkpoint, apart: bool = False):
    whose = ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)
    # Splitting replicas pays over hosts only: in one process it compiles a slice for every shape,
    # and the first save blocks for a second. Weights do not compress: 7 %, for 3 times the CPU.
    arrays = ocp.type_handlers.ArrayHandler(
      use_replica_parallel=jax.process_count() > 1, primary_host=whose.primary_host
    )
    handler = ocp.PyTreeCheckpointHandler(
      use_ocdbt=section.checkpoint_storage_use_ocdbt and not apart,
      use_zarr3=section.checkpoint_storage_use_zarr3,
      use_compression=False,
      type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
      multiprocessing_options=whose,
    )
    # One process's folder is not there because another's is: each waits for its own.
    how = ocp.options.AsyncOptions(
      timeout_secs=TIMEOUT_SECONDS, create_directories_asynchronously=not apart
    )
    self._checkpointer = ocp.AsyncCheckpointer(
      handler, async_options=how, multiprocessing_options=whose
    )

  def start(self, folder: Path, state: Any) -> None:
    """Copy `state` to the host and begin to write the new `folder`. Raises what Orbax raises."""
    tree = _nested(state)
    args = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_pieces, tree))
    self._checkpointer.save(folder.absolute(), args=args)

  def finish(self) -> None:
    """Wait until the arrays are written, by every process. Raises what Orbax raises."""
    self._checkpointer.wait_until_finished()

  def close(self) -> None:
    self._checkpointer.close()


def read(folder: Path, target: Any) -> Any:
  """The arrays that `target` (of jax.ShapeDtypeStruct) names, as it shards them, and no others.

  Shapes and dtypes must be the checkpoint's: Orbax casts in silence. Raises what Orbax raises.
  """

  def place(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)

  wanted = _nested(target)
  arguments = ocp.args.PyTreeRestore(
    item=wanted, restore_args=jax.tree.map(place, wanted), partial_restore=True
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    arrays = checkpointer.restore(folder.absolute(), args=arguments)
  leaves, structure = jax.tree_util.tree_flatten_with_path(target)
  return jax.tree.unflatten(structure, [_at(arrays, keys) for keys, _ in leaves])


def describe(tree: Any) -> tuple[Array, ...]:
  """Every array of a tree of jax.Array or jax.ShapeDtypeStruct, in the order of their paths."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = []
  for keys, leaf in leaves:
    names = [_name(key) for key in keys]
    shape, sharding = tuple(leaf.shape), getattr(leaf, "sharding", None)
    arrays.append(
      Array("/".join(names), shape, str(leaf.dtype), _layout(sharding, len(shape)), ".".join(names))
    )
  for spelling in ("path", "stored"):  # {'a.b': ...} and {'a': {'b': ...}} are one name to Orbax
    if len({getattr(array, spelling) for array in arrays}) < len(arrays):
      raise ValueError(
        "two arrays of this tree have one name: their keys differ by '.' or '/' only"
      )
  return tuple(sorted(arrays, key=lambda array: array.path))


def _nested(tree: Any) -> dict[str, Any]:
  """Any tree as dicts of dicts by the names of its keys: so it stands on disk."""
  root: dict[str, Any] = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  for keys, leaf in leaves:
    *parents, last = map(_name, keys)
    node = root
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return root


def _pieces(array: jax.Array) -> ocp.SaveArgs:
  """Which axes of an array are cut on disk, besides those that devices have cut."""
  inner, axes = array.sharding.shard_shape(array.shape), 0
  size = lambda shape: math.prod(shape[axes + 1 :]) * array.dtype.itemsize
  while axes < array.ndim - 2 and size(array.shape) >= PIECE and size(inner) >= SHARE:
    axes += 1
  return ocp.SaveArgs(shard_axes=tuple(range(axes)))


def _at(root: dict[str, Any], keys: tuple[Any, ...]) -> Any:
  node = root
  for key in keys:
    node = node[_name(key)]
  return node


def _name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  raise TypeError(f"{key!r} is not a key that a checkpoint can have")


def _layout(sharding: jax.sharding.Sharding | None, dimensions: int) -> str:
  """`[fsdp - data+tensor] on data 2 fsdp 2 tensor 2`: each dimension's mesh axes, and the mesh.

  Axes of size 1 split nothing and are left out.
  """
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return f"[{' '.join('-' * dimensions)}]"
  sizes = {str(axis): size for axis, size in sharding.mesh.shape.items() if size > 1}
  spec = [*sharding.spec, *[None] * (dimensions - len(sharding.spec))]
  axes = [axis if isinstance(axis, tuple) else (axis,) for axis in spec]
  split = ["+".join(axis for axis in group if axis in sizes) or "-" for group in axes]
  mesh = " ".join(f"{axis} {size}" for axis, size in sizes.items())
  return f"[{' '.join(split)}] on {mesh or 'one device'}"


def _quiet() -> None:
  """Keep Orbax off the terminal: its errors come out as ours, once."""

  def others(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    lost = record.exc_info[2] if record.exc_info else None  # of an error that nobody asked for
    places = [record.pathname, message, *(frame.filename for frame in traceback.extract_tb(lost))]
    if not any("/orbax/" in place for place in places):
      return True
    log.debug("orbax: %s", message)
    return False

  unraisable = sys.unraisablehook

  def hook(lost: sys.UnraisableHookArgs) -> None:
    # When one write fails Orbax closes its event loop, and the others then cannot report to it.
    if not (
      isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"
    ):
      unraisable(lost)

  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(others)
  warnings.filterwarnings("ignore", module=r"orbax\.")
  sys.unraisablehook = hook


_quiet()
