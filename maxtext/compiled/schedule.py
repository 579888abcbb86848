"""A compiled program from its first instruction to its last: what is in memory meanwhile, and how
long it takes by the compiler's own estimates.

XLA keeps its assignment of buffers to itself, but says the order of instructions and how every
array is laid out. What is computed in place is known from both: the state of a loop, an update of a
slice, an output that takes an argument's memory, an element-wise result that replaces its operand.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from maxtext.compiled.shapes import HBM, Array, Made, arrays, read
from maxtext.hlo import Line, branches_of, parse, trips_of

# What gives other names to what there is.
_NAMES = ("get-tuple-element", "tuple", "bitcast", "optimization-barrier", "parameter", "domain")
_FREE = ("constant", "partition-id", "replica-id", "after-all")
# Their result may stand where an operand stood that nothing else needs.
_ELEMENTWISE = ("add", "multiply", "subtract", "divide", "select", "maximum", "minimum", "convert")
_CALLS = ("while", "conditional", "call")
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu")
FINE = 200_000  # moments, beyond which the iterations of a loop are drawn as one


@dataclasses.dataclass(eq=False)
class Buffer:
  """Memory that one instruction fills; `size` is 0 if it is another's, or not main memory."""

  array: Array
  line: Line
  size: int
  made: Line | None = None  # what it is a copy of, or has in it, where `line` itself is silent

  @property
  def named(self) -> Line:
    """The instruction that says where it comes from."""
    return self.made or self.line


Value = Buffer | list["Value"]


@dataclasses.dataclass
class Profile:
  """`moments` are (cycles so far, bytes of temporaries); at the `peak` these buffers are `live` as
  `at` runs; `kernels` are calls of hand-written kernels, whose cycles no compiler estimates, and
  `traffic` the bytes that instructions read and write.
  """

  moments: list[tuple[float, int]] = dataclasses.field(default_factory=list)
  cycles: float = 0
  peak: int = 0
  live: list[Buffer] = dataclasses.field(default_factory=list)
  at: Line | None = None
  kernels: int = 0
  traffic: int = 0


def profile(text: str) -> Profile:
  """Of a compiled program's text; memory is that on top of the arguments."""
  entry, computations = parse(text)
  taken = re.findall(r"\{(\d*)\}: \(\d+, \{\}", text.partition("\n")[0])
  return _Walk(computations).run(entry, [], {int(n or 0) for n in taken})


def _buffers(value: Value) -> Iterator[Buffer]:
  if isinstance(value, Buffer):
    yield value
  else:
    for one in value:
      yield from _buffers(one)


class _Walk:
  def __init__(self, computations: Mapping[str, list[Line]]):
    self.computations = computations

  def run(self, name: str, arguments: Sequence[Value], taken: set[int] | None = None) -> Profile:
    """Of one computation. What it gives back goes where its caller wants it; of the entry's
    outputs, those that are `taken` go where arguments were.
    """
    lines = self.computations[name]
    values: dict[str, Value] = {}
    for line in lines:
      values[line.name] = self._value(line, values, arguments)
    given, own = list(_buffers(values[lines[-1].name])), set(map(id, lines))
    for i, buffer in enumerate(given):
      if id(buffer.line) in own and (taken is None or i in taken):
        buffer.size = 0
    if taken is None:  # what a loop goes on with stands where that stood which it began with
      for before, after in zip(_buffers(list(arguments)), given):
        if after is not before:
          self._call(before, after.named)
    return self._sweep(lines, values, given)

  def _sweep(self, lines: list[Line], values: dict[str, Value], given: list[Buffer]) -> Profile:
    made, last = _spans(lines, values)
    found, live = Profile(), dict[int, Buffer]()
    kept, now = set(map(id, given)), 0
    for i, line in enumerate(lines):
      dying = [b for b in last.get(i, ()) if id(b) not in kept]
      room = sum(b.size for b in dying if id(b) in live) if self._elementwise(line) else 0
      fresh = {id(b): b for b in made.get(i, ()) if b.size}
      more = sum(b.size for b in fresh.values())
      now += more
      live.update(fresh)
      inner = self._inner(line, values)
      top = now - min(room, more) + (inner.peak if inner else 0)
      if top > found.peak:
        found.peak, found.at = top, inner.at if inner and inner.at else line
        found.live = [*live.values(), *(inner.live if inner else ())]
      self._time(found, line, inner, top if inner is None else now)
      if inner is None:
        found.traffic += self._traffic(line, values)
      for buffer in dying:
        now -= buffer.size if live.pop(id(buffer), None) else 0
    return found

  def _time(self, found: Profile, line: Line, inner: Profile | None, now: int) -> None:
    """Go on by what an instruction takes."""
    if inner is None:
      found.kernels += any(f'"{name}' in line.rest for name in KERNELS)
      found.moments.append((found.cycles, now))
      found.cycles += line.cycles
      return
    trips = trips_of(line.rest, self.computations) if line.op == "while" else 1
    one = trips * len(inner.moments) + len(found.moments) > FINE
    for trip in range(1 if one else trips):
      begin, stretch = found.cycles + trip * inner.cycles, trips if one else 1
      found.moments += [(begin + time * stretch, now + size) for time, size in inner.moments]
    found.cycles += trips * inner.cycles
    found.kernels += trips * inner.kernels
    found.traffic += trips * inner.traffic

  def _inner(self, line: Line, values: dict[str, Value]) -> Profile | None:
    """What a loop's body, a branch or a function does."""
    operands = [values[name] for name in line.operands]
    if line.op == "while" and (body := re.search(r"body=%?([\w.\-]+)", line.rest)):
      return self.run(body[1], operands)
    if line.op == "call" and line.called:
      return self.run(line.called, operands)
    if line.op == "conditional":
      each = zip(branches_of(line.rest), operands[1:])
      return max((self.run(name, [value]) for name, value in each), key=lambda found: found.peak)
    return None

  def _value(self, line: Line, values: dict[str, Value], arguments: Sequence[Value]) -> Value:
    operands = [values[name] for name in line.operands if name in values]
    number = int(found[1]) if (found := re.search(r"^(\d+)\)", line.rest)) else 0
    if line.op == "parameter" and number < len(arguments):
      return arguments[number]
    if line.op == "get-tuple-element":
      index, whole = re.search(r"index=(\d+)", line.rest), operands[0]
      return whole[int(index[1])] if index and isinstance(whole, list) else whole
    if line.op == "tuple":
      return operands
    if line.op in ("bitcast", "optimization-barrier", "while", "domain"):
      return operands[0]
    if line.op in ("send-done", "recv-done"):  # (what was received, a token)
      return operands[0]
    if line.op.endswith("-done") and isinstance(operands[0], list):
      return operands[0][0 if line.op == "copy-done" else 1]
    if line.op.endswith("-done"):
      return operands[0]
    made = read(line.made)
    value = _filled(made, line)
    if "op_name" not in line.rest and (first := next(_buffers(operands), None)):
      for buffer in _buffers(value):
        buffer.made = first.named
    if line.op in ("parameter", *_FREE):
      for buffer in _buffers(value):
        buffer.size = 0
    elif line.op.endswith("-start") and isinstance(value, list) and len(value) > 1:
      value[1 if line.op == "copy-start" else 0] = operands[0] if len(operands) == 1 else operands
    elif line.op == "dynamic-update-slice":
      self._call(operands[0], next((b.named for b in _buffers(operands[1])), line))
      return operands[0]
    elif line.op in ("fusion", "custom-call"):
      return self._in_place(line, value, operands)
    return value

  def _in_place(self, line: Line, value: Value, operands: list[Value]) -> Value:
    """A fusion's result, of which slices that it updates stand where they stood."""
    aliased = re.findall(r"\{(\d*)\}: \((\d+), \{\}", line.rest.partition("aliasing={")[2])
    pairs = {int(output or 0): int(operand) for output, operand in aliased}
    if line.op == "fusion" and line.called:
      own = {one.name: one for one in self.computations[line.called]}
      root = self.computations[line.called][-1]
      roots = [own[name] for name in root.operands] if root.op == "tuple" else [root]
      for output, one in enumerate(roots):
        if (operand := _updated(one, own)) is not None:
          pairs[output], put = operand, _put(one, own)
          if put.op == "parameter":
            put = next((b.named for b in _buffers(operands[_number(put)])), put)
          self._call(operands[operand], put)
    for output, operand in pairs.items():
      if isinstance(value, list):
        value[output] = operands[operand]
      else:
        value = operands[operand]
    return value

  def _call(self, value: Value, put: Line) -> None:
    """Have what nothing stood in be called by what is first written into it."""
    for buffer in _buffers(value):
      line = buffer.named
      root = self.computations[line.called][-1] if line.op == "fusion" and line.called else line
      if root.op == "broadcast" or '"AllocateBuffer"' in root.rest:
        buffer.made = put

  def _elementwise(self, line: Line) -> bool:
    return line.op in _ELEMENTWISE or (line.op == "fusion" and "kind=kLoop" in line.rest)

  def _traffic(self, line: Line, values: dict[str, Value]) -> int:
    """Bytes that an instruction reads of and writes to a device's main memory."""
    if line.op in (*_NAMES, *_FREE) or line.op.endswith("-done"):
      return 0
    lines = self.computations.get(line.called or "", []) if line.op == "fusion" else []
    total = sum(one.size for one in arrays(read(line.made)) if one.space == HBM)
    for number, name in enumerate(line.operands):
      whole = sum(b.array.size for b in _buffers(values.get(name, [])) if b.array.space == HBM)
      parameter = next(
        (o.name for o in lines if o.op == "parameter" and o.rest.startswith(f"{number})")), ""
      )
      uses = [own for own in lines if parameter in own.operands] if parameter else []
      if uses and all(own.op == "dynamic-slice" for own in uses):
        whole = min(whole, sum(one.size for own in uses for one in arrays(read(own.made))))
      elif uses and all(own.op == "dynamic-update-slice" for own in uses):
        whole, total = 0, total - whole
      total += whole
    return max(total, 0)


def _spans(
  lines: list[Line], values: dict[str, Value]
) -> tuple[dict[int, list[Buffer]], dict[int, list[Buffer]]]:
  """By instruction, the buffers that it fills, and those that nothing needs after it."""
  made: dict[int, list[Buffer]] = {}
  own: dict[int, Buffer] = {}
  end: dict[int, int] = {}
  for i, line in enumerate(lines):
    for buffer in _buffers(values[line.name]):
      if buffer.line is line:
        own[id(buffer)], end[id(buffer)] = buffer, i
        made.setdefault(i, []).append(buffer)
    if line.op not in _NAMES:
      for operand in line.operands:
        for buffer in _buffers(values.get(operand, [])):
          end[id(buffer)] = i
  last: dict[int, list[Buffer]] = {}
  for key, buffer in own.items():
    last.setdefault(end[key], []).append(buffer)
  return made, last


def _filled(made: Made, line: Line) -> Value:
  if isinstance(made, Array):
    return Buffer(made, line, made.size if made.space == HBM else 0)
  return [_filled(one, line) for one in made]


def _updated(line: Line, own: Mapping[str, Line]) -> int | None:
  """The number of the parameter that a fused instruction updates a slice of."""
  while line.op == "bitcast" and line.operands:
    line = own[line.operands[0]]
  if line.op != "dynamic-update-slice":
    return None
  line = own[line.operands[0]]
  while line.op == "bitcast" and line.operands:
    line = own[line.operands[0]]
  return _number(line) if line.op == "parameter" else None


def _put(line: Line, own: Mapping[str, Line]) -> Line:
  """What a fused instruction that updates a slice writes there."""
  while line.op == "bitcast":
    line = own[line.operands[0]]
  line = own[line.operands[1]]
  while line.op in ("bitcast", "copy"):
    line = own[line.operands[0]]
  return line


def _number(parameter: Line) -> int:
  return int(parameter.rest.split(")")[0])
