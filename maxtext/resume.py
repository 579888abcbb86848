"""Whether a run that goes on is still the run that began: what a change of its configuration would
do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxtext.config import Config
from maxtext.errors import ConfigErrors
from maxtext.log import log

# Sections of which every key is part of what a run computes, and single keys of others that are.
_SECTIONS = ("architecture", "precision", "data", "optimizer")
_KEYS = ("init_weights_seed", "max_target_length", "z_loss_multiplier", "enable_dropout", "steps")
# Keys of those sections that say how or where, not what.
_HOW = ("tokenizer_cache_dir",)


def facts(config: Config, devices: int) -> dict[str, Any]:
  """What a checkpoint notes of its run besides the configuration, to compare on resume."""
  return {"global_batch": config.training.global_batch(devices), "devices": devices}


def check(config: Config, saved_text: str, saved_facts: Mapping[str, Any], devices: int) -> None:
  """Print what has changed since the checkpoint; refuse what would silently make it another run.

  A key in `resume_changes` may change. Raises ConfigErrors, one line for each key that may not.
  """
  changes = [(k, old, new) for k, old, new in config.changes(saved_text) if k != "resume_changes"]
  for key, old, new in changes:
    log.info(f"changed since the checkpoint: {key}: {old!r} -> {new!r}")
  refused = [
    f"{key}: {new!r} here, {old!r} in the checkpoint, which would be another run; "
    f"set it back, name a new run_name, or allow it with resume_changes=[{key}]"
    for key, old, new in [*_guarded(config, changes), *_batch(config, saved_facts, devices)]
    if key not in config.run.resume_changes
  ]
  if refused:
    raise ConfigErrors(refused)


def _guarded(config: Config, changes: list[tuple[str, Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
  for key, old, new in changes:
    section = config.section_of(key)
    if key in _HOW or not (section in _SECTIONS or key in _KEYS):
      continue
    if key == "steps" and not _steps_matter(config):
      continue
    yield key, old, new


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
