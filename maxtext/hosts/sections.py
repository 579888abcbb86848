"""The `hosts` section: whether this process is one of several, and how they watch each other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated

from maxtext.bounds import LARGEST, Bound, Count, Whole

PLACE = (
  "jax_distributed_coordinator_address",
  "jax_distributed_num_processes",
  "jax_distributed_process_id",
)


@dataclasses.dataclass(frozen=True)
class Hosts:
  jax_distributed_coordinator_address: str
  jax_distributed_num_processes: Count | None
  jax_distributed_process_id: Whole | None
  jax_distributed_initialization_timeout: Count
  jax_distributed_heartbeat_timeout_seconds: Annotated[int, Bound(4, LARGEST)]
  skip_jax_distributed_system: bool
  exit_code_when_stopped: Annotated[int, Bound(0, 255)]

  def complaints(self) -> Iterator[tuple[str, ...]]:
    address, count, number = (getattr(self, key) for key in PLACE)
    missing = [key for key in PLACE if getattr(self, key) in ("", None)]
    given = [key for key in PLACE if key not in missing]
    if missing and given:
      yield given[0], f"counts only beside {missing[0]}, which is not set; set it too"
    if address and not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", address):
      yield PLACE[0], f"{address!r} is not of the form host:port; write it like host0:8482"
    if None not in (count, number) and number >= count:
      problem = f"{number} of {count} processes; they are numbered from 0 to {count - 1}"
      yield PLACE[2], problem, PLACE[1]
