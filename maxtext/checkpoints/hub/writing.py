"""Write a model as the Hugging Face hub has it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from maxtext.checkpoints import safetensors
from maxtext.checkpoints.hub.model import INDEX, WHOLE
from maxtext.checkpoints.tables import Index, Slot

Dtypes = Mapping[str, np.dtype]  # by the names of tensors
Read = Callable[[str, Index | None], np.ndarray]


def write_tensors(
  folder: Path, slots: Sequence[Slot], read: Read, dtypes: Dtypes, limit: int
) -> int:
  """Write every tensor in files of at most `limit` bytes, one at a time -> bytes in all.

  In a file the wider dtypes come first, so that each tensor begins at a multiple of its own.
  `read(path, index)` is a parameter of ours, or what stands at an index of it. Raises OSError.
  """
  shards = _shards(slots, dtypes, limit)
  names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  names = names if len(names) > 1 else [WHOLE]
  for name, shard in zip(names, shards, strict=True):
    shard.sort(key=lambda slot: -dtypes[slot.name].itemsize)
    shapes = {slot.name: slot.shape for slot in shard}
    safetensors.write(folder / name, shapes, dtypes, _made(shard, read, dtypes))
  total = sum(_size(slot, dtypes) for slot in slots)
  if len(shards) > 1:
    places = {slot.name: name for name, shard in zip(names, shards) for slot in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return total


def _made(shard: Sequence[Slot], read: Read, dtypes: Dtypes) -> Iterator[np.ndarray]:
  for slot in shard:
    whole = slot.join([read(path, index) for path, index, _ in slot.parts])
    yield whole.astype(dtypes[slot.name], copy=False)


def _shards(slots: Sequence[Slot], dtypes: Dtypes, limit: int) -> list[list[Slot]]:
  shards: list[list[Slot]] = [[]]
  size = 0
  for slot in slots:
    if shards[-1] and size + _size(slot, dtypes) > limit:
      shards.append([])
      size = 0
    shards[-1].append(slot)
    size += _size(slot, dtypes)
  return shards


def _size(slot: Slot, dtypes: Dtypes) -> int:
  return math.prod(slot.shape) * dtypes[slot.name].itemsize
