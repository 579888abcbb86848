"""Files of the safetensors format, read and written one tensor at a time.

A file is the length of its header, 8 bytes little-endian; the header, a JSON mapping of names to
dtype, shape and where in the rest the bytes stand; and the rest, in C order without gaps. The
package safetensors would hold all tensors of a file that it writes in memory at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from maxtext.errors import CheckpointError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER = 100_000_000  # the most bytes of a header that the format allows
ALIGNMENT = 8


@dataclass(frozen=True)
class Tensor:
  """One tensor in a file, its bytes from `begin` to `end`."""

  file: Path
  name: str
  kind: str
  shape: tuple[int, ...]
  begin: int
  end: int

  @property
  def dtype(self) -> np.dtype:
    """Raises CheckpointError for one that is not of a floating point format of 16 bits or more."""
    if self.kind not in DTYPES:
      known = ", ".join(DTYPES)
      raise CheckpointError(
        f"{self.file}: {self.name} is {self.kind}, and only {known} are read; quantised weights "
        "have to be written in one of these first"
      )
    return DTYPES[self.kind]

  def read(self) -> np.ndarray:
    """Raises CheckpointError."""
    array = np.empty(self.shape, self.dtype)
    with _opened(self.file) as file:
      file.seek(self.begin)
      if file.readinto(_bytes(array)) != array.nbytes:
        raise CheckpointError(f"{self.file} is truncated: {self.name} is not whole")
    return array


def tensors(path: Path) -> dict[str, Tensor]:
  """What a file holds, by name. Raises CheckpointError for one that is not whole."""
  with _opened(path) as file:
    size = path.stat().st_size
    length = struct.unpack("<Q", head)[0] if len(head := file.read(8)) == 8 else 0
    if not 2 <= length <= min(HEADER, size - 8):
      raise CheckpointError(f"{path} is truncated, or no safetensors file: its header is not whole")
    raw = file.read(length)
  try:
    header = {name: v for name, v in json.loads(raw).items() if name != "__metadata__"}
    found = {name: _tensor(path, name, v, 8 + length) for name, v in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError):
    raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
  last = max((tensor.end for tensor in found.values()), default=8 + length)
  if last != size:
    what = "is truncated" if size < last else "has bytes that belong to no tensor"
    raise CheckpointError(f"{path} {what}: it has {size} bytes, not {last}")
  return found


def write(
  path: Path,
  shapes: Mapping[str, Sequence[int]],
  dtypes: Mapping[str, np.dtype],
  arrays: Iterable[np.ndarray],
) -> None:
  """A file of tensors, each taken from `arrays` and written before the next.

  Raises OSError.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, shape in shapes.items():
    begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
    header[name] = {
      "dtype": NAMES[dtypes[name]],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % ALIGNMENT)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
      assert array.shape == tuple(shape) and array.dtype == dtypes[name]
      file.write(_bytes(np.ascontiguousarray(array)))


def _tensor(path: Path, name: str, told: Mapping[str, Any], start: int) -> Tensor:
  shape = tuple(int(size) for size in told["shape"])
  begin, end = told["data_offsets"]
  tensor = Tensor(path, name, str(told["dtype"]), shape, start + begin, start + end)
  wide = DTYPES[tensor.kind].itemsize if tensor.kind in DTYPES else None
  if not 0 <= begin <= end or (wide and end - begin != math.prod(shape) * wide):
    raise ValueError(name)
  return tensor


def _bytes(array: np.ndarray) -> memoryview:
  return array.reshape(-1).view(np.uint8).data


def _opened(path: Path) -> BufferedReader:
  try:
    return path.open("rb")
  except OSError as error:
    raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
