"""A full disk ends a run with code 4 and one line, and the last good checkpoint is whole.

On a file system of its own that has room for about two checkpoints; then the disk grows, and the
same command finishes the run. Needs root, to mount a tmpfs.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from end_to_end.runs import Run, Skip, check, report

# 2.9 million parameters: 35 MB a checkpoint.
KEYS = ("base_emb_dim=256", "base_mlp_dim=1024", "steps=12", "max_num_checkpoints_to_keep=-1")


@contextlib.contextmanager
def disk(megabytes: int) -> Iterator[Path]:
  """A small file system, mounted for a while."""
  with tempfile.TemporaryDirectory() as place:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", place]
    if subprocess.run(mount, capture_output=True).returncode:
      raise Skip("cannot mount a tmpfs here")
    try:
      yield Path(place)
    finally:
      subprocess.run(["umount", "--lazy", place], check=True)


def grow(place: Path, megabytes: int) -> None:
  subprocess.run(["mount", "-o", f"remount,size={megabytes}m", place], check=True)


def fills_up(parent: Path, *keys: str) -> None:
  """Exit code 4; what was saved before is whole; with more room the run goes on and ends well."""
  run = Run(parent, "full", (*KEYS, *keys))
  output = run.start().ends(4)
  last = output.splitlines()[-1]
  check("Traceback" not in output, f"a traceback:\n{output}")
  check(str(run.folder) in last and len(last) < 300, f"not one line that names the path: {last!r}")
  print(f"  {last}")
  good = run.hashes()
  saved = {int(name) for name in run.checkpoints() if name.isdigit()}
  grow(parent, 1000)
  check(run.hashes() == good, "growing the disk changed the last good checkpoint")
  after = run.train()
  first = next(line for line in after.splitlines() if line.startswith("completed step: "))
  step = int(first.removeprefix("completed step: ").partition(",")[0])
  check(step in saved and step > 0, f"went on with {first!r}, saved were {sorted(saved)}")
  print(f"  with more room: went on with step {step}, and finished")


def main() -> None:
  for keys in ((), ("async_checkpointing=false",)):
    with disk(100) as place:
      fills_up(place, *keys)


if __name__ == "__main__":
  report(main)
