"""What dataset_type=grain and hf read: sources in shares that may change with the steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Sequence

import numpy as np

from maxtext.data import prepared
from maxtext.data.errors import brief
from maxtext.data.feeds import Reader
from maxtext.data.sections import FORMATS, Data
from maxtext.data.sources import Source, find, hold_out
from maxtext.data.tokenizers import Tokenizer
from maxtext.errors import DataError, closest

Schedule = tuple[tuple[float, float], ...]  # (step, weight), weights between them are on a line
CONSTANT: Schedule = ((0.0, 1.0),)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Sources `first` to `first + count` of a reader, and how much of each is drawn."""

  reader: Reader
  first: int
  count: int
  schedules: tuple[Schedule, ...] | None  # None: one after the other

  @property
  def sources(self) -> Sequence[Source]:
    return self.reader.sources[self.first :][: self.count]

  def __len__(self) -> int:
    return sum(map(len, self.sources))

  def weights(self, step: int) -> list[float]:
    """Shares of a sum of 1. Raises DataError where all are 0."""
    assert self.schedules is not None
    weights = [_at(schedule, step) for schedule in self.schedules]
    if not (total := sum(weights)):
      raise DataError(f"grain_train_mixture_config_path: all weights are 0 at step {step}")
    return [weight / total for weight in weights]

  def __str__(self) -> str:
    files = sum(len(source.files) for source in self.sources)
    if self.schedules is None or self.count == 1:
      return f"{len(self)} documents in {files} files"
    shares = zip(self.sources, self.weights(0))
    return ", ".join(f"{source.name} ({len(source)} documents, {w:.1%})" for source, w in shares)


@dataclasses.dataclass(frozen=True)
class Named:
  """A source as the configuration names it."""

  name: str
  pattern: str
  schedule: Schedule = CONSTANT


def open_mixture(data: Data, tokenizer: Tokenizer) -> tuple[Mixture, Mixture | None, str]:
  """-> to train on, held out, fingerprint: equal ones give equal tokens. Raises DataError."""
  hub = "hf_train_files" if data.hf_train_files else "hf_path"
  key = hub if data.dataset_type == "hf" else "grain_train_files"
  names = _named(data)
  found = [_find(key, name, data, data.train_data_columns, tokenizer) for name in names]
  if data.evaluated:
    other = "eval_split" if key == "hf_path" else key.replace("train", "eval")
    name = Named("eval", _split(data, data.evaluated) if key == "hf_path" else data.evaluated)
    held = [_find(other, name, data, data.eval_data_columns, tokenizer)]
  else:
    parts = [hold_out(source, data.eval_fraction) for source in found]
    found = [train for train, _ in parts]
    held = [dataclasses.replace(part, name=f"{part.name} (held out)") for _, part in parts if part]
  reader = Reader([*found, *held], tokenizer, data)
  schedules = tuple(name.schedule for name in names)
  train = Mixture(reader, 0, len(found), schedules if len(names) > 1 else None)
  text = json.dumps([[source.digest() for source in reader.sources], schedules])
  eval = Mixture(reader, len(found), len(held), None) if held else None
  return train, eval, hashlib.sha256(text.encode()).hexdigest()


def _find(
  key: str, named: Named, data: Data, columns: Sequence[str], tokenizer: Tokenizer
) -> Source:
  kind = FORMATS[data.hf_path] if data.hf_train_files else data.grain_file_type
  source = find(key, named.pattern, kind, columns, data.dataset_cache_dir)
  if source.index is not None:
    settings = {"tokenizer": tokenizer.digest, "add_bos": data.add_bos, "add_eos": data.add_eos}
    for folder in {os.path.dirname(file.path) for file in source.files}:
      prepared.check(folder, settings, f"{key}={named.pattern}")
  return dataclasses.replace(source, name=named.name)


def _named(data: Data) -> list[Named]:
  """The sources to train on. Raises DataError."""
  if data.hf_train_files:
    return [Named("train", data.hf_train_files)]
  if data.dataset_type == "hf":
    return [Named(data.train_split, _split(data, data.train_split))]
  if data.grain_train_mixture_config_path:
    return _from_file(data.grain_train_mixture_config_path)
  if ";" not in data.grain_train_files:
    return [Named("train", data.grain_train_files)]
  named = [_inline(part) for part in data.grain_train_files.split(";") if part.strip()]
  if len({name.name for name in named}) < len(named):
    raise DataError("grain_train_files: a pattern stands twice; add up its weights")
  return named


def _split(data: Data, split: str) -> str:
  """Where the files of a split are: in a folder that `datasets` has saved, or on the hub."""
  folder = os.path.join(os.path.expanduser(data.hf_path), data.hf_name)
  if not os.path.isdir(folder):
    return f"hf://datasets/{posixpath.join(data.hf_path, data.hf_name)}/**/*{split}*.parquet"
  return os.path.join(folder, split) if os.path.isdir(os.path.join(folder, split)) else folder


def _at(schedule: Schedule, step: int) -> float:
  return float(np.interp(step, [at for at, _ in schedule], [weight for _, weight in schedule]))


def _inline(part: str) -> Named:
  pattern, _, weight = part.strip().rpartition(",")
  try:
    return Named(pattern, pattern, ((0.0, _weight(float(weight))),))
  except ValueError:
    raise DataError(
      f"grain_train_files: {part.strip()!r} is not PATTERN,WEIGHT, as a mixture of "
      "'a/*.jsonl,0.7;b/*.jsonl,0.3' is written"
    ) from None


def _from_file(path: str) -> list[Named]:
  """{"name": {"path": pattern, "weight": number, or [[step, weight], ...]}} in JSON."""
  where = f"grain_train_mixture_config_path={path}"
  try:
    with open(os.path.expanduser(path), encoding="utf-8") as file:
      said = json.load(file)
    if not isinstance(said, dict) or not said:
      raise ValueError('it is no object like {"web": {"path": "web/*.jsonl", "weight": 0.7}}')
    return [_entry(name, entry) for name, entry in said.items()]
  except OSError as error:
    folder = os.path.dirname(os.path.expanduser(path)) or "."
    hint = closest(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [])
    raise DataError(f"{where}: cannot be read: {error.strerror}{hint}") from None
  except (ValueError, TypeError, RecursionError) as error:
    raise DataError(f"{where}: {brief(error)}") from None


def _entry(name: str, entry: dict) -> Named:
  if not isinstance(entry, dict) or set(entry) != {"path", "weight"}:
    raise ValueError(f"{name}: has not the two entries path and weight")
  pattern, weight = entry["path"], entry["weight"]
  if not isinstance(pattern, str) or not pattern:
    raise ValueError(f"{name}: path is no text; write a glob")
  steps = weight if isinstance(weight, list) else [[0, weight]]
  schedule = tuple((float(step), _weight(float(value))) for step, value in steps)
  if not schedule or any(a[0] >= b[0] for a, b in zip(schedule, schedule[1:])):
    raise ValueError(f"{name}: the steps of weight do not rise")
  return Named(name, pattern, schedule)


def _weight(value: float) -> float:
  if not 0 <= value < float("inf"):
    raise ValueError(f"{value} is no weight; write a number from 0")
  return value
