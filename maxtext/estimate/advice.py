"""What would fit where a run does not: its settings changed one by one, best first, by estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxtext.config import Config
from maxtext.config.values import render
from maxtext.estimate.chips import Chip
from maxtext.estimate.layouts import FULL, Layout, layouts, made, model_of
from maxtext.layers.stacking import SAVED

SHOWN = 6  # remedies


def lighter(loaded: Config) -> Iterator[dict[str, Any]]:
  """What takes less memory, as far as the configuration does not say so already."""
  training = loaded.training
  if loaded.memory.remat_policy != "full":
    yield {"remat_policy": "full"}
  if loaded.optimizer.opt_type == "adamw" and loaded.optimizer.mu_dtype is None:
    yield {"mu_dtype": "bfloat16"}
  if loaded.moes and loaded.experts.sparse_matmul:
    yield {"sparse_matmul": False, "capacity_factor": 1.25}
  yield {
    "per_device_batch_size": training.per_device_batch_size / 2,
    "gradient_accumulation_steps": training.gradient_accumulation_steps * 2,
  }


def remedies(loaded: Config, size: int, devices: int, chip: Chip, needed: int) -> list[str]:
  """Settings with which a step that takes `needed` bytes should fit, the fastest first.

  Estimates are taken for as far off as the one of the step as it is; `size` is the vocabulary's.
  Last comes the most that fits of the rows, halved: a step of fewer tokens is another one.
  """
  mesh = loaded.mesh
  keys = {
    k: n for axis in mesh.mesh_axes for k, n in [(mesh.keys(axis)[0], mesh.ici(devices)[axis])]
  }
  now = made(model_of(loaded, size), keys, devices, chip)
  off = needed / now.bytes.total if now else 1.0
  mine = loaded.memory.remat_policy
  changes = list(lighter(loaded))
  changes += [{"remat_policy": name} for name in SAVED if name not in ("full", mine)]
  single = [{}, *lighter(loaded)]
  changes += [single[1] | other for other in single[2:]]
  changes.append({key: value for change in single for key, value in change.items()})
  found: dict[str, Layout] = {}
  for change in changes:
    other = made(model_of(loaded.changed(**change), size), keys, devices, chip)
    if other is not None:
      found.setdefault(_words(change), other)
  for change in [{}] if mine == "full" else [{}, {"remat_policy": "full"}]:
    for other in layouts(model_of(loaded.changed(**change), size), devices, chip)[:2]:
      if now is None or other.sizes != now.sizes:  # which is among the changes
        found.setdefault(f"{_words(change)} {other.paste}".strip(), other)
  fits = lambda one: one.bytes.total * off <= FULL * chip.memory
  said = lambda one: (
    f"{one.bytes.total * off / 2**30:.1f} GiB, {one.seconds.total:.3g} s a step at best"
  )
  fit = sorted(filter(lambda pair: fits(pair[1]), found.items()), key=lambda p: p[1].seconds.total)
  lines = [f"{words}: {said(one)}" for words, one in fit[:SHOWN]]
  rows = loaded.training.per_device_batch_size
  while (rows := rows / 2) >= 1:
    change = {"per_device_batch_size": rows}
    fewer = made(model_of(loaded.changed(**change), size), keys, devices, chip)
    if fewer is not None and fits(fewer):
      part = round(loaded.training.per_device_batch_size / rows)
      return [*lines, f"{_words(change)}: {said(fewer)}, of 1/{part} of the tokens"]
  return lines


def _words(change: Mapping[str, Any]) -> str:
  """As one types it."""
  return " ".join(f"{key}={render(value)}" for key, value in change.items())
