"""What a compiled program sends between devices, read from its text: each collective with how often
it runs, over which axes of the mesh, and how many bytes of it a device has.

Counted is what runs: from the entry down, loops by their trip counts, of branches the one that
sends most. Names alone mislead: a reduce-scatter may stand in a fusion of its own, and asynchronous
operations hold their computation besides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
COMPUTES = ("fusion", "dot", "convolution", "custom-call", "while", "conditional")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
  """`times` a step over these mesh `axes`, among `ways` devices each; its result has `size` bytes
  on a device, in arrays of these `shapes`; `name` is the operation of the program that it comes
  from. `beside` are the cycles, as the compiler estimates them, of what is computed meanwhile;
  None: all wait for it.
  """

  kind: str
  axes: tuple[str, ...]
  ways: int
  times: int
  size: int
  shapes: tuple[tuple[int, ...], ...]
  name: str
  beside: int | None = None


@dataclasses.dataclass(frozen=True)
class Line:
  """An instruction: its name, what it makes, its operation, and what follows."""

  name: str
  made: str
  op: str
  rest: str

  @property
  def operands(self) -> list[str]:
    """The names of what it takes."""
    return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

  @property
  def cycles(self) -> int:
    """How long it takes, as a TPU's compiler estimates; 0 where it does not."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  @property
  def called(self) -> str | None:
    """The computation that it is made of, or calls."""
    found = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", self.rest)
    return found[1] if found else None


def collectives(
  text: str, mesh: Mapping[str, int], slices: Mapping[str, int] | None = None
) -> list[Collective]:
  """All that the compiled program `text` sends, on a mesh of these sizes by axis, of which those
  over `slices` are joined by their hosts.
  """
  entry, computations = parse(text)
  over = tuple(axis for axis, size in (slices or {}).items() if size > 1)
  return list(_sent(entry, _Program(computations, dict(mesh), set(), over)))


@dataclasses.dataclass(frozen=True)
class _Program:
  """All computations; `chains` are the asynchronous collectives of TPUs that are counted already:
  each stands in the fusion that begins it, in those it runs beside, and in the one that ends it.
  """

  computations: Mapping[str, list[Line]]
  mesh: dict[str, int]
  chains: set[str]
  over: tuple[str, ...] = ()

  def chain(self, line: Line) -> str | None:
    """That of the collective that a fusion has a part of."""
    inside = self.computations.get(line.called or "", ()) if line.op == "fusion" else ()
    found = (re.search(r'chain_id="(\d+)"', own.rest) for own in inside)
    return next((chain[1] for chain in found if chain), None)

  def beside(self, lines: list[Line], begin: int) -> int | None:
    """The cycles of what is computed between the beginning of a collective and its end."""
    line, end = lines[begin], begin
    if line.op == "recv" or line.op.endswith("-start"):
      done = lambda other: other.op.endswith("-done") and line.name in other.operands
      end = next((i for i, other in enumerate(lines) if done(other)), begin)
    elif chain := self.chain(line):
      end = max(i for i, other in enumerate(lines) if self.chain(other) == chain)
    between = [own for own in lines[begin + 1 : end + 1] if own.op in COMPUTES or own.cycles]
    return sum(own.cycles for own in between) if between else None


def totals(sent: list[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
  """(kind, mesh axes, times a step, bytes of the results on a device), the most bytes first."""
  times: Counter[tuple[str, tuple[str, ...]]] = Counter()
  sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
  for one in sent:
    times[one.kind, one.axes] += one.times
    sizes[one.kind, one.axes] += one.times * one.size
  return [(*key, times[key], size) for key, size in sizes.most_common()]


def table(sent: list[Collective]) -> str:
  """The totals for people."""
  rows = [("collective", "over", "times a step", "MiB on a device")]
  for kind, axes, times, size in totals(sent):
    rows.append((kind, " ".join(axes) or "-", f"{times:,}", f"{size / 2**20:.3f}"))
  if len(rows) == 1:
    return "collectives: none"
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return "\n".join(
    "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
    for row in rows
  )


def parse(text: str) -> tuple[str, dict[str, list[Line]]]:
  """The entry's name, and the instructions of every computation."""
  entry, name = "", ""
  found: dict[str, list[Line]] = {}
  text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "", re.sub(r"/\*.*?\*/", "", text))
  for line in text.splitlines():
    if begun := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
      name = begun[2]
      entry, found[name] = name if begun[1] else entry, []
    elif made := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
      found[name].append(Line(*made.groups()))
  return entry, found


def _sent(name: str, program: _Program) -> Iterator[Collective]:
  lines = program.computations.get(name, [])
  for begin, line in enumerate(lines):
    kind = line.op.removesuffix("-start")
    if kind in KINDS and not line.op.endswith("-done"):
      chain = re.search(r'chain_id="(\d+)"', line.rest)
      if chain and chain[1] in program.chains:
        continue
      program.chains.update(chain.groups() if chain else ())
      if kind == "all-reduce" and "all-reduce-scatter" in name:  # as TPUs have it, in a fusion
        kind, line = "reduce-scatter", dataclasses.replace(line, made=lines[-1].made)
      one = _collective(kind, line, program.mesh)
      if kind == "ragged-all-to-all":  # one end is a buffer with room for more
        ends = [own.made for own in lines if own.name == line.operands[0]]
        whole = [
          _collective(kind, dataclasses.replace(line, made=end), program.mesh) for end in ends
        ]
        one = min([one, *whole], key=lambda one: one.size)
      if one.axes:  # else each device is by itself
        yield dataclasses.replace(one, beside=program.beside(lines, begin))
    elif line.op == "recv" and (across := re.search(r'megascale_transfer_type="(\w+)"', line.rest)):
      one = _collective(across[1].lower().replace("_", "-"), line, program.mesh, first=True)
      beside = program.beside(lines, begin)
      ways = math.prod(program.mesh[axis] for axis in program.over)
      yield dataclasses.replace(one, axes=program.over, ways=ways, beside=beside)
    elif line.op == "while":
      trips = trips_of(line.rest, program.computations)
      body = re.search(r"body=%?([\w.\-]+)", line.rest)
      for one in _sent(body[1], program) if body else ():
        yield dataclasses.replace(one, times=one.times * trips)
    elif line.op == "conditional":
      branches = [list(_sent(branch, program)) for branch in branches_of(line.rest)]
      yield from max(branches, key=lambda sent: sum(one.times * one.size for one in sent))
    elif line.op in ("fusion", "call", "call-start", "async-start", "custom-call"):
      beside = program.beside(lines, begin)
      for one in _sent(line.called, program) if line.called else ():
        yield dataclasses.replace(one, beside=one.beside if beside is None else beside)


def trips_of(rest: str, computations: Mapping[str, list[Line]]) -> int:
  """How often a loop runs: as XLA says, or up to the one number that its condition compares with;
  1 where only the running program knows.
  """
  if known := re.search(r'known_trip_count\D*"(\d+)"', rest):
    return int(known[1])
  name = re.search(r"condition=%?([\w.\-]+)", rest)
  lines = computations.get(name[1], []) if name else []
  limits = [line.rest.split(")")[0] for line in lines if line.op == "constant"]
  counts = any(line.op == "compare" and "direction=LT" in line.rest for line in lines)
  return int(limits[0]) if counts and len(limits) == 1 and limits[0].isdigit() else 1


def branches_of(rest: str) -> list[str]:
  if several := re.search(r"branch_computations=\{([^}]*)\}", rest):
    return [name.strip().lstrip("%") for name in several[1].split(",")]
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def _collective(kind: str, line: Line, mesh: dict[str, int], first: bool = False) -> Collective:
  """Of what it makes, all counts, or the `first` array alone."""
  arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", line.made)[: 1 if first else None]
  if line.op.endswith("-start") and len(arrays) > 1:  # (operands, results, ...)
    arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
  shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
  sizes = [math.prod(shape) * bits(kind) // 8 for (kind, _), shape in zip(arrays, shapes)]
  name = re.search(r'op_name="([^"]*)"', line.rest)
  axes, ways = _axes(line.rest, tuple(mesh.items()))
  return Collective(kind, axes, ways, 1, sum(sizes), tuple(shapes), name[1] if name else "")


def bits(dtype: str) -> int:
  digits = re.search(r"\d+$", dtype)
  return _BITS.get(dtype) or (int(digits[0]) if digits else 8)


@functools.cache
def _axes(rest: str, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
  """The mesh axes along which devices that send each other something differ, and how many do."""
  sizes = tuple(size for _, size in mesh)
  where = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), -1)  # of a device, by axis
  differ = np.zeros(len(sizes), bool)
  groups = _groups(rest, len(where))
  for group in groups:
    differ |= (where[group] != where[group[:1]]).any(0)
  axes = tuple(name for (name, _), one in zip(mesh, differ) if one)
  return axes, max(map(len, groups), default=1)


def _groups(rest: str, devices: int) -> list[list[int]]:
  """Devices that take part in one collective together, by number."""
  if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
    return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
  if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", rest):
    return _tiled(tiled[2]).reshape([int(n) for n in tiled[1].split(",")]).tolist()
  if named := re.search(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? ?\{(.*?)\}", rest
  ):
    return _named(*named.groups())
  return [list(range(devices))]


def _tiled(text: str) -> np.ndarray:
  """The numbers in the order that `[4,2]T(1,0)` gives them."""
  dims, order = (
    [int(n) for n in found[1].split(",")] if (found := re.search(pattern, text)) else None
    for pattern in (r"\[([\d,]+)\]", r"T\(([\d,]+)\)")
  )
  assert dims is not None
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(math.prod(dims))


def _named(mesh: str, devices: str | None, along: str) -> list[list[int]]:
  """Groups along axes, or the parts (before)size of axes, of a mesh such as 'a'=2,'b'=4 of devices
  in an order such as `[4,2]T(1,0)`.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
  dims: list[int] = []
  taken: list[int] = []
  parts = {n: (b, s) for n, b, s in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
  for name, size in sizes.items():
    before, own = (int(n or 0) for n in parts.get(name, (0, 0)))
    cut = [before, own, size // (before * own)] if own else [size]
    if name in parts:
      taken.append(len(dims) + (1 if own else 0))
    dims += cut
  kept = [i for i in range(len(dims)) if i not in taken]
  count = math.prod(dims[i] for i in taken)
  order = np.arange(math.prod(dims)) if devices is None else _tiled(devices)
  grid = order.reshape(dims).transpose([*kept, *taken])
  return grid.reshape(grid.size // count, count).tolist()
