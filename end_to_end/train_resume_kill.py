"""A run killed with SIGKILL at random moments equals one that was left alone, bit for bit.

20 kills with packing, shuffling, accumulation and dropout on, then a few with each of them changed.
  python end_to_end/train_resume_kill.py [kills]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from end_to_end.kills import kill_and_resume
from end_to_end.runs import Run, check, report

VARIANTS = {
  "all_on": (),
  "unpacked": ("packing=false",),
  "first_fit": ("grain_packing_type=first_fit",),
  "best_fit": ("grain_packing_type=best_fit",),
  "unshuffled": ("enable_data_shuffling=false",),
  "one_pass": ("gradient_accumulation_steps=1", "per_device_batch_size=16"),
  "saved_in_step": ("async_checkpointing=false",),
}


def equal(parent: Path, variant: str, kills: int, seed: int) -> None:
  """Train `variant` twice, once with kills, and compare all that the two left."""
  keys = VARIANTS[variant]
  whole, killed = Run(parent, f"{variant}-whole", keys), Run(parent, f"{variant}-killed", keys)
  whole.train()
  for kill in kill_and_resume(killed, kills, seed):
    print(f"  {variant}: killed {kill.moment}, step {kill.step}, {' '.join(kill.checkpoints)}")
  check(killed.hashes() == whole.hashes(), f"{variant}: parameters or optimizer differ")
  check(killed.losses() == whole.losses(), f"{variant}: the loss lines differ")
  check(len({step for step, *_ in whole.losses()}) == 60, f"{variant}: not 60 steps of metrics")
  print(f"  {variant}: {kills} kills, every array and loss equal", flush=True)


def main(kills: int) -> None:
  with tempfile.TemporaryDirectory() as parent:
    for seed, variant in enumerate(VARIANTS):
      equal(Path(parent), variant, kills if variant == "all_on" else max(1, kills // 5), seed)


if __name__ == "__main__":
  report(main, int(sys.argv[1]) if len(sys.argv) > 1 else 20)
