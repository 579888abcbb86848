"""What a process tells JAX before JAX is imported, and what it finds afterwards."""

from __future__ import annotations

import os
import re
from pathlib import Path

from maxtext.config.run import Run

_FORCED = "--xla_force_host_platform_device_count"


def prepare(run: Run) -> None:
  """Put platform, virtual devices and compilation cache into the environment; to be called before
  jax is imported.
  """
  if run.hardware != "auto":
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(run.hardware, run.hardware)
  if run.devices is not None:
    flags = re.sub(rf"{_FORCED}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} {_FORCED}={run.devices}".strip()
  if run.jax_cache_dir:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(run.jax_cache_dir).expanduser()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL", "2"
  )  # XLA's remarks on its own cache are not for users
