"""What is known of a compiled step: memory by kind, work, what it sends, how long that takes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from maxtext import estimate, hardware, hlo
from maxtext.compiled.origins import Origins, name_of
from maxtext.compiled.schedule import Profile, profile
from maxtext.compiled.times import Time, time_of
from maxtext.estimate.advice import remedies
from maxtext.estimate.chips import CHIPS
from maxtext.program import Program
from maxtext.topology import kind_named

LARGEST = 10  # buffers that are listed
AMOUNT = r"([\d.]+)([KMGT])"  # of bytes
NOTHING = (
  "none of the choices that were tried: fewer rows on a device (per_device_batch_size) or a larger "
  "slice change that"
)
PART = (  # of what a report on TPUs says
  "a GPU that is not there is compiled for in part: nothing is tried out, so that products and "
  "their workspace may be others on it; cuDNN's attention is not there; no time is estimated"
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on a device: what a step is given, of that `parameters`, `optimizer` and `batch`; what it
  makes beside what it takes over; what it needs meanwhile, and the program. `walked` is the peak as
  far as the order of instructions tells it, `chip` what the device has, `host` what the hosts keep.
  """

  arguments: int
  parameters: int
  optimizer: int
  batch: int
  temporaries: int
  peak: int
  chip: int | None
  outputs: int = 0
  program: int = 0
  walked: int = 0
  host: int = 0


@dataclasses.dataclass(frozen=True)
class Held:
  """A buffer that is there at the peak, in bytes."""

  size: int
  array: str
  axes: str
  source: str
  name: str


@dataclasses.dataclass(frozen=True)
class Sent:
  """All collectives of a kind along the same mesh axes: how often, the bytes of their results on a
  device and over its wires, and how many of those bytes are under way while it computes.
  """

  kind: str
  axes: tuple[str, ...]
  times: int
  size: int
  wire: int
  beside: int


@dataclasses.dataclass(frozen=True)
class Report:
  """`at` says what runs at the peak; `moments` are (cycles, bytes on a device) from begin to end;
  `problem` is the compiler's own word where there is nothing more to tell, `part` why it is less
  than a report may be.
  """

  run: dict[str, Any]
  compile_cpu_seconds: float
  memory: Memory | None = None
  largest: tuple[Held, ...] = ()
  at: str = ""
  work: dict[str, float] = dataclasses.field(default_factory=dict)
  sent: tuple[Sent, ...] = ()
  time: Time | None = None
  advice: tuple[str, ...] = ()
  problem: str = ""
  part: str = ""
  moments: tuple[tuple[float, int], ...] = ()

  @property
  def fits(self) -> bool:
    """Whether the step fits into a device, so far as that is known."""
    there = self.memory.chip if self.memory else None
    return not self.problem and (not there or self.memory is None or self.memory.peak <= there)

  def json(self) -> dict[str, Any]:
    """All but the moments, which are drawn."""
    found = dataclasses.asdict(self)
    del found["moments"]
    return found | {"fits": self.fits}


def describe(built: Program) -> dict[str, Any]:
  """What was compiled, and for what."""
  config, mesh = built.config, built.layout.mesh
  rows, length = config.training.global_batch(mesh.size), config.training.max_target_length
  return {
    "model": config.run.model_name or config.block.name,
    "parameters": estimate.parameter_count(built.spec),
    "topology": config.compile.compile_topology,
    "slices": config.mesh.num_slices,
    "devices": mesh.size,
    "device_kind": mesh.devices.flat[0].device_kind,
    "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
    "rows": rows,
    "length": length,
    "tokens": rows * length,
    "dtype": config.precision.dtype,
    "remat_policy": config.memory.remat_policy,
    "jax": jax.__version__,
  }


def of(built: Program, compiled: Any, cpu_seconds: float) -> Report:
  """Read a compiled step; `cpu_seconds` it took to compile."""
  text = compiled.as_text()
  walked = profile(text)
  memory = _memory(built, compiled, walked)
  origins = Origins(text, built.layout, built.plan.declared)
  collectives = hlo.collectives(text, built.layout.mesh.shape, built.config.mesh.dcn())
  work = _work(built, walked)
  made = Report(
    run=describe(built),
    compile_cpu_seconds=round(cpu_seconds, 1),
    memory=memory,
    largest=tuple(_largest(built, walked, origins)),
    at=f"{origins.source(walked.at)} {name_of(walked.at)}".strip() if walked.at else "",
    work=work,
    sent=_sent(collectives),
    time=time_of(built, walked, collectives, work),
    part=PART
    if built.layout.mesh.devices.flat[0].platform == "gpu" != jax.default_backend()
    else "",
    moments=tuple((time, memory.arguments + size) for time, size in walked.moments),
  )
  return made if made.fits else dataclasses.replace(made, advice=advise(built, memory.peak))


def exhausted(built: Program, error: Exception, cpu_seconds: float) -> Report:
  """Of a step that does not fit, from the compiler's word alone, or the runtime's; raises any other
  error again.
  """
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  word = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2][:200]
  sizes = [_bytes(*amount) for amount in re.findall(rf"{AMOUNT}i?B?\b", word)]
  limit = re.search(rf"available HBM \({AMOUNT}|of {AMOUNT} hbm", word)
  chip = _bytes(*filter(None, limit.groups())) if limit else chip_memory(built)
  state, rows = built.state, built.config.training.global_batch(built.layout.mesh.size)
  held = estimate.bytes_per_device
  parameters, optimizer, batch = map(held, (state.params, state.opt_state, built.batch(rows)))
  given = parameters + optimizer + batch
  step = estimate.of_step(built)
  needed = max([step.total, given, *sizes])
  kinds = {"gradients": step.grads, "activations kept": step.activations, "at work": step.work}
  memory = Memory(
    arguments=given,
    parameters=parameters,
    optimizer=optimizer,
    batch=batch,
    temporaries=needed - given,
    peak=needed,
    chip=chip,
  )
  return Report(
    run=describe(built),
    compile_cpu_seconds=round(cpu_seconds, 1),
    memory=memory,
    largest=tuple(_largest(built, Profile(), None)),
    at=f"{step.point}, by estimate: "
    + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in kinds.items()),
    advice=advise(built, needed, chip),
    problem=word,
  )


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * 2.0 ** (10 * ("KMGT".index(unit) + 1)))


def advise(built: Program, needed: int, there: int | None = None) -> tuple[str, ...]:
  """What would fit into what is `there`, or that nothing would; nothing at all of chips of which
  is not known what they have.
  """
  mesh = built.layout.mesh
  if (kind := kind_named(mesh.devices.flat[0].device_kind)) is None:
    return ()
  chip = CHIPS[kind]
  chip = dataclasses.replace(chip, memory=min(chip.memory, there or chip.memory))
  return tuple(remedies(built.config, built.spec.vocab, mesh.size, chip, needed)) or (NOTHING,)


def _memory(built: Program, compiled: Any, walked: Profile) -> Memory:
  analysis = compiled.memory_analysis()
  state = built.state
  held = estimate.bytes_per_device
  rows = built.config.training.global_batch(built.layout.mesh.size)
  return Memory(
    arguments=analysis.argument_size_in_bytes,
    parameters=held(state.params),
    optimizer=held(state.opt_state),
    batch=held(built.batch(rows)),
    outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    program=analysis.generated_code_size_in_bytes,
    peak=estimate.compiled_bytes(compiled) or 0,
    walked=analysis.argument_size_in_bytes + walked.peak,
    chip=chip_memory(built),
    host=analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes,
  )


def chip_memory(built: Program) -> int | None:
  """Bytes that a device has."""
  devices = built.layout.mesh.devices.flat
  if kind := kind_named(devices[0].device_kind):
    return int(CHIPS[kind].memory)
  return hardware.memory(devices[0], len(built.layout.mesh.local_devices))


def _largest(built: Program, walked: Profile, origins: Origins | None) -> list[Held]:
  """Temporaries at the peak, and arguments, the largest first."""
  held = [
    Held(
      buffer.size,
      f"{buffer.array.dtype}{list(buffer.array.shape)}",
      origins.axes(buffer.named, buffer.array.shape),
      origins.source(buffer.named),
      name_of(buffer.named),
    )
    for buffer in walked.live
    if origins is not None
  ]
  for path, leaf in jax.tree_util.tree_leaves_with_path(built.state):
    name = str(getattr(path[-1], "key", path[-1]))
    declared = built.plan.declared.get(name)
    shape = leaf.sharding.shard_shape(leaf.shape)
    axes = " ".join(axis or "-" for axis in declared.axes) if declared else ""
    kind = f"state{jax.tree_util.keystr(path)}"
    size = estimate.bytes_per_device(leaf)
    held.append(Held(size, f"{leaf.dtype}{list(shape)}", axes, "", kind))
  return sorted(held, key=lambda one: -one.size)[:LARGEST]


def _work(built: Program, walked: Profile) -> dict[str, float]:
  """Of a device: FLOPs that the model needs, those computed again, bytes that instructions move."""
  mesh, training = built.layout.mesh, built.config.training
  rows, length = training.global_batch(mesh.size), training.max_target_length
  flops = estimate.step_flops(built.spec, rows * length, length)
  again = estimate.computed_again(estimate.model_of(built), rows * length)
  return {
    "flops": flops.total / mesh.size,
    "attention_flops": flops.attention / mesh.size,
    "expert_flops": 3 * estimate.expert_flops(built.spec, rows * length) / mesh.size,
    "flops_again": again / mesh.size,
    "bytes": walked.traffic,
    "kernels": walked.kernels,
    "cycles": walked.cycles,
  }


def _sent(collectives: list[hlo.Collective]) -> tuple[Sent, ...]:
  found = []
  for kind, axes, times, size in hlo.totals(collectives):
    own = [one for one in collectives if (one.kind, one.axes) == (kind, axes)]
    beside = sum(one.times * one.size for one in own if one.beside is not None)
    wire = sum(one.times * wire_bytes(one) for one in own)
    found.append(Sent(kind, axes, times, size, wire, beside))
  return tuple(found)


def wire_bytes(one: hlo.Collective) -> int:
  """Bytes that a device sends in one collective, done round a ring."""
  if one.kind == "collective-permute":
    return one.size
  if one.kind == "reduce-scatter":
    return one.size * (one.ways - 1)
  return one.size * (one.ways - 1) // one.ways * (2 if one.kind == "all-reduce" else 1)
