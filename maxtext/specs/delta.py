"""The gated delta net, as data."""

from __future__ import annotations

import dataclasses

from maxtext.errors import ConfigError
from maxtext.specs.limits import above, at_least


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
  """A gated delta net (Yang et al. 2025, section 3): linear attention whose state, a matrix
  [key_dim value_dim] per value head, decays and is corrected towards each new value.

  Queries, keys and values pass a causal convolution of `conv` tokens, channel by channel; each key
  head serves value_heads / key_heads value heads; the output is normalised with `eps` and gated.
  """

  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  conv: int = 4
  eps: float = 1e-6

  def __post_init__(self):
    at_least(self, 1, "key_heads", "value_heads", "key_dim", "value_dim", "conv")
    above(self, 0, "eps")
    if self.value_heads % self.key_heads:
      raise ConfigError(
        "value_heads", f"{self.value_heads} is not a multiple of {self.key_heads} key heads"
      )

  @property
  def per_key(self) -> int:
    """The value heads of a key head."""
    return self.value_heads // self.key_heads

  @property
  def channels(self) -> int:
    """What the convolution has of each key head: its query, its key, its values."""
    return 2 * self.key_dim + self.per_key * self.value_dim
