"""A run as what starts it knows it: its name, its words, and the machine it is to have."""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any

from maxtext.jobs.machines import Machine
from maxtext.jobs.sections import BUCKET, Launch

LONGEST = 40  # characters of a name: what Kubernetes puts behind it leaves 63 no more
GOOD_FOR_NOTHING = (2, 3, 4, 5)  # exit codes of a run that would end in the same way again
CRASHED, AGAIN = 1, 75


@dataclasses.dataclass(frozen=True)
class Job:
  """`words` follow `python -m train`; `folder` is the run's, where it runs; `slices` of `machine`
  train as one.
  """

  run_name: str
  folder: str
  words: tuple[str, ...]
  launch: Launch
  machine: Machine
  slices: int = 1

  @property
  def name(self) -> str:
    """The run's name as Kubernetes and xpk take it; two runs have two."""
    name = re.sub(r"[^a-z0-9]+", "-", self.run_name.lower()).strip("-")
    if name != self.run_name or len(name) > LONGEST or not name[:1].isalpha():
      mark = f"{zlib.crc32(self.run_name.encode()):08x}"
      name = f"{'' if name[:1].isalpha() else 'run-'}{name}"[: LONGEST - 9].rstrip("-")
      name = f"{name}-{mark}"
    return name

  @property
  def command(self) -> list[str]:
    return ["python", "-m", "train", *self.words]

  @property
  def bucket(self) -> str:
    """The bucket that is mounted, if it is one."""
    found = re.fullmatch(BUCKET, self.launch.launch_volume)
    return found[0].removeprefix("gs://") if found else ""


def place(coordinator: str, count: int, number: Any) -> dict[str, Any]:
  """The variables by which process `number` of `count` finds the others (hosts.find)."""
  return {
    "JAX_COORDINATOR_ADDRESS": coordinator,
    "JAX_NUM_PROCESSES": str(count),
    "JAX_PROCESS_ID": number,
  }
