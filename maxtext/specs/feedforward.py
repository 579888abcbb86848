"""Feed-forward layers, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError
from maxtext.specs.limits import above, at_least

Activation = Literal["silu", "gelu", "gelu_exact", "gelu_quick", "relu", "relu2", "linear"]


@dataclasses.dataclass(frozen=True)
class MlpSpec:
  """Feed-forward layer: the product of one projection per activation, projected back.

  ('silu', 'linear') is SwiGLU, ('gelu',) the ungated layer of GPT. With `limit` a gate is cut at
  limit and what it multiplies to [-limit, limit], before activations; `shift` is then added to what
  it multiplies.
  """

  hidden: int
  activations: tuple[Activation, ...] = ("silu", "linear")
  bias: bool = False
  limit: float | None = None
  shift: float = 0.0

  def __post_init__(self):
    at_least(self, 1, "hidden")
    if not 1 <= len(self.activations) <= 2:
      raise ConfigError("activations", f"{list(self.activations)} are not one or two functions")
    if self.limit is not None:
      above(self, 0, "limit")
    for name, unset in (("limit", None), ("shift", 0.0)):
      if len(self.activations) == 1 and getattr(self, name) != unset:
        raise ConfigError(name, "is for a gated layer, of two activations; leave it out")


@dataclasses.dataclass(frozen=True)
class MoeSpec:
  """A mixture of experts: each token goes through the `active` of `experts` that its router scores
  highest, and through the `shared` layer, which with `shared_gate` is multiplied by a sigmoid.

  `score`: softmax over all experts, over the chosen ones, or a sigmoid each. With `choice_bias` a
  learned offset counts in choosing only. Of `groups` of experts only the `active_groups` best are
  chosen from, by their best score or, with a choice bias, by the sum of their two best. Scores of
  the chosen are divided by their sum with `normalize`, then multiplied by `scale`; they weigh the
  experts' outputs, or with `weigh_inputs` their inputs.
  """

  experts: int
  active: int
  expert: MlpSpec
  shared: MlpSpec | None = None
  shared_gate: bool = False
  score: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
  router_bias: bool = False
  choice_bias: bool = False
  groups: int = 1
  active_groups: int = 1
  normalize: bool = False
  scale: float = 1.0
  weigh_inputs: bool = False

  def __post_init__(self):
    at_least(self, 1, "experts", "active", "groups", "active_groups")
    if self.active > self.experts:
      raise ConfigError("active", f"{self.active} of {self.experts} experts; use at most all")
    if self.experts % self.groups:
      raise ConfigError("groups", f"{self.groups} groups do not divide {self.experts} experts")
    if self.active_groups > self.groups:
      raise ConfigError("active_groups", f"{self.active_groups} of {self.groups} groups")
    if self.active > self.active_groups * (self.experts // self.groups):
      raise ConfigError(
        "active_groups",
        f"{self.active_groups} groups of {self.experts // self.groups} experts hold fewer than the "
        f"{self.active} active ones; raise it",
      )
    if self.choice_bias and 1 < self.groups == self.experts:
      raise ConfigError("groups", f"{self.groups} groups of one expert have no two best; use fewer")
    if self.shared_gate and self.shared is None:
      raise ConfigError("shared_gate", "gates a shared expert, and there is none")
    above(self, 0, "scale")
