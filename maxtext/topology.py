"""The `compile` section, and the devices that it names: by the names that clouds give them."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from maxtext.bounds import Count
from maxtext.errors import ConfigError
from maxtext.jobs.machines import Machine, find, kind_of

KEY = "compile_topology"
EXTRA = "tpu"  # what installs the TPU's compiler


@dataclasses.dataclass(frozen=True)
class Kind:
  """Chips of one generation: what JAX calls one, the most of a host, and cycles per second."""

  named: str
  host: tuple[int, ...]
  clock: float


# Clocks are those with which the matrix units make the published peaks of estimate/chips.py.
KINDS = {
  "v4": Kind("TPU v4", (2, 2, 1), 1.05e9),
  "v5e": Kind("TPU v5 lite", (2, 2, 1), 1.5e9),
  "v5p": Kind("TPU v5", (2, 2, 1), 1.75e9),
  "v6e": Kind("TPU v6 lite", (2, 2, 1), 1.75e9),
  "tpu7x": Kind("TPU7x", (2, 2, 1), 2.2e9),
}
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

  def options(self) -> dict[str, str]:
    """The compiler's options by name, from `--name=value ...`."""
    found = {}
    for word in shlex.split(self.compile_xla_flags):
      if not (flag := re.fullmatch(r"--(xla\w+)=(.+)", word)):
        raise ConfigError("compile_xla_flags", f"{word[:60]!r} is no --xla_NAME=VALUE; write it so")
      found[flag[1]] = flag[2]
    return found


def parse(name: str) -> Machine:
  """A slice by its common name: v5p-128 and v4-128 count cores, two to a chip, v5e-256 and v6e-256
  count chips; v5p-4x4x8 is a shape of chips; cpu-8 is eight virtual devices. Raises ConfigError.
  """
  if found := re.fullmatch(r"cpu-([1-9]\d{0,5})", name):
    return Machine(name, "", 1, 1, int(found[1]))
  machine = find(name.lower(), KEY)
  if kind_of(machine.name) not in KINDS:
    problem = f"{name}: no step is compiled for GPUs that are not there yet; name a TPU, or cpu-8"
    raise ConfigError(KEY, problem)
  return machine


def kind_named(named: str) -> str | None:
  """The kind that JAX calls so."""
  return next((kind for kind, own in KINDS.items() if own.named == named), None)


def demand(section: Compile, devices: Sequence[Any], slices: int) -> None:
  """Refuse other devices than the configuration names, if it names any. Raises ConfigError."""
  if not section.compile_topology:
    return
  machine, asked = parse(section.compile_topology), section.compile_topology_num_slices
  named = KINDS[kind_of(machine.name)].named if machine.topology else "cpu"
  if asked not in (None, slices):
    raise ConfigError("compile_topology_num_slices", f"{asked}, but num_slices={slices}; use null")
  kind = devices[0].device_kind
  if (kind, len(devices)) != (named, machine.devices * slices):
    wanted = f"{machine.devices * slices} x {named}"
    problem = f"{machine.name} is {wanted}, and here are {len(devices)} x {kind}; leave it away"
    raise ConfigError(KEY, problem)


def prepare(machine: Machine, environ: MutableMapping[str, str]) -> None:
  """Have JAX compute on CPUs, and libtpu be content with a machine that has no TPU; to be called
  before jax is imported.
  """
  environ["JAX_PLATFORMS"] = "cpu"
  if machine.topology:
    for name, value in ENVIRONMENT.items():
      environ.setdefault(name, value)


def devices(machine: Machine, slices: int) -> list[Any]:
  """The devices, described; raises ConfigError where their compiler is not installed."""
  import jax
  from jax.experimental import topologies

  if not machine.topology:
    return jax.devices()
  kind, shape = kind_of(machine.name), [int(size) for size in machine.topology.split("x")]
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if kind == "v4":  # whose two cores JAX takes for one device on Cloud TPUs
    options["chip_config_name"] = "megacore"
  if math.prod(shape) < math.prod(KINDS[kind].host):
    options["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
  name = f"{kind}:{machine.topology}"
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
  except Exception as error:  # JAX's own kinds of it differ by what is missing
    what = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    problem = f"the TPU's compiler is not there or refuses it ({what})"
    remedy = f"install the extra: pip install 'maxtext[{EXTRA}]'"
    raise ConfigError(KEY, f"{problem}; {remedy}") from None
  return list(found.devices)
