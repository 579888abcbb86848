"""What a pipeline demands of the model's layers and of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maxtext.config.config import RULES, Config
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.training.sections import rows

Problem = tuple[str, ...]
EACH, TAKEN, DEPTH = (
  "num_layers_per_pipeline_stage",
  "pipeline_parallel_layers",
  "base_num_decoder_layers",
)
REPEATS, MICROBATCHES = "num_pipeline_repeats", "num_pipeline_microbatches"


def of_layers(config: Config) -> Iterator[Problem]:
  """A number of layers that a pipeline cannot take, whatever the devices are."""
  taken, model = config.pipeline.pipeline_parallel_layers, config.model
  if taken == -1 or model is None:
    return
  stage = model.stages[model.longest]
  cycle, most = len(stage.blocks), len(stage.blocks) * stage.repeat
  # what is left over stays another stage, and the first one the longest
  if taken > most or taken % cycle or 2 * taken < most:
    unit = f"a multiple of {cycle} " if cycle > 1 else ""
    problem = f"{taken} of the {most} layers in a row that are alike"
    yield (
      TAKEN,
      f"{problem}; use {unit}from {-(-most // 2)} to {most}",
      "base_num_decoder_layers",
    )


def on_stages(config: Config, sizes: Mapping[str, int], devices: int) -> Iterator[Problem]:
  """What is wrong with a pipeline on a mesh of these sizes."""
  stages, model, section = sizes.get(STAGE, 1), config.model, config.pipeline
  if stages == 1 or model is None or next(of_layers(config), None):
    return
  keys = [key for key in config.mesh.keys(STAGE) if getattr(config.mesh, key) != 1]
  if (rule := tuple(config.mesh.logical_axis_rules.get("layers", ()))) != (STAGE,):
    problem = f"layers goes to {list(rule)}; with {STAGE} {stages} it must go to [{STAGE}]"
    yield RULES, problem, *keys
  stage = (model := model.cut(section.pipeline_parallel_layers)).stages[model.longest]
  if any(block.shared != (None, None) for block in stage.blocks):
    problem = "the pipeline does not send keys and values that layers keep for others; use 1"
    yield keys[0], problem, *keys[1:]
    return
  cycle, layers = len(stage.blocks), len(stage.blocks) * stage.repeat
  schedule = section.schedule(stages, stage.repeat, cycle)
  keys += filter(config.differs, (REPEATS,))
  if layers % (cycle * stages * schedule.repeats):
    yield *_uneven(config, model.depth, layers, schedule, cycle), *keys
    return
  each = layers // (stages * schedule.repeats)
  if section.num_layers_per_pipeline_stage not in (-1, each):
    times = f" x {schedule.repeats} repeats" if schedule.repeats > 1 else ""
    problem = f"{layers} layers over {STAGE} {stages}{times} make {each}"
    yield EACH, f"{section.num_layers_per_pipeline_stage}, but {problem}; use that or -1", *keys
  yield from _batches(config, sizes, devices, schedule, keys)


def _uneven(config: Config, depth: int, layers: int, schedule: Schedule, cycle: int) -> Problem:
  """Layers that do not divide: which of the nearest numbers do."""
  unit = cycle * schedule.stages * schedule.repeats
  split = f"{STAGE} {schedule.stages}" + (
    f" x {schedule.repeats} repeats" if schedule.repeats > 1 else ""
  )
  split += f" in cycles of {cycle}" if cycle > 1 else ""
  problem = f"{layers} layers cannot be split over {split}"
  near = sorted({max(layers // unit, 1) * unit, (layers // unit + 1) * unit})
  if config.pipeline.pipeline_parallel_layers != -1:
    return TAKEN, f"{problem}; use {' or '.join(map(str, near))}"
  fit, legal = layers // unit * unit, " or ".join(str(depth - layers + n) for n in near)
  other = f"{TAKEN}={fit}" if 2 * fit >= layers and fit else "fewer stages"
  return DEPTH, f"{problem}; use {legal}, or {other}"


def _batches(
  config: Config, sizes: Mapping[str, int], devices: int, schedule: Schedule, keys: list[str]
) -> Iterator[Problem]:
  """Microbatches that do not follow each other through the stages, or are no part of the rows."""
  count, stages = schedule.microbatches, schedule.stages
  # rows that come round again must have come out before their turn
  least = stages if schedule.repeats == 1 else stages * (schedule.late // stages + 1)
  if count % stages or count < least:
    near = max(-(-count // stages) * stages, least)
    problem = f"{count} microbatches cannot go through {stages} stages"
    problem += f" {schedule.repeats} times" if schedule.repeats > 1 else ""
    yield MICROBATCHES, f"{problem}; use a multiple of {stages}, as {near}", *keys
    return
  ways = config.mesh.ways("activation_batch", sizes)
  others = config.mesh.ways("activation_batch", {**sizes, STAGE: 1})
  given = [("per_device_batch_size", config.training.per_device_batch_size)]
  if config.eval.eval_interval > 0 and config.eval.eval_per_device_batch_size:
    given.append(("eval_per_device_batch_size", config.eval.eval_per_device_batch_size))
  for key, per_device in given:
    found = rows(per_device, devices)
    if found % ways == 0 and found % (count * others):  # else it is said already
      problem = f"{found} rows on {devices} devices do not make {count} microbatches"
      problem += f" split {others} ways" if others > 1 else ""
      unit = f"a multiple of {count * others / devices:g}"
      yield key, f"{problem}; use {unit}, or fewer microbatches", MICROBATCHES, *keys
