"""Read the arrays of a step folder as numpy on any machine, by TensorStore alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.folder import STATE
from maxtext.errors import CheckpointError


def read(folder: Path, array: Array) -> np.ndarray:
  """One array of the step in `folder`, in C order. Raises CheckpointError."""
  state = (folder / STATE).absolute()
  try:
    store = tensorstore.open(_spec(state, array.stored), read=True).result()
    return np.asarray(store.read(order="C").result(), order="C")
  except (OSError, ValueError, KeyError) as error:
    reason = (str(error).splitlines() or [""])[0][:200]
    raise CheckpointError(f"{folder} cannot be read: {array.path}: {reason}") from error


def _spec(state: Path, name: str) -> dict[str, Any]:
  """Where Orbax puts the array `name`: in files of its own, or in an OCDBT database."""
  metadata = json.loads((state / "_METADATA").read_text())
  driver = "zarr3" if metadata["use_zarr3"] else "zarr"
  if metadata["use_ocdbt"]:
    store = {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}
  else:
    store = {"driver": "file", "path": f"{state / name}/"}
  return {"driver": driver, "kvstore": store}
