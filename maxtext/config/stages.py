"""What a pipeline demands of the model's layers and of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from maxtext.config.config import RULES, Config
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.training.sections import rows

Problem = tuple[str, ...]
KEY, REPEATS, MICROBATCHES = (
  "num_layers_per_pipeline_stage",
  "num_pipeline_repeats",
  "num_pipeline_microbatches",
)


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
      "pipeline_parallel_layers",
      f"{problem}; use {unit}from {-(-most // 2)} to {most}",
      "base_num_decoder_layers",
    )


def on_stages(config: Config, sizes: Mapping[str, int], devices: int) -> Iterator[Problem]:
  """What is wrong with a pipeline on a mesh of these sizes."""
  if (
    (stages := sizes.get(STAGE, 1)) == 1
    or (model := config.model) is None
    or next(of_layers(config), None)
  ):
    return
  keys = [key for key in config.mesh.keys(STAGE) if getattr(config.mesh, key) != 1]
  if (rule := tuple(config.mesh.logical_axis_rules.get("layers", ()))) != (STAGE,):
    problem = f"layers goes to {list(rule)}; with {STAGE} {stages} it must go to [{STAGE}]"
    yield RULES, problem, *keys
  model = model.cut(config.pipeline.pipeline_parallel_layers)
  stage = model.stages[model.longest]
  if any(block.shared != (None, None) for block in stage.blocks):
    yield (
      keys[0],
      "layers keep keys and values for others, which a pipeline does not send; use 1",
      *keys[1:],
    )
    return
  repeats, cycle = config.pipeline.num_pipeline_repeats, len(stage.blocks)
  layers, unit = cycle * stage.repeat, cycle * stages * repeats
  if layers % unit:
    others = model.depth - layers
    legal = sorted({max(layers // unit, 1), layers // unit + 1})
    times = f"{STAGE} {stages}" + (f" x {repeats} repeats" if repeats > 1 else "")
    times += f" of {cycle} layers each" if cycle > 1 else ""
    problem = f"{layers} layers cannot be split over {times}"
    near = " or ".join(str(others + n * unit) for n in legal)
    yield (
      "base_num_decoder_layers",
      f"{problem}; use {near}, or {_fewer(layers, unit)}",
      *keys,
      REPEATS,
    )
    return
  if (wanted := config.pipeline.num_layers_per_pipeline_stage) not in (
    -1,
    layers // (stages * repeats),
  ):
    problem = f"{wanted}, but {layers} layers over {STAGE} {stages} x {repeats} repeats make "
    yield KEY, f"{problem}{layers // (stages * repeats)}; use that or -1", *keys, REPEATS
  yield from _batches(config, sizes, devices, config.pipeline.schedule(stages, stage.repeat), keys)


def _fewer(layers: int, unit: int) -> str:
  """What else would do: fewer of them in the pipeline."""
  fit = layers // unit * unit
  return f"pipeline_parallel_layers={fit}" if 2 * fit >= layers else "fewer stages"


def _batches(
  config: Config, sizes: Mapping[str, int], devices: int, schedule: Schedule, keys: list[str]
) -> Iterator[Problem]:
  """Microbatches that do not follow each other through the stages, or are no part of the rows."""
  count, stages = schedule.microbatches, schedule.stages
  least = stages if schedule.repeats == 1 else stages * (schedule.late // stages + 1)
  if count % stages or count < least:
    near = max(-(-count // stages) * stages, least)
    problem = f"{count} microbatches cannot go round {stages} stages"
    problem += f" {schedule.repeats} times" if schedule.repeats > 1 else ""
    yield MICROBATCHES, f"{problem}; use a multiple of {stages}, as {near}", *keys, REPEATS
    return
  others = config.mesh.ways("activation_batch", {**sizes, STAGE: 1})
  given = [("per_device_batch_size", config.training.per_device_batch_size)]
  if config.eval.eval_interval > 0 and config.eval.eval_per_device_batch_size:
    given.append(("eval_per_device_batch_size", config.eval.eval_per_device_batch_size))
  for key, per_device in given:
    if (found := rows(per_device, devices)) and found % (count * others):
      problem = f"{found} rows on {devices} devices do not make {count} microbatches"
      problem += f" split {others} ways" if others > 1 else ""
      unit = f"a multiple of {count * others / devices:g}"
      yield key, f"{problem}; use {unit}, or fewer {MICROBATCHES}", MICROBATCHES, *keys
