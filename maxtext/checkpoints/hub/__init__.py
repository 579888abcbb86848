"""Models of the Hugging Face hub: what their config.json and their tensors are here.

A family is a value of Family, in a file of its kind; a new one is added to FAMILIES there.
"""

from __future__ import annotations

from maxtext.checkpoints.hub import deepseek, gemma, gpt2, gpt_neox, llama, llama4, olmo
from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import Json, Keys
from maxtext.errors import CheckpointError

FILES = (llama, gemma, olmo, gpt2, gpt_neox, deepseek, llama4)

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


def families(block: str) -> list[Family]:
  """Those whose models are of this decoder block."""
  return [family for family in FAMILIES.values() if family.block == block]


__all__ = ["FAMILIES", "Family", "families", "family", "keys"]
