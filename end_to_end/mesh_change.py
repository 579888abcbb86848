"""A run that goes on with another mesh has the losses of one that never changed it.

It begins on 8 x 1 devices (data x fsdp) and goes on with 2 x 4, 2 x 2 x 2 (with tensor) and one
device. In float32 every loss is within 1e-5 of that of the run which stayed on 8 x 1: another mesh
adds the same numbers in another order.
"""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

from end_to_end.runs import Run, check, report

TOLERANCE = 1e-5
STEPS = 40
KEYS = (f"steps={STEPS}", "dropout_rate=0", "learning_rate=1.0e-3")
MESHES = (
  ("devices=8", "per_device_batch_size=1", "ici_data_parallelism=8"),
  ("devices=8", "per_device_batch_size=1", "ici_data_parallelism=2"),
  ("devices=8", "per_device_batch_size=1", "ici_data_parallelism=2", "ici_tensor_parallelism=2"),
  ("devices=1", "per_device_batch_size=8"),
)


def losses(run: Run) -> dict[int, float]:
  return {step: loss for step, name, loss in run.losses() if name == "learning/loss"}


def main() -> None:
  with tempfile.TemporaryDirectory() as parent:
    stayed, moved = Run(Path(parent), "stayed", KEYS), Run(Path(parent), "moved", KEYS)
    stayed.train(*MESHES[0])
    for number, mesh in enumerate(MESHES[:-1], 1):
      process = moved.start(*mesh)
      process.reach(number * STEPS // len(MESHES) - 1)
      process.send(signal.SIGTERM)
      process.ends(0)
      print(f"  {' '.join(mesh)}: stopped after step {process.step()}", flush=True)
      check(process.step() < STEPS - 1, "the run ended before its mesh could change")
    moved.train(*MESHES[-1])
    one, other = losses(stayed), losses(moved)
    check(list(one) == list(other) == list(range(STEPS)), f"steps {list(one)} and {list(other)}")
    worst = max(one, key=lambda step: abs(other[step] / one[step] - 1))
    off = abs(other[worst] / one[worst] - 1)
    print(f"  largest difference: {off:.1e} at step {worst} (loss {one[worst]:.6f})")
    check(off <= TOLERANCE, f"step {worst}: loss {other[worst]!r}, and {one[worst]!r} on 8 x 1")


if __name__ == "__main__":
  report(main)
