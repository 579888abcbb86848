"""The layouts that a configuration could have on a number of chips, best first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from maxtext import program
from maxtext.config import Config
from maxtext.config.devices import on_devices
from maxtext.config.sources import ENVIRONMENT
from maxtext.errors import ConfigError
from maxtext.estimate.chips import Chip
from maxtext.estimate.flops import step_flops
from maxtext.estimate.memory import Bytes, Model, Parts
from maxtext.estimate.roofline import Network, Seconds, seconds
from maxtext.layers.schedule import STAGE
from maxtext.mesh import WORKING
from maxtext.sharding import Rules
from maxtext.training.optimizers import make_optimizer
from maxtext.training.schedules import make_schedule

USUAL = ("data", "stage", "fsdp", "tensor", "context", "expert")
FULL = 0.95  # of a chip's memory: the rest is the runtime's
SHORTEST = 128  # tokens of a row on a device, below which splitting it further is no use


@dataclasses.dataclass(frozen=True)
class Layout:
  """One layout, legal for training: mesh sizes by axis, what it holds and how long it takes."""

  sizes: Mapping[str, int]
  keys: Mapping[str, int]
  bytes: Bytes
  seconds: Seconds
  mfu: float

  def fits(self, chip: Chip) -> bool:
    return self.bytes.total <= FULL * chip.memory

  @property
  def paste(self) -> str:
    """The settings that make it."""
    return " ".join(f"{key}={size}" for key, size in self.keys.items())


def model_of(config: Config, vocabulary: int = 0) -> Model:
  """What decides about a run's memory; no device is asked for."""
  spec = config.decoder(program.padded(vocabulary))
  schedule = make_schedule(config.optimizer, config.training.steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  return Model.of(config, spec, program.plan(config, spec).declared, optimizer)


def layouts(model: Model, devices: int, chip: Chip) -> list[Layout]:
  """Every layout of these axes that training would accept: those that fit first, then by time."""
  legal = (made(model, keys, devices, chip) for keys in _candidates(model, devices))

  def order(layout: Layout) -> tuple[float, ...]:
    held, time, fits = layout.bytes.total, layout.seconds.total, layout.fits(chip)
    # what is nearly as fast goes by its memory, and then by how simple it is
    near = float(f"{time:.1e}") if fits else 0.0
    return not fits, near, float(f"{held:.2e}"), len(layout.keys), time

  return sorted(filter(None, legal), key=order)


def _candidates(model: Model, devices: int) -> Iterator[dict[str, int]]:
  """Settings of mesh sizes whose product is the devices of a slice; those that were typed stay."""
  config = model.config
  mesh, each = config.mesh, devices // config.mesh.num_slices
  axes = [a for a in mesh.mesh_axes if a in WORKING and (mesh.custom_mesh_and_rule or a in USUAL)]
  axes = [a for a in axes if a != "expert" or model.spec.mixtures]
  typed = {a for a in mesh.mesh_axes if config.sources[mesh.keys(a)[0]].level >= ENVIRONMENT}
  fixed = {mesh.keys(a)[0]: getattr(mesh, mesh.keys(a)[0]) for a in typed}
  open_axes = [a for a in axes if a not in typed or fixed[mesh.keys(a)[0]] == -1]
  left = each // math.prod(size for size in fixed.values() if size != -1)
  most = {"context": max(config.training.max_target_length // SHORTEST, 1)}
  most[STAGE] = copies = model.spec.stages[model.spec.longest].repeat
  for sizes in _products(left, [most.get(a, left) for a in open_axes]):
    keys = fixed | {mesh.keys(a)[0]: size for a, size in zip(open_axes, sizes)}
    stages = keys.get(mesh.keys(STAGE)[0], 1) * mesh.dcn().get(STAGE, 1)
    if copies % stages:  # refused, as are others further on that cost more to tell
      continue
    yield keys
    if stages > 1 and config.pipeline.num_pipeline_microbatches == -1:
      others = [a for a in mesh.logical_axis_rules["activation_batch"] if a != STAGE]
      rows = config.training.micro_batch(devices) // stages
      rows //= math.prod(keys.get(mesh.keys(a)[0], 1) for a in others)
      if (times := math.gcd(8, rows)) > 1:
        yield keys | {"num_pipeline_microbatches": times * stages}


def _products(total: int, most: list[int]) -> Iterator[tuple[int, ...]]:
  """All ways to write `total` as a product of sizes, none above its limit."""
  if not most:
    yield from [()] if total == 1 else []
    return
  for size in (n for n in range(1, min(total, most[0]) + 1) if total % n == 0):
    for rest in _products(total // size, most[1:]):
      yield size, *rest


def made(model: Model, keys: dict[str, int], devices: int, chip: Chip) -> Layout | None:
  """The layout of these settings, or None where training would refuse it."""
  ones = dict.fromkeys((model.config.mesh.keys(axis)[0] for axis in model.config.mesh.mesh_axes), 1)
  config = model.config.changed(**(ones | keys))
  model, given, mesh = dataclasses.replace(model, config=config), model.config.values, config.mesh
  if next(on_devices(config, devices), None) is not None:
    return None
  sizes = {axis: size for axis, size in mesh.sizes(devices).items() if size > 1}
  rules = Rules({name: tuple(axes) for name, axes in mesh.logical_axis_rules.items()})
  try:
    for name, p in model.params.items():
      rules.spec(p.axes, sizes, p.shape, name)
  except ConfigError:
    return None
  parts = Parts(rules.table, sizes)
  rows = config.training.micro_batch(devices)
  tiles = program.tiles(config, model.spec, devices, any(m in sizes for m in parts.tokens))
  held = model.bytes(parts, rows, tiles)
  time = seconds(model, parts, Network(chip, sizes, mesh.dcn()), held, rows)
  length, passes = config.training.max_target_length, config.training.gradient_accumulation_steps
  needed = passes * step_flops(model.spec, rows * length, length).total
  shown = {k: n for k, n in keys.items() if n > 1 or given[k] != 1}
  return Layout(sizes, shown, held, time, needed / devices / chip.flops / time.total)
