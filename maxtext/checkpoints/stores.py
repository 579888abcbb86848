"""The arrays of a step folder on any machine, by TensorStore alone: whole, or slice by slice."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.folder import STATE
from maxtext.errors import CheckpointError

CACHE = 2**24  # bytes of chunks that are kept, for when a slice is a part of one


class Store:
  """The arrays of the step in `folder`."""

  def __init__(self, folder: Path):
    self._folder, self._state = folder, (folder / STATE).absolute()
    self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
    self._open: dict[str, Any] = {}

  def read(self, array: Array, index: int | tuple[Any, ...] | None = None) -> np.ndarray:
    """An array in C order, or what stands at an index of its first axes, or a part of it by slices.

    Raises CheckpointError.
    """
    try:
      if array.stored not in self._open:
        spec = _spec(self._state, array.stored)
        opened = tensorstore.open(spec, read=True, context=self._context, recheck_cached=False)
        self._open[array.stored] = opened.result()
      store = self._open[array.stored]
      part = store if index is None else store[index]
      return np.asarray(part.read(order="C").result(), order="C")
    except (OSError, ValueError, KeyError) as error:
      reason = (str(error).splitlines() or [""])[0][:200]
      raise CheckpointError(f"{self._folder} cannot be read: {array.path}: {reason}") from error


class NewStore:
  """New arrays in a step folder, as Orbax would have them, each in files of its own.

  `chunks` are the shapes in which an array is written, by its path. Raises OSError.
  """

  def __init__(self, folder: Path, arrays: Iterable[Array], chunks: dict[str, tuple[int, ...]]):
    self._state = (folder / STATE).absolute()
    self._state.mkdir(parents=True)
    self._open = {a.path: _create(self._state, a, chunks.get(a.path, a.shape)) for a in arrays}
    stored = {a.stored: a.path.split("/", 1) for a in arrays}
    (self._state / "_METADATA").write_text(json.dumps(_tree(list(stored.values()))))
    place = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
    names = {base64.b64encode(name.encode()).decode(): place for name in stored}
    (self._state / "_sharding").write_text(json.dumps(names))

  def write(
    self, path: str, values: np.ndarray, index: int | tuple[int, ...] | None = None
  ) -> None:
    """Write an array, or what stands at an index of its leading axes; it is on disk on return."""
    store = self._open[path]
    _done((store if index is None else store[index]).write(values))


def _create(state: Path, array: Array, chunk: tuple[int, ...]) -> Any:
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": f"{state / array.stored}/"},
    "metadata": {"compressor": None, "chunks": list(chunk)},
  }
  kind = tensorstore.dtype(array.dtype)
  return _done(tensorstore.open(spec, create=True, dtype=kind, shape=array.shape))


def _done(future: Any) -> Any:
  """What comes of it. Raises OSError, of the system's number where TensorStore passes it on."""
  try:
    return future.result()
  except ValueError as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else errno.EIO
    why = os.strerror(number) if code else (str(error).splitlines() or [""])[0][:200]
    raise OSError(number, why) from error


def _tree(paths: Iterable[list[str]]) -> dict[str, Any]:
  """The _METADATA from which Orbax knows the tree."""
  value = {"value_type": "jax.Array", "skip_deserialize": False}
  entries = {
    str(tuple(path)): {
      "key_metadata": [{"key": key, "key_type": 2} for key in path],
      "value_metadata": value,
    }
    for path in paths
  }
  return {
    "tree_metadata": entries,
    "use_ocdbt": False,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }


def _spec(state: Path, name: str) -> dict[str, Any]:
  """Where Orbax puts the array `name`: in files of its own, or in an OCDBT database."""
  metadata = json.loads((state / "_METADATA").read_text())
  driver = "zarr3" if metadata["use_zarr3"] else "zarr"
  if metadata["use_ocdbt"]:
    store = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
  else:
    store = {"driver": "file", "path": f"{state / name}/"}
  return {"driver": driver, "kvstore": store}
