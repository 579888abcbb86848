"""The configuration of a run that takes over a model of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxtext import config as configs
from maxtext.checkpoints import hub
from maxtext.config import Config
from maxtext.data.kinds import KINDS
from maxtext.log import log

LENGTH = 256  # tokens in a row, in training, if the model's positions reach so far


def adopted(
  model: Path, words: Sequence[str], weight_dtype: str | None = None, out: Path | None = None
) -> Config:
  """The configuration of a run that has this model's architecture and tokenizer, and otherwise what
  `words`, key=value, say.

  Weights are in `weight_dtype` (None: as config.json says), the run's folder is `out` and has the
  tokenizer's files (None: they stay with the model). Raises ConfigErrors or CheckpointError.
  """
  family, config = hub.described(model)
  positions = family.keys(config)[0].get("trainable_position_size", LENGTH)
  written = weight_dtype or str(config.get("torch_dtype") or config.get("dtype"))
  own: dict[str, Any] = {
    "weight_dtype": "bfloat16" if written == "bfloat16" else "float32",
    "max_target_length": min(positions, LENGTH),
    **_tokenizer(model, out or model),
  }
  if out is not None:
    name = re.sub(r"[^A-Za-z0-9._+=-]+", "-", out.name).lstrip(".+=-")[:100]
    own |= {"run_name": name or "model", "base_output_directory": str(out.parent)}
  given = {word.partition("=")[0] for word in words}
  others = [f"{key}={value}" for key, value in own.items() if key not in given]
  return configs.load([*words, *others], purpose="decode", model=model)


def _tokenizer(folder: Path, there: Path) -> dict[str, Any]:
  """The keys of the tokenizer that stands in a folder, once its files are `there`."""
  for kind in ("huggingface", "sentencepiece", "tiktoken"):
    if (folder / KINDS[kind].file).is_file():
      return {"tokenizer_type": kind, "tokenizer_path": there / KINDS[kind].file}
  log.warning(
    f"{folder} has no tokenizer: texts are taken as bytes, which is not what it has learned"
  )
  return {"dataset_type": "synthetic"}
