"""The `compile` section, and the devices that it names: by the names that clouds give them."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from maxtext.bounds import Count
from maxtext.errors import ConfigError
from maxtext.jobs.machines import Machine, find, kind_of

KEY = "compile_topology"
MEGA = "-mega"  # machines whose chips are the same, in a faster network


@dataclasses.dataclass(frozen=True)
class Kind:
  """Chips of one generation: what JAX calls one, the most of a host, cycles per second, and the
  options of the compiler that a training step has where `compile_xla_flags` says nothing else.
  """

  named: str
  host: tuple[int, ...]
  clock: float
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Weights are gathered while something is computed: both together (docs/compiling.md has figures).
# A v6e has 128 MiB of memory beside its matrix units, of which the compiler uses a part unasked.
GATHER_BESIDE = {
  "xla_enable_async_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}

# Clocks are those with which the matrix units make the published peaks of estimate/chips.py.
KINDS = {
  "v4": Kind("TPU v4", (2, 2, 1), 1.05e9),
  "v5e": Kind("TPU v5 lite", (2, 2, 1), 1.5e9),
  "v5p": Kind("TPU v5", (2, 2, 1), 1.75e9, GATHER_BESIDE),
  "v6e": Kind(
    "TPU v6 lite",
    (2, 2, 1),
    1.75e9,
    GATHER_BESIDE | {"xla_tpu_scoped_vmem_limit_kib": str(96 * 1024)},
  ),
  "tpu7x": Kind("TPU7x", (2, 2, 1), 2.2e9),
  "h100": Kind("NVIDIA H100 80GB HBM3", (8,), 1.98e9),
}
# What XLA asks CUDA about a GPU, by the names of its GpuTargetConfig: of the SXM module, from
# NVIDIA's tuning guide for Hopper.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 device_memory_size: 80000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What libtpu asks of the machine that it is loaded on, which is none of these
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Compile:
  compile_topology: str
  compile_topology_num_slices: Count | None
  compile_xla_flags: str
  compiled_trainstep_file: str
  report_file: str

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.compile_topology:
      try:
        parse(self.compile_topology)
      except ConfigError as error:
        yield error.where, error.problem
    elif self.compile_topology_num_slices is not None:
      yield "compile_topology_num_slices", "there is no compile_topology to have slices; name one"
    try:
      self.options()
    except ConfigError as error:
      yield error.where, error.problem

  def options(self, device_kind: str = "") -> dict[str, str]:
    """The compiler's options by name: those of such devices, and above them `--name=value ...`."""
    kind = kind_named(device_kind)
    found = dict(KINDS[kind].options) if kind else {}
    for word in shlex.split(self.compile_xla_flags):
      if not (flag := re.fullmatch(r"--(xla\w+)=(.+)", word)):
        raise ConfigError("compile_xla_flags", f"{word[:60]!r} is no --xla_NAME=VALUE; write it so")
      found[flag[1]] = flag[2]
    return found


def parse(name: str) -> Machine:
  """A slice by its common name: v5p-128 and v4-128 count cores, two to a chip, v5e-256 and v6e-256
  count chips, h100-16 GPUs; v5p-4x4x8 is a shape of chips; cpu-8 is eight virtual devices. Raises
  ConfigError.
  """
  name = name.lower()
  if found := re.fullmatch(r"cpu-([1-9]\d{0,5})", name):
    return Machine(name, "", 1, 1, int(found[1]))
  machine = find(name, KEY, (*KINDS, "cpu"))
  if kind_of(machine.name) not in KINDS:
    problem = (
      f"{name}: of GPUs that are not there, h100 alone is compiled for; name h100-8, or a TPU"
    )
    raise ConfigError(KEY, problem)
  return machine


def kind_named(named: str) -> str | None:
  """The kind that JAX calls so."""
  return next((kind for kind, own in KINDS.items() if own.named == named), None)


def expect(section: Compile, machine: Machine, slices: int) -> None:
  """Refuse a machine on which `demand` would end the run, or another shape. Raises ConfigError."""
  if not section.compile_topology:
    return
  named, asked = parse(section.compile_topology), section.compile_topology_num_slices
  if asked not in (None, slices):
    raise ConfigError("compile_topology_num_slices", f"{asked}, but num_slices={slices}; use null")
  if _chips(named) != _chips(machine):
    problem = f"{named.name}, but the run is to be on {machine}; leave it away"
    raise ConfigError(KEY, f"{problem}, or name the same machine")


def _chips(machine: Machine) -> tuple[str, str, int]:
  """What is equal where two names mean one machine."""
  kind = kind_of(machine.name).removesuffix(MEGA) if machine.label else ""
  return kind, machine.topology, machine.devices


def demand(section: Compile, devices: Sequence[Any], slices: int) -> None:
  """Refuse other devices than the configuration names, if it names any. Raises ConfigError."""
  if not section.compile_topology:
    return
  machine, asked = parse(section.compile_topology), section.compile_topology_num_slices
  named = KINDS[kind_of(machine.name)].named if machine.label else "cpu"
  if asked not in (None, slices):
    raise ConfigError("compile_topology_num_slices", f"{asked}, but num_slices={slices}; use null")
  kind = devices[0].device_kind
  if (kind, len(devices)) != (named, machine.devices * slices):
    wanted = f"{machine.devices * slices} x {named}"
    problem = f"{machine.name} is {wanted}, and here are {len(devices)} x {kind}; leave it away"
    raise ConfigError(KEY, problem)


def prepare(machine: Machine, environ: MutableMapping[str, str]) -> None:
  """Have JAX compute on CPUs, and compilers be content with a machine that has nothing else; to be
  called before jax is imported.
  """
  environ["JAX_PLATFORMS"] = "cpu"
  if machine.label:
    for name, value in ENVIRONMENT.items():
      environ.setdefault(name, value)


def devices(machine: Machine, slices: int) -> list[Any]:
  """The devices, described; raises ConfigError where their compiler is not installed."""
  import jax
  from jax.experimental import topologies

  if machine.hardware == "cpu":
    return jax.devices()
  if machine.hardware == "gpu":
    if slices > 1:
      raise ConfigError("compile_topology_num_slices", f"{slices}, but GPUs have no slices; use 1")
    shape, platform = f"1x{machine.hosts}x{machine.chips}", "cuda"  # slices, hosts, of each
    how = {"topology_name": "h100", "target_config": H100, "topology": shape}
  else:
    platform, how = "tpu", _slice(machine, slices)
  try:
    found = topologies.get_topology_desc(platform=platform, **how)
  except Exception as error:  # JAX's own kinds of it differ by what is missing
    what = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    problem = f"the compiler for {machine.name} is not there or refuses it ({what})"
    remedy = f"install the extra: pip install 'maxtext[{platform}]'"
    raise ConfigError(KEY, f"{problem}; {remedy}") from None
  return list(found.devices)


def _slice(machine: Machine, slices: int) -> dict[str, Any]:
  """How JAX is to describe slices of TPUs."""
  kind, shape = kind_of(machine.name), [int(n) for n in machine.topology.split("x") if n]
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if kind == "v4":  # whose two cores JAX takes for one device on Cloud TPUs
    options["chip_config_name"] = "megacore"
  if math.prod(shape) < math.prod(KINDS[kind].host):
    options["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
  return options | {"topology_name": f"{kind}:{machine.topology}"}
