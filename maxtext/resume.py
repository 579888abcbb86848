"""Whether a run that goes on is still the run that began: what a change of its configuration would
do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from maxtext import __version__, hosts
from maxtext.checkpoints.folder import FACTS, LOSS
from maxtext.config import Config
from maxtext.config.decoder import spec
from maxtext.config.values import brief, render
from maxtext.errors import CheckpointError, ConfigErrors
from maxtext.hosts.sections import PLACE
from maxtext.log import log

CONFIG, DATA = "config", "data"  # what a checkpoint holds beside the state, and FACTS
MODEL = "model"  # the fact that says what the decoder block file made of the sizes

# Sections of which every key is part of what a run computes, and single keys of others that are.
_SECTIONS = ("architecture", "precision", "data", "optimizer")
_KEYS = (
  "init_weights_seed",
  "max_target_length",
  "z_loss_multiplier",
  "mtp_loss_scaling_factor",
  "enable_dropout",
  "steps",
)
# Keys of those sections that say how or where, not what.
_HOW = ("tokenizer_cache_dir", "dataset_cache_dir", "grain_worker_count", "data_errors")


def facts(config: Config, devices: int) -> dict[str, Any]:
  """What a checkpoint notes of its run besides the configuration, to compare on resume."""
  batch = config.training.global_batch(devices)
  return {"global_batch": batch, "devices": devices, MODEL: _model(config, {})}


def agreed(config: Config) -> Config:
  """The configuration, where all processes that train together have the same, and of one version.

  Raises ConfigErrors, a line for each key that differs.
  """
  if not config.sources["run_name"].text:  # it was made of the time, which is each one's own
    name = hosts.first(lambda: config.run.run_name)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_name=name))
  values = {key: render(value) for key, value in config.values.items() if key not in PLACE}
  written = hashlib.sha256(repr(config.block.root).encode()).hexdigest()
  values["decoder_block"] += f" (sha256 {written:.12})"
  versions = {"version of maxtext": __version__, "version of jax": metadata.version("jax")}
  hosts.agree(values | versions)
  return config


def check(config: Config, saved: Mapping[str, Any], devices: int) -> None:
  """Print what has changed since the checkpoint; refuse what would silently make it another run.

  `saved` is what the checkpoint holds beside the state. A key in `resume_changes` may change.
  Raises ConfigErrors, one line for each key that may not.
  """
  changes = _changes(config, saved)
  for key, old, new in changes:
    log.info(f"changed since the checkpoint: {key}: {old!r} -> {new!r}")
  found = [
    (key, f"{new!r} here, {old!r} in the checkpoint")
    for key, old, new in [*_guarded(config, changes), *_batch(config, saved[FACTS], devices)]
  ]
  if other := _other_model(config, saved):
    found.append(("decoder_block", other))
  refused = [
    f"{key}: {what}, which would be another run; "
    f"set it back, name a new run_name, or allow it with resume_changes=[{key}]"
    for key, what in found
    if key not in config.run.resume_changes
  ]
  if refused:
    raise ConfigErrors(refused)


def ended(config: Config, saved: Mapping[str, Any], newest: int) -> str:
  """Why a run has nothing left to do after `newest` steps, and what would give it something; empty
  where it has.
  """
  steps, target = config.training.steps, config.eval.target_eval_loss
  if newest >= steps:
    return f"has finished its {newest} steps; set steps or run_name to train on"
  if target and saved[FACTS].get(LOSS, math.inf) <= target:
    reached = f"has reached target_eval_loss={target:g} after {newest} steps"
    return f"{reached}; lower it, or set it to 0, to train on"
  return ""


def check_model(config: Config, saved: Mapping[str, Any]) -> None:
  """Refuse to read a checkpoint with a decoder block file that describes another model than when it
  was trained. Raises CheckpointError.
  """
  if other := _other_model(config, saved):
    raise CheckpointError(f"decoder_block: {other}; put back the file as it was in training")


def _changes(config: Config, saved: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  return [change for change in config.changes(saved[CONFIG]) if change[0] != "resume_changes"]


def _guarded(config: Config, changes: list[tuple[str, Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
  for key, old, new in changes:
    section = config.section_of(key)
    if key in _HOW or not (section in _SECTIONS or key in _KEYS):
      continue
    if key == "steps" and not _steps_matter(config):
      continue
    if key != "decoder_block":  # what it describes counts, not its name
      yield key, old, new


def _other_model(config: Config, saved: Mapping[str, Any]) -> str:
  """How the decoder block file differs from the one that was trained with, given the sizes of then;
  empty where it does not.
  """
  changes = {key: (old, new) for key, old, new in _changes(config, saved)}
  was, now = saved.get(FACTS, {}).get(MODEL), _model(config, changes)
  if was in (now, None):  # None: the checkpoint is older than this fact
    return ""
  if "decoder_block" in changes:
    old, new = changes["decoder_block"]
    return f"{new!r} here, {old!r} in the checkpoint"
  parts = [name for name in {**was, **now} if was.get(name) != now.get(name)]
  name, more = parts[0], f", and {len(parts) - 1} more" if parts[1:] else ""
  new, old = (brief(model.get(name, "as by default"), 40) for model in (now, was))
  part = f"{name}: {new} here, {old} in the checkpoint{more}"
  return f"{config.block.place} describes another model ({part})"


def _model(config: Config, changes: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
  """What the block file makes of the sizes as they were before `changes`: each part that is not as
  by default, and once those of layers that are alike. Empty where it makes nothing of them.
  """
  sizes = config.architecture
  before = {key: old for key, (old, new) in changes.items() if hasattr(sizes, key)}
  sizes = dataclasses.replace(sizes, **before)
  made, _ = spec(config.block, sizes, sizes.vocab_size or 1)
  if made is None:
    return {}
  kinds = list(dict.fromkeys(made.blocks))
  parts = {name: part for name, part in _parts(made, "") if name != "stages"}
  for number, block in enumerate(kinds):
    parts |= _parts(block, f"blocks.{number}.")
  return parts | {"pattern": " ".join(str(kinds.index(block)) for block in made.blocks)}


def _parts(value: Any, path: str) -> Iterator[tuple[str, str]]:
  """(dotted path, value) of the fields that are not as by default."""
  for field in dataclasses.fields(value):
    part, name = getattr(value, field.name), f"{path}{field.name}"
    if part == field.default:
      continue
    if dataclasses.is_dataclass(part):
      yield name, type(part).__name__
      yield from _parts(part, f"{name}.")
    else:
      yield name, repr(part)


def _steps_matter(config: Config) -> bool:
  """Whether the number of steps shapes the learning rate of every step."""
  optimizer = config.optimizer
  flat = optimizer.lr_schedule_type == "constant" and optimizer.warmup_steps_fraction == 0
  return optimizer.learning_rate_schedule_steps == -1 and not flat


def _batch(
  config: Config, saved: Mapping[str, Any], devices: int
) -> Iterator[tuple[str, Any, Any]]:
  old, new = saved["global_batch"], config.training.global_batch(devices)
  if old != new:
    yield (
      "per_device_batch_size",
      f"{old} rows a step on {saved['devices']} devices",
      f"{new} rows a step on {devices}",
    )
