"""One family of the Hugging Face hub: its tensors, and its config.json as our keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from maxtext.checkpoints.hub.parts import Field, Json, Keys, Part, Required
from maxtext.checkpoints.tables import Map
from maxtext.errors import CheckpointError

# Fields that do not change what a model computes.
INERT = frozenset(
  """
  _name_or_path _sliding_window_pattern architectures attention_dropout attn_implementation
  attn_pdrop auto_map aux_loss_alpha bos_token_id cache_implementation chunk_size_feed_forward
  classifier_dropout decoder_start_token_id dtype embd_pdrop eos_token_id ep_size experts_per_token
  finetuning_task hidden_dropout id2label initial_context_length initializer_range
  is_encoder_decoder keys_to_ignore_at_inference label2id max_window_layers model_type n_ctx
  output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
  problem_type reorder_and_upcast_attn resid_pdrop residual_dropout return_dict rope_interleaved
  router_aux_loss_coef router_jitter_noise seq_aux summary_activation summary_first_dropout
  summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class
  torch_dtype transformers_version unk_token_id use_cache
  """.split()
)


@dataclasses.dataclass(frozen=True)
class Family:
  """`model_type` and `architecture` of the files, `block` of ours, the `table` of their tensors.

  `parts` are the fields of a file, and `defaults` what those are that it leaves out; `unused` are
  patterns of the names of tensors that nothing is made of, {depth} being the number of layers.
  """

  model_type: str
  architecture: str
  block: str
  table: tuple[Map, ...]
  parts: tuple[Part, ...]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unused: tuple[str, ...] = ()

  def keys(self, config: Json) -> tuple[Keys, list[str]]:
    """The architecture keys of a config.json, and the fields of it that nobody has asked for.

    Raises CheckpointError for what is missing, and for what we have not.
    """
    asked = _Asked(self._filled(config))
    found: Keys = {"decoder_block": self.block}
    try:
      for part in self.parts:
        found |= part.read(asked)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
      what = f"cannot be read as {self.model_type}: {type(error).__name__}: {error}"
      raise CheckpointError(f"config.json: {what}") from None
    empty: tuple[Any, ...] = (None, False, [], {})
    known = asked.names | INERT
    others = {name: v for name, v in config.items() if name not in known and v not in empty}
    unread = [name for name in others if not name.startswith("_")]
    return {name: value for name, value in found.items() if value is not None}, unread

  def config(self, keys: Keys) -> dict[str, Any]:
    """The config.json of a model with these keys. Raises CheckpointError for what has no name."""
    found: dict[str, Any] = {
      "architectures": [self.architecture],
      "model_type": self.model_type,
    }
    for part in self.parts:
      found |= part.write(keys)
    return found

  def _filled(self, config: Json) -> Json:
    """With what it leaves out; a null is left out too where it stands for nothing."""
    fields = [part for part in self.parts if isinstance(part, Field)]
    nullable = {field.theirs for field in fields if field.null is not Required}
    kept = {
      name: value
      for name, value in config.items()
      if value is not None or name in nullable or name not in self.defaults
    }
    return {**self.defaults, **kept}


class _Asked(Mapping):
  """A mapping that notes which of its `names` are asked for."""

  def __init__(self, content: Json):
    self._content = content
    self.names: set[str] = set()

  def __getitem__(self, name: str) -> Any:
    self.names.add(name)
    return self._content[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._content)

  def __len__(self) -> int:
    return len(self._content)
