"""Feed-forward layers, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError
from maxtext.specs.limits import above, at_least

Activation = Literal["silu", "gelu", "gelu_exact", "gelu_quick", "relu", "linear"]


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
