"""`python -m maxtext.inspect RUN_OR_CHECKPOINT [hash=true]`: a checkpoint's arrays, a line each."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from maxtext.checkpoints.arrays import shape_text
from maxtext.checkpoints.lookup import locate
from maxtext.checkpoints.manifest import Manifest
from maxtext.errors import ConfigError, closest, run_cli

USAGE = """usage: python -m maxtext.inspect RUN_OR_CHECKPOINT [hash=true] [debug=true]

Prints a line per array, tab separated: path, shape, dtype, the sharding it was saved with and, with
hash=true, the sha256 of its bytes in C order. RUN_OR_CHECKPOINT is a run's folder, its checkpoints
folder (the newest complete step of either is taken) or one step. Standard output has nothing that
depends on where or when: `diff <(... runs/a hash=true) <(... runs/b hash=true)` compares two runs.
"""
OPTIONS = ("hash", "debug")


def main(argv: list[str]) -> int:
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  path, options = parse(argv)
  folder, manifest = locate(path)
  print(f"step {manifest.step}: {folder}, {manifest.size / 1e6:.1f} MB", file=sys.stderr)
  for line in lines(folder, manifest, hashed=options["hash"]):
    print(line)
  return 0


def parse(argv: list[str]) -> tuple[str, dict[str, bool]]:
  """The path and every option of a command line. Raises ConfigError."""
  paths, options = [], dict.fromkeys(OPTIONS, False)
  for argument in argv:
    key, equals, value = argument.partition("=")
    if not equals or Path(argument).exists():
      paths.append(argument)
    elif key not in OPTIONS:
      known = ", ".join(OPTIONS)
      raise ConfigError("command line", f"{key!r} is no option{closest(key, OPTIONS)} ({known})")
    elif value not in ("true", "false"):
      raise ConfigError("command line", f"{key}={value!r} is not true or false")
    else:
      options[key] = value == "true"
  if len(paths) != 1:
    given = " ".join(paths) or "none"
    raise ConfigError("command line", f"one run or checkpoint is inspected at a time, not {given}")
  return paths[0], options


def lines(folder: Path, manifest: Manifest, hashed: bool) -> Iterator[str]:
  """A line per array of the step in `folder`, sorted by path. Raises CheckpointError."""
  for array in sorted(manifest.arrays, key=lambda array: array.path):
    columns = [array.path, shape_text(array.shape), array.dtype, array.sharding]
    if hashed:
      # only what hashes waits for TensorStore and numpy
      from maxtext.checkpoints.stores import Store

      content = Store(folder).read(array).ravel().view("uint8")
      columns.append(hashlib.sha256(content.data).hexdigest())
    yield "\t".join(columns)


if __name__ == "__main__":
  run_cli(main)
