"""Eight virtual CPU devices stand for a mesh; set before jax is imported anywhere.

Programs are compiled in haste: tests compile much and run little. XLA's CPU backend gives the same
program, up to how its code is made, in less than half the time.
"""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
  "xla_force_host_platform_device_count": "8",
  "xla_backend_optimization_level": "0",
  "xla_cpu_use_fusion_emitters": "false",
}
given = os.environ.get("XLA_FLAGS", "")
wanted = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *wanted]).strip()


MAPS = 30_000  # of memory; a process may have 65,530 on Linux, and dies where it asks for more


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
  """Each takes up to a hundred memory maps."""
  yield
  forget_programs()


@pytest.fixture(autouse=True)
def compiled_programs_of_a_sweep_end_in_time(request):
  yield
  maps = Path("/proc/self/maps")
  if request.node.get_closest_marker("slow") and maps.exists():
    if maps.read_bytes().count(b"\n") > MAPS:
      forget_programs()


@pytest.fixture(autouse=True)
def the_log_ends_with_its_test():
  """A run that a test starts takes the log over; the next test finds it as it was."""
  log = logging.getLogger("maxtext")
  before = log.handlers[:], log.propagate, log.level
  yield
  log.handlers[:], log.propagate = before[:2]
  log.setLevel(before[2])


def forget_programs():
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
    gc.collect()
