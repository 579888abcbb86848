"""Models of the Hugging Face hub: what their config.json and their tensors are here.

A family is a value of Family, in a file of its kind; a new one is added to FAMILIES there.
"""

from __future__ import annotations

import json
from pathlib import Path

from maxtext.checkpoints.hub import (
  deepseek,
  gemma,
  gpt2,
  gpt_neox,
  gpt_oss,
  llama,
  llama4,
  mixtures,
  olmo,
  qwen3_next,
)
from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import Json, Keys
from maxtext.errors import CheckpointError

CONFIG = "config.json"
FILES = (llama, gemma, olmo, gpt2, gpt_neox, deepseek, llama4, gpt_oss, mixtures, qwen3_next)

# model_type of config.json -> the family
FAMILIES: dict[str, Family] = {
  family.model_type: family for file in FILES for family in file.FAMILIES
}


def family(config: Json) -> Family:
  """That of a config.json. Raises CheckpointError for one that is not known."""
  kind = config.get("model_type")
  if kind not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise CheckpointError(f"config.json: model_type {kind!r} is not known; there are {known}")
  return FAMILIES[kind]


def keys(config: Json) -> Keys:
  """The architecture keys of a model. Raises CheckpointError for one that is not known, or that has
  what we have not.
  """
  return family(config).keys(config)[0]


def families(block: str, kind: str | None = None) -> list[Family]:
  """All: that of model_type `kind` first, then those whose models are of this decoder block."""
  order = lambda family: (family.model_type != kind, family.block != block)
  return sorted(FAMILIES.values(), key=order)


def is_model(path: str | Path) -> bool:
  """Whether a folder is one of the hub's, by what is in it."""
  return (Path(path).expanduser() / CONFIG).is_file()


def described(path: str | Path) -> tuple[Family, Json]:
  """The family and the config.json of a folder, of one that sees images too the text part.

  Raises CheckpointError.
  """
  file = Path(path).expanduser() / CONFIG
  try:
    config = json.loads(file.read_text())
  except OSError as error:
    raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
  except ValueError as error:
    raise CheckpointError(f"{file} cannot be read: it is not JSON ({error})") from None
  if not isinstance(config, dict):
    raise CheckpointError(f"{file} cannot be read: it is no mapping")
  if not isinstance(kind := config.get("model_type"), str | None):
    raise CheckpointError(f"{file}: model_type {kind!r} is no name")
  inner = config.get("text_config")
  if config.get("model_type") not in FAMILIES and isinstance(inner, dict):
    outer = ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
    config = {**{key: config[key] for key in outer if key in config}, **inner}
  if config.get("quantization_config"):
    method = dict(config["quantization_config"]).get("quant_method", "of some kind")
    problem = f"quantization_config ({method}): quantised weights are not read"
    raise CheckpointError(f"{file}: {problem}; write the model in bfloat16 first")
  return family(config), config


__all__ = ["CONFIG", "FAMILIES", "Family", "described", "families", "family", "is_model", "keys"]
