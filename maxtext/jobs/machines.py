"""What can be rented: chips, hosts and labels of TPU slices and of nodes with GPUs, by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator

from maxtext.errors import ConfigError

# Kind -> GKE's label, the largest slice in chips. The number in a name counts cores in the upper
# ones, of which a chip has two, and chips in the lower ones. From GKE's pages on planning TPUs.
TORI = {  # three-dimensional
  "v4": ("tpu-v4-podslice", 4096),
  "v5p": ("tpu-v5p-slice", 8960),
  "tpu7x": ("tpu7x", 9216),
}
PLANES = {"v5e": ("tpu-v5-lite-podslice", 256), "v6e": ("tpu-v6e-slice", 256)}
SMALL = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
BELOW_A_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}
# Kind -> GKE's label, xpk's name; eight on a node (machines a2, a3 and a4).
GPUS = {
  "a100-40gb": ("nvidia-tesla-a100", "a100-40gb-8"),
  "a100": ("nvidia-a100-80gb", ""),
  "h100": ("nvidia-h100-80gb", "h100-80gb-8"),
  "h100-mega": ("nvidia-h100-mega-80gb", "h100-mega-80gb-8"),
  "h200": ("nvidia-h200-141gb", "h200-141gb-8"),
  "b200": ("nvidia-b200", "b200-8"),
}
OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x"}
PER_NODE = 8
PER_HOST = 8  # chips of a plane's largest host
LARGEST = 6144  # chips of a slice that is named by its number


@dataclasses.dataclass(frozen=True)
class Machine:
  """A TPU slice, or nodes with GPUs: `hosts` of `chips` each, with `devices` for JAX in all.

  `label` is what GKE calls the accelerator and `xpk` what xpk does; `topology` is a slice's.
  """

  name: str
  label: str
  hosts: int
  chips: int
  devices: int
  topology: str = ""
  xpk: str = ""

  @property
  def hardware(self) -> str:
    return "tpu" if self.topology else "gpu" if self.label else "cpu"

  @property
  def whole(self) -> Machine:
    """The same as it is rented outside of GKE: eight chips of a plane are on one host too."""
    one = self.topology == SMALL[PER_HOST]
    return dataclasses.replace(self, hosts=1, chips=PER_HOST) if one else self

  def __str__(self) -> str:
    if not self.chips:
      return self.name
    where = f", {self.topology}" if self.topology else ""
    hosts = f"{self.hosts} host{'s' * (self.hosts > 1)}"
    return f"{self.name}{where}: {hosts} of {self.chips} chip{'s' * (self.chips > 1)}"


def kind_of(name: str) -> str:
  """What kind of chips a machine of this name has."""
  kind = name.rpartition("-")[0]
  return OTHER_NAMES.get(kind, kind)


def find(
  name: str, key: str = "launch_machine", known: Iterable[str] = (*TORI, *PLANES, *GPUS)
) -> Machine:
  """`v5p-128`, `v5litepod-16`, `v5p-4x4x8`, `h100-16`. Raises ConfigError for the `key`, offering
  machines of the kinds that are `known`.
  """
  kind, size = kind_of(name), name.rpartition("-")[2]
  if kind in GPUS and size.isdecimal():
    return _nodes(name, kind, int(size), key)
  if kind not in {**TORI, **PLANES} or not re.fullmatch(r"\d+(x\d+)*", size):
    offer = _near(name, kind, known)
    raise ConfigError(key, f"{name[:40]!r} is no machine, as v5p-128{offer}")
  cores = 2 if kind in TORI else 1
  fit, topology = dict(_slices(kind)), size
  if size.isdecimal():
    chips, odd = divmod(int(size), cores)
    topology = "" if odd else fit.get(chips, "")
  if not _exists(kind, topology):
    there = ", ".join(f"{kind}-{chips * cores}" for chips in [*fit][:12])
    problem = f"there is no slice {name[:40]!r}; there are {there} ..., or write its topology"
    raise ConfigError(key, f"{problem}, as {kind}-{fit[64]}")
  chips = math.prod(map(int, topology.split("x")))
  each = min(chips, 4)
  label = {**TORI, **PLANES}[kind][0]
  devices = chips * (2 if kind == "tpu7x" else 1)
  xpk = f"{'v5litepod' if kind == 'v5e' else kind}-{size}"
  if kind == "v5e" and chips < 8:  # which it does not know
    xpk = ""
  return Machine(name, label, chips // each, each, devices, topology, xpk)


def _near(name: str, kind: str, known: Iterable[str]) -> str:
  """The machine that is nearly called so, or the kinds that there are."""
  kinds = sorted(known, key=len, reverse=True)
  for one in kinds:
    size = name.removeprefix(one)
    if size != name and re.fullmatch(r"[-_ ]?[1-9]\d{0,4}(x\d+)*", size):
      return f", did you mean '{one}-{size.lstrip('-_ ')}'?"
  if alike := difflib.get_close_matches(kind or OTHER_NAMES.get(name, name), kinds, n=1):
    typed = re.search(r"-([1-9]\d{0,4}(x\d+)*)$", name)
    near = alike[0] + typed[0] if typed and alike[0] != kind else _example(alike[0])
    return f", did you mean '{near}'?"
  return f"; kinds are {', '.join(sorted(kinds))}, as {_example(min(kinds))}"


def _example(kind: str) -> str:
  """A machine of this kind."""
  return f"{kind}-{256 if kind in PLANES else 128 if kind in TORI else PER_NODE}"


def _nodes(name: str, kind: str, count: int, key: str) -> Machine:
  if count < 1 or (count > PER_NODE and count % PER_NODE):
    problem = f"{name!r}: GPUs stand in nodes of {PER_NODE}; use at most that, or a multiple"
    raise ConfigError(key, problem)
  label, xpk = GPUS[kind]
  each = min(count, PER_NODE)
  return Machine(name, label, count // each, each, count, xpk=xpk if each == PER_NODE else "")


def _slices(kind: str) -> Iterator[tuple[int, str]]:
  """Chips -> the topology that is meant where none is written: the one nearest to a cube."""
  if kind in PLANES:
    yield from SMALL.items()
    return
  yield from BELOW_A_CUBE.items()
  for cubes in range(1, min(TORI[kind][1], LARGEST) // 64 + 1):
    sides = [
      (a, b, cubes // (a * b))
      for a in range(1, math.isqrt(cubes) + 1)
      for b in range(a, math.isqrt(cubes // a) + 1)
      if not cubes % (a * b)
    ]
    yield 64 * cubes, "x".join(str(4 * side) for side in min(sides, key=sum))


def _exists(kind: str, topology: str) -> bool:
  if kind in PLANES:
    return topology in SMALL.values()
  sides = [int(side) for side in topology.split("x") if side]
  cube = len(sides) == 3 and not any(side % 4 or not side for side in sides)
  return topology in BELOW_A_CUBE.values() or (cube and math.prod(sides) <= TORI[kind][1])
