"""A model of 7 billion parameters is converted, there and back, in little memory.

Random weights, in bfloat16. It needs 28 GB of disk.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from end_to_end.peaks import gigabytes, run
from end_to_end.runs import Skip, check, report
from maxtext import config, conversion, program
from maxtext.checkpoints.hub.model import open_model, write_config
from maxtext.checkpoints.hub.writing import write_tensors
from maxtext.checkpoints.tables import Index, slots

MODEL, DISK = "llama2-7b", 32e9


def main(model: str) -> None:
  with tempfile.TemporaryDirectory() as folder:
    parent = Path(folder)
    if (free := shutil.disk_usage(parent).free) < DISK:
      raise Skip(f"{parent} has {free / 1e9:.0f} GB left, and {DISK / 1e9:.0f} are needed")
    largest = make(model, parent / "hub")
    limit = (3 * largest + 2e9) / 1e9
    before = checksums(parent / "hub")
    print(f"  the largest tensor has {largest / 1e6:.0f} MB, so that {limit:.2f} GB are allowed")
    _, took = run("-m", "maxtext.convert", "from_hf", parent / "hub", parent / "run")
    print(f"  from_hf: {took}")
    check(gigabytes(took) < limit, f"from_hf took {took}")
    shutil.rmtree(parent / "hub")
    _, took = run("-m", "maxtext.convert", "to_hf", parent / "run", parent / "back")
    print(f"  to_hf: {took}")
    check(gigabytes(took) < limit, f"to_hf took {took}")
    check(checksums(parent / "back") == before, "the tensors are not what they were")


def make(name: str, folder: Path) -> int:
  """A model of a preset's sizes -> the bytes of its largest tensor."""
  loaded = config.load([f"model_name={name}", "vocab_size=32000"], {}, purpose="decode")
  spec, draw = loaded.decoder(), np.random.default_rng(0)
  shapes = {path: each.shape for path, each in program.plan(loaded, spec).declared.items()}
  family, written = conversion.named(loaded, spec)
  wanted, dtype = slots(family.table, shapes, program.stages(spec)), np.dtype("bfloat16")

  def read(path: str, index: Index | None) -> np.ndarray:
    shape = shapes[path] if index is None else shapes[path][1:]
    numbers = draw.integers(0x3C00, 0x3D00, shape, np.uint16)  # the bits of numbers about 0.01
    return numbers.view(dtype)

  folder.mkdir()
  write_tensors(folder, wanted, read, {slot.name: dtype for slot in wanted}, conversion.SHARD)
  write_config(folder, written | {"torch_dtype": "bfloat16"})
  return max(tensor.end - tensor.begin for tensor in open_model(folder).tensors.values())


def checksums(folder: Path) -> dict[str, int]:
  tensors = open_model(folder).tensors
  return {name: zlib.crc32(tensor.read().view(np.uint16).data) for name, tensor in tensors.items()}


if __name__ == "__main__":
  report(main, sys.argv[1] if len(sys.argv) > 1 else MODEL)
