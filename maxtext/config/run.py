"""The `run` section: what the run is called, where it writes and what it runs on."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from maxtext.bounds import Count, Whole
from maxtext.bucket import is_url
from maxtext.config.values import shown

FORCED = "--xla_force_host_platform_device_count"  # how many devices XLA makes of a CPU


@dataclasses.dataclass(frozen=True)
class Run:
  run_name: str
  base_output_directory: str
  model_name: str
  hardware: Literal["auto", "cpu", "gpu", "tpu"]
  devices: Count | None
  run_cache_dir: str
  jax_cache_dir: str
  init_weights_seed: Whole
  resume_changes: tuple[str, ...]
  log_config: bool
  debug: bool

  @property
  def place(self) -> str:
    """The run's folder, or its URL in a bucket."""
    if is_url(self.base_output_directory):
      return f"{self.base_output_directory.rstrip('/')}/{self.run_name}"
    return str(Path(self.base_output_directory).expanduser() / self.run_name)

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.run_name and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,99}", self.run_name):
      yield (
        "run_name",
        (
          f"{shown(self.run_name)} cannot name a folder; use at most 100 of A-Z a-z 0-9 . _ + = -, "
          "first a letter, a digit or _"
        ),
      )
    if not self.base_output_directory:
      yield "base_output_directory", "is empty; name a folder, for instance runs"
    if self.devices is not None and self.hardware != "cpu":
      yield (
        "devices",
        "virtual devices exist on CPUs only; set hardware=cpu, or leave devices away",
        "hardware",
      )

  def known_devices(self, environ: Mapping[str, str]) -> int | None:
    """How many devices a process will find, where that is known before jax is asked."""
    if self.devices is not None:
      return self.devices
    if self.hardware == "cpu" or (
      self.hardware == "auto" and environ.get("JAX_PLATFORMS") == "cpu"
    ):
      return self.forced_devices(environ) or 1
    return None

  def forced_devices(self, environ: Mapping[str, str]) -> int | None:
    """How many devices XLA_FLAGS makes of the CPU, where it says so."""
    found = re.findall(rf"{FORCED}=(\d+)", environ.get("XLA_FLAGS", ""))
    return int(found[-1]) if found else None
