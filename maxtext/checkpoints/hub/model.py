"""A model as the Hugging Face hub has it: a folder with config.json and safetensors."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxtext.checkpoints import safetensors
from maxtext.checkpoints.arrays import shape_text
from maxtext.checkpoints.hub import CONFIG, described
from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import Json, Keys
from maxtext.checkpoints.safetensors import Tensor
from maxtext.checkpoints.tables import Shapes, Slot, slots
from maxtext.errors import CheckpointError
from maxtext.log import log

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNUSED = r"\.rotary_emb\.inv_freq$"  # what older versions kept beside the weights
TEXT = "language_model."  # of a model that sees images too, the part that we have

Fitted = tuple[Slot, Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
  """The model in the folder `path`; `config` is what config.json says of its text part."""

  path: Path
  family: Family
  config: Json
  tensors: Mapping[str, Tensor]

  @functools.cached_property
  def keys(self) -> Keys:
    """Its architecture. Raises CheckpointError for what we have not."""
    keys, unread = self.family.keys(self.config)
    if unread:
      log.warning("%s: not read: %s", self.path / CONFIG, ", ".join(unread))
    return keys

  @functools.cached_property
  def dtype(self) -> np.dtype:
    """The one that holds every tensor as it is."""
    kinds = {tensor.dtype for tensor in self.tensors.values()}
    if len(kinds) == 1:
      return kinds.pop()
    return functools.reduce(np.promote_types, kinds, np.dtype(np.float32))

  def fitted(self, shapes: Shapes, stages: Sequence[tuple[int, int]]) -> list[Fitted]:
    """Each tensor that parameters of these shapes are made of, and where it is.

    Raises CheckpointError for the first one that is missing, or has another shape, and for one that
    no parameter is made of.
    """
    wanted = self._slots(shapes, stages)
    left = dict(self.tensors)
    if missing := [slot for slot in wanted if slot.name not in left]:
      first = missing[0]
      what = f"{first.name} {shape_text(first.shape)} is missing"
      raise CheckpointError(f"{self.path}: {what}; {len(missing)} of {len(wanted)} tensors are")
    found = [(slot, left.pop(slot.name)) for slot in wanted]
    for slot, tensor in found:
      if slot.shape != tensor.shape:
        here, there = shape_text(tensor.shape), shape_text(slot.shape)
        problem = f"{tensor.name} has shape {here}, and {there} by config.json"
        raise CheckpointError(f"{tensor.file}: {problem}")
      _ = tensor.dtype
    self._check_tied(left, found)
    depth = str(sum(blocks * repeats for blocks, repeats in stages))
    unused = [UNUSED, *(each.replace("{depth}", depth) for each in self.family.unused)]
    extra = [name for name in left if not any(re.search(each, name) for each in unused)]
    if extra:
      what = f"{left[extra[0]].name} is of no use to a {self.family.model_type} model"
      raise CheckpointError(f"{left[extra[0]].file}: {what}; {len(extra)} tensors are not")
    return found

  def _slots(self, shapes: Shapes, stages: Sequence[tuple[int, int]]) -> list[Slot]:
    try:
      return slots(self.family.table, shapes, stages)
    except KeyError as error:
      what = f"the parameter {error.args[0]} has no name in a {self.family.model_type} model"
      raise CheckpointError(f"{self.path}: {what}") from None

  def _check_tied(self, left: dict[str, Tensor], found: Sequence[Fitted]) -> None:
    """Take away an unembedding that is the embedding, of a model that has both in one."""
    names = {entry.ours: entry.theirs for entry in self.family.table}
    again = left.pop(str(names.get("unembedding")), None)
    first = next((t for slot, t in found if slot.name == names.get("embedding")), None)
    if again is None or first is None:
      return
    if again.shape != first.shape or not np.array_equal(_bits(again.read()), _bits(first.read())):
      problem = "tie_word_embeddings is true in config.json; set it to false"
      raise CheckpointError(f"{again.file}: {again.name} differs from {first.name}, but {problem}")


def open_model(path: str | Path) -> Model:
  """The model in a folder, of whose tensors only names and places are read yet.

  Raises CheckpointError.
  """
  folder = Path(path).expanduser()
  family, config = described(folder)
  named = _renamed(dict(_tensors(folder)), family, config)
  return Model(folder, family, config, named)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
  """Every tensor by its name. Raises CheckpointError."""
  index = folder / INDEX
  if not index.is_file():
    if not (folder / WHOLE).is_file():
      others = sorted(path.name for path in folder.glob("*.bin"))
      has = f"has {others[0]}, which is not read" if others else "has no weights"
      raise CheckpointError(f"{folder} {has}; write the model as {WHOLE} or with a {INDEX}")
    yield from safetensors.tensors(folder / WHOLE).items()
    return
  try:
    files: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
  if strange := [name for name, file in files.items() if not isinstance(file, str)]:
    raise CheckpointError(f"{index}: {strange[0]} has {files[strange[0]]!r}, which names no file")
  for file in sorted(set(files.values())):
    if Path(file).name != file:
      raise CheckpointError(f"{index}: {file!r} is not a file beside it")
    held = safetensors.tensors(folder / file)
    told = {name for name, place in files.items() if place == file}
    if lacking := sorted(told - held.keys()):
      raise CheckpointError(f"{folder / file}: {lacking[0]} is missing, which {INDEX} has there")
    if beyond := sorted(held.keys() - told):
      raise CheckpointError(f"{folder / file}: {beyond[0]} is there, but not in {INDEX}")
    yield from held.items()


def _renamed(tensors: dict[str, Tensor], family: Family, config: Json) -> dict[str, Tensor]:
  """By the table's names, if it is a model without its head, or one that sees images too."""
  if any(TEXT in name for name in tensors):
    text = {n.replace(TEXT, "", 1): t for n, t in tensors.items() if TEXT in n or "lm_head" in n}
    log.info("%d tensors are not of its text part, and are left out", len(tensors) - len(text))
    tensors = text
  body = next(entry.theirs for entry in family.table if "{l}" in entry.theirs).partition(".")[0]
  if any(name.startswith(f"{body}.") for name in tensors):
    return tensors
  return {n if n.startswith("lm_head") else f"{body}.{n}": t for n, t in tensors.items()}


def _bits(array: np.ndarray) -> np.ndarray:
  return array.view(f"u{array.itemsize}")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
  """Raises OSError."""
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
