"""What a process tells JAX before JAX is imported, and what it finds afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from maxtext.config.run import FORCED, Run
from maxtext.errors import ConfigError
from maxtext.log import log

READ_FLAGS = (  # all that reads XLA_FLAGS, in 0.1 s
  "from jaxlib import xla_client as x; x.CompileOptions().executable_build_options.debug_options"
)


def prepare(run: Run, several: bool = False) -> None:
  """Put platform, virtual devices and compilation cache into the environment; to be called before
  jax is imported. `several`: whether this is one process of several.

  Raises ConfigError for XLA_FLAGS that XLA ends the process for.
  """
  _check_flags(os.environ.get("XLA_FLAGS", ""))
  if run.hardware != "auto":
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(run.hardware, run.hardware)
  if run.devices is not None:
    flags = re.sub(rf"{FORCED}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} {FORCED}={run.devices}".strip()
  # XLA's CPU backend loses the order of a kept program's collectives: they wait for each other
  several = several and run.hardware not in ("gpu", "tpu")
  several = several or (run.forced_devices(os.environ) or 1) > 1
  if run.jax_cache_dir and not several and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _keep_programs(Path(run.jax_cache_dir).expanduser())
  # XLA's and JAX's remarks on their own cache are not for users
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _check_flags(flags: str) -> None:
  """Ask a process of its own what XLA says of flags, if there are others than ours."""
  if not re.sub(rf"{FORCED}=\d+", "", flags).strip():
    return
  environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
  command = [sys.executable, "-c", READ_FLAGS]
  asked = subprocess.run(command, capture_output=True, text=True, env=environment)
  if found := re.findall(r"^[EF]\d{4} .*?\] (.*)", asked.stderr, re.MULTILINE):
    problem = f"{found[0].rstrip('.')[:200]}; XLA takes only what it knows: change it, or unset it"
    raise ConfigError("XLA_FLAGS (environment)", problem)


def _keep_programs(folder: Path) -> None:
  """Have JAX keep compiled programs in `folder`; a run that cannot is slower to start, no more."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    log.warning(f"jax_cache_dir: {folder} cannot be written ({error.strerror}); compiling anew")
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def memory(device: Any, count: int) -> int | None:
  """Bytes that a jax.Device has, of `count` in this process; None where it does not say."""
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
  return (device.memory_stats() or {}).get("bytes_limit")
