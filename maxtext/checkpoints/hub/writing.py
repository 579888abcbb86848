"""Write a model as the Hugging Face hub has it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from maxtext.checkpoints import safetensors
from maxtext.checkpoints.hub.model import INDEX, WHOLE
from maxtext.checkpoints.tables import Index, Slot

Read = Callable[[str, Index | None], np.ndarray]


def write_tensors(
  folder: Path, slots: Sequence[Slot], read: Read, dtype: np.dtype, limit: int
) -> int:
  """Write every tensor in files of at most `limit` bytes, one at a time -> bytes in all.

  `read(path, index)` is a parameter of ours, or what stands at an index of it. Raises OSError.
  """
  shards = _shards(slots, dtype, limit)
  names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  names = names if len(names) > 1 else [WHOLE]
  for name, shard in zip(names, shards, strict=True):
    shapes = {slot.name: slot.shape for slot in shard}
    safetensors.write(folder / name, shapes, dtype, _made(shard, read, dtype))
  total = sum(_size(slot, dtype) for slot in slots)
  if len(shards) > 1:
    places = {slot.name: name for name, shard in zip(names, shards) for slot in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return total


def _made(shard: Sequence[Slot], read: Read, dtype: np.dtype) -> Iterator[np.ndarray]:
  for slot in shard:
    yield slot.join([read(path, index) for path, index, _ in slot.parts]).astype(dtype, copy=False)


def _shards(slots: Sequence[Slot], dtype: np.dtype, limit: int) -> list[list[Slot]]:
  shards: list[list[Slot]] = [[]]
  size = 0
  for slot in slots:
    if shards[-1] and size + _size(slot, dtype) > limit:
      shards.append([])
      size = 0
    shards[-1].append(slot)
    size += _size(slot, dtype)
  return shards


def _size(slot: Slot, dtype: np.dtype) -> int:
  return math.prod(slot.shape) * dtype.itemsize
