"""What a decoder is, as data: a model family is a value of these types, not a class of its own.

Letters: d width, h query heads, g key/value heads, k head_dim, f mlp hidden, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_exact", "relu", "linear"]


@dataclasses.dataclass(frozen=True)
class RopeSpec:
  """Rotary positions: pair i of k/2 turns once in `min_timescale * (max/min)^(2i/k) * factor` x 2
  pi tokens.
  """

  max_timescale: float = 10_000.0
  min_timescale: float = 1.0
  factor: float = 1.0

  def __post_init__(self):
    if not 0 < self.min_timescale < self.max_timescale:
      raise ConfigError(
        "max_timescale", f"{self.max_timescale} is not above min_timescale={self.min_timescale}"
      )
    if self.factor <= 0:
      raise ConfigError("factor", f"{self.factor} is not above 0")


@dataclasses.dataclass(frozen=True)
class NormSpec:
  """Normalisation over the width: root mean square, or layer norm with a bias."""

  kind: Literal["rms", "layer"] = "rms"
  eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """One attention layer: heads, who is seen (`window` tokens back, None: all), and how scores are
  made.
  """

  heads: int
  kv_heads: int
  head_dim: int
  rope: RopeSpec | None = RopeSpec()
  window: int | None = None
  qk_norm: NormSpec | None = None
  soft_cap: float | None = None
  scale: float | None = None  # None: head_dim ** -0.5
  bias: bool = False

  def __post_init__(self):
    for name in ("heads", "kv_heads", "head_dim"):
      if getattr(self, name) < 1:
        raise ConfigError(name, f"{getattr(self, name)} is not at least 1")
    if self.heads % self.kv_heads:
      raise ConfigError("kv_heads", f"{self.kv_heads} does not divide {self.heads} query heads")
    if self.rope is not None and self.head_dim % 2:
      raise ConfigError("head_dim", f"{self.head_dim} is odd, rotary positions turn pairs")
    if self.window is not None and self.window < 1:
      raise ConfigError("window", f"{self.window} is not at least 1 (null: the whole past)")
    if self.soft_cap is not None and self.soft_cap <= 0:
      raise ConfigError("soft_cap", f"{self.soft_cap} is not above 0 (null: no cap)")


@dataclasses.dataclass(frozen=True)
class MlpSpec:
  """Feed-forward layer: the product of one projection per activation, projected back.

  ('silu', 'linear') is SwiGLU, ('gelu',) the ungated layer of GPT.
  """

  hidden: int
  activations: tuple[Activation, ...] = ("silu", "linear")
  bias: bool = False

  def __post_init__(self):
    if self.hidden < 1:
      raise ConfigError("hidden", f"{self.hidden} is not at least 1")
    if not 1 <= len(self.activations) <= 2:
      raise ConfigError("activations", f"{list(self.activations)} are not one or two functions")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """One residual block: x + attention(norm(x)), then x + mlp(norm(x)); dropout on each addend."""

  attention: AttentionSpec
  mlp: MlpSpec
  norm: NormSpec = NormSpec()
  dropout: float = 0.0

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ConfigError("dropout", f"{self.dropout} is not from 0 up to 1")


@dataclasses.dataclass(frozen=True)
class Stage:
  """`blocks`, in order, `repeat` times: compiled once and scanned over the repeats."""

  blocks: tuple[BlockSpec, ...]
  repeat: int = 1

  def __post_init__(self):
    if not self.blocks:
      raise ConfigError("blocks", "a stage needs at least one block")
    if self.repeat < 1:
      raise ConfigError("repeat", f"{self.repeat} is not at least 1")


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """A whole decoder. `positions` is the length of the learned position table, 0 for none."""

  width: int
  vocab: int
  stages: tuple[Stage, ...]
  norm: NormSpec = NormSpec()
  tied: bool = False
  positions: int = 0
  final_soft_cap: float | None = None

  def __post_init__(self):
    for name in ("width", "vocab"):
      if getattr(self, name) < 1:
        raise ConfigError(name, f"{getattr(self, name)} is not at least 1")
    if self.positions < 0:
      raise ConfigError(
        "positions", f"{self.positions} is not at least 0 (0: no learned positions)"
      )

  @property
  def depth(self) -> int:
    """The number of blocks."""
    return sum(len(stage.blocks) * stage.repeat for stage in self.stages)
