"""Fields of a config.json as our keys: parts that are read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from maxtext.errors import CheckpointError

Keys = dict[str, Any]
Json = Mapping[str, Any]

ACTIVATIONS = {  # theirs -> ours; of several names for one function the first is written
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu",
  "gelu": "gelu_exact",
  "quick_gelu": "gelu_quick",
  "relu": "relu",
  "relu2": "relu2",
  "swish": "silu",
  "gelu_new": "gelu",
  "gelu_fast": "gelu",
  "gelu_python": "gelu_exact",
}


class Part(Protocol):
  """One or several fields. What `read` makes of what `write` wrote are the same keys."""

  def read(self, config: Json) -> Keys:
    """Our keys; None is a null. Raises CheckpointError for what we have not."""

  def write(self, keys: Keys) -> Json:
    """Their fields. Keys that are missing are those of base.yml."""


class Required:
  """What a null stands for where there must be none."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One key as one field. `null` is what a null there stands for, or makes it of the config.

  `here` and `there` turn their value into ours and back.
  """

  ours: str
  theirs: str
  null: Any = Required
  here: Callable[[Any], Any] = lambda value: value
  there: Callable[[Any], Any] = lambda value: value

  def read(self, config: Json) -> Keys:
    value = config.get(self.theirs)
    if value is None and self.null is Required:
      raise CheckpointError(f"config.json: {self.theirs} is missing")
    if value is None:
      return {self.ours: self.null(config) if callable(self.null) else self.null}
    return {self.ours: self.here(value)}

  def write(self, keys: Keys) -> Json:
    value = keys.get(self.ours)
    if value is None:
      return {self.theirs: None} if self.null is None else {}
    return {self.theirs: self.there(value)}


@dataclasses.dataclass(frozen=True)
class Function:
  """What needs more words: keys of the config, and fields of the keys."""

  read: Callable[[Json], Keys]
  write: Callable[[Keys], Json]


@dataclasses.dataclass(frozen=True)
class Only:
  """A field that we have in one way only; left out, it is so."""

  theirs: str
  value: Any

  def read(self, config: Json) -> Keys:
    found = config.get(self.theirs)
    if found is not None and found != self.value:
      raise CheckpointError(
        f"config.json: {self.theirs} {found!r} is not there for {config.get('model_type')}; "
        f"only {self.value!r} is"
      )
    return {}

  def write(self, keys: Keys) -> Json:
    return {}


@dataclasses.dataclass(frozen=True)
class Ignored:
  """A field that says nothing of what we compute."""

  theirs: str

  def read(self, config: Json) -> Keys:
    config.get(self.theirs)
    return {}

  def write(self, keys: Keys) -> Json:
    return {}


@dataclasses.dataclass(frozen=True)
class Always:
  """Keys that go without saying: no field has them."""

  keys: Mapping[str, Any]

  def read(self, config: Json) -> Keys:
    return dict(self.keys)

  def write(self, keys: Keys) -> Json:
    return {}


@dataclasses.dataclass(frozen=True)
class Act:
  """The activation, by the first of these fields that is set."""

  fields: tuple[str, ...] = ("hidden_act",)
  default: str = "silu"
  gated: bool = True
  names: Mapping[str, str] = dataclasses.field(default_factory=lambda: ACTIVATIONS)

  def read(self, config: Json) -> Keys:
    name = next((name for field in self.fields if (name := config.get(field))), self.default)
    if name not in self.names:
      raise CheckpointError(f"config.json: activation {name!r} is none of {', '.join(self.names)}")
    return {"mlp_activations": [self.names[name], *["linear"] * self.gated]}

  def write(self, keys: Keys) -> Json:
    first, *rest = keys.get("mlp_activations", ["silu", "linear"])
    known = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if first not in known or list(rest) != ["linear"] * self.gated:
      written = ", ".join([first, *rest])
      raise CheckpointError(f"mlp_activations [{written}] has no name in a config.json")
    usual = self.names.get(self.default) == first
    return {self.fields[0]: self.default if usual else known[first]}


def heads(config: Json) -> int:
  return config["num_attention_heads"]


def share(config: Json) -> int:
  """The width of a head that is a share of the whole width."""
  return config["hidden_size"] // config["num_attention_heads"]


SIZES: tuple[Part, ...] = (
  Field("base_emb_dim", "hidden_size"),
  Field("base_num_query_heads", "num_attention_heads"),
  Field("base_num_kv_heads", "num_key_value_heads", null=heads),
  Field("head_dim", "head_dim", null=share),
  Field("base_mlp_dim", "intermediate_size"),
  Field("base_num_decoder_layers", "num_hidden_layers"),
  Field("vocab_size", "vocab_size"),
  Field("normalization_layer_epsilon", "rms_norm_eps"),
  Field("max_position_embeddings", "max_position_embeddings"),
  Field("logits_via_embedding", "tie_word_embeddings"),
)
WINDOW = Field("sliding_window_size", "sliding_window", null=None)
ATTENTION_BIAS = Field("attention_bias", "attention_bias")
MLP_BIAS = Field("mlp_bias", "mlp_bias")
