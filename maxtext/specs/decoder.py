"""Blocks, stages and the whole decoder, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from maxtext.errors import ConfigError
from maxtext.specs.attention import AttentionSpec
from maxtext.specs.delta import DeltaSpec
from maxtext.specs.feedforward import MlpSpec, MoeSpec
from maxtext.specs.limits import above, at_least
from maxtext.specs.norms import NormSpec


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """One residual block: x + mixer(norm(x)), then x + mlp(norm(x)); `parallel`: both addends are
  made from the same x. Each addend is normalised with post norms, and multiplied by
  `residual_scale`; dropout comes last.

  The mixer is `attention` or a gated `delta` net, the feed-forward part an `mlp` or a `moe`.
  """

  attention: AttentionSpec | None = None
  mlp: MlpSpec | None = None
  delta: DeltaSpec | None = None
  moe: MoeSpec | None = None
  norm: NormSpec = NormSpec()
  pre_norm: bool = True
  post_attention_norm: bool = False
  post_mlp_norm: bool = False
  parallel: bool = False
  residual_scale: float = 1.0
  dropout: float = 0.0

  def __post_init__(self):
    for one, other in (("attention", "delta"), ("mlp", "moe")):
      if (getattr(self, one) is None) is (getattr(self, other) is None):
        raise ConfigError(one, f"a block has either {one} or {other}; write one of them")
    if not 0 <= self.dropout < 1:
      raise ConfigError("dropout", f"{self.dropout} is not from 0 up to 1")
    above(self, 0, "residual_scale")

  @property
  def mixer(self) -> AttentionSpec | DeltaSpec:
    """The attention or the delta net."""
    found = self.attention or self.delta
    assert found is not None
    return found

  @property
  def shared(self) -> tuple[str | None, str | None]:
    """Under which name its attention keeps keys and values, and takes those of another layer."""
    return (self.attention.keeps, self.attention.takes) if self.attention else (None, None)


@dataclasses.dataclass(frozen=True)
class Stage:
  """`blocks`, in order, `repeat` times: compiled once and scanned over the repeats."""

  blocks: tuple[BlockSpec, ...]
  repeat: int = 1

  def __post_init__(self):
    if not self.blocks:
      raise ConfigError("blocks", "a stage needs at least one block")
    at_least(self, 1, "repeat")


@dataclasses.dataclass(frozen=True)
class MtpSpec:
  """Multi-token prediction (DeepSeek-V3 2024, section 2.2): `layers` further blocks in a row, of
  which block i predicts the token i + 1 ahead (i from 1), from what the one before it made of a
  token and from the embedding of the token i ahead.
  """

  layers: int
  block: BlockSpec

  def __post_init__(self):
    at_least(self, 1, "layers")


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """A whole decoder. `positions` is the length of the learned position table, 0 for none.

  Embeddings are multiplied by `embed_scale` and, with `embed_sqrt_width`, by width ** 0.5; logits
  by `logit_scale`, and then capped.
  """

  width: int
  vocab: int
  stages: tuple[Stage, ...]
  norm: NormSpec = NormSpec()
  tied: bool = False
  positions: int = 0
  embed_scale: float = 1.0
  embed_sqrt_width: bool = False
  logit_scale: float = 1.0
  final_soft_cap: float | None = None
  mtp: MtpSpec | None = None

  def __post_init__(self):
    at_least(self, 1, "width", "vocab")
    above(self, 0, "embed_scale", "logit_scale")
    if self.positions < 0:
      raise ConfigError(
        "positions", f"{self.positions} is not at least 0 (0: no learned positions)"
      )
    self._check_taken()

  def _check_taken(self) -> None:
    """Whether keys and values that layers take are kept before, by heads like theirs."""
    kept: dict[str, tuple[int, int]] = {}
    for number, block in enumerate(self.blocks):
      if (attention := block.attention) is None or block.shared == (None, None):
        continue
      heads = attention.kv_heads, attention.head_dim
      if (name := attention.takes) is not None and kept.get(name) != heads:
        problem = f"layer {number} takes what no layer before it keeps under this name"
        if name in kept:
          problem = (
            f"layer {number} has {heads} key heads and channels, and what it takes {kept[name]}"
          )
        raise ConfigError("takes", f"{name!r}: {problem}")
      if (name := attention.keeps) is not None and kept.setdefault(name, heads) != heads:
        problem = (
          f"layer {number} keeps {heads} key heads and channels, and one before it {kept[name]}"
        )
        raise ConfigError("keeps", f"{name!r}: {problem}")
    if self.mtp and self.mtp.block.shared != (None, None):
      raise ConfigError("mtp", "repeats the last layer, which keeps or takes keys and values")

  @property
  def depth(self) -> int:
    """The number of blocks."""
    return sum(len(stage.blocks) * stage.repeat for stage in self.stages)

  @property
  def longest(self) -> int:
    """The stage with the most layers, which is the one that a pipeline takes."""
    layers = [len(stage.blocks) * stage.repeat for stage in self.stages]
    return layers.index(max(layers))

  def cut(self, layers: int) -> DecoderSpec:
    """The same with the longest stage in two after so many layers, which are then the longest;
    -1 = all.
    """
    stage = self.stages[self.longest]
    first, left = divmod(layers, len(stage.blocks))
    if layers == -1 or layers == len(stage.blocks) * stage.repeat:
      return self
    if left or first > stage.repeat:
      problem = f"{layers} layers are no part of {stage.repeat} x {len(stage.blocks)}"
      raise ConfigError("pipeline_parallel_layers", f"{problem}; use -1")
    parts = (Stage(stage.blocks, first), Stage(stage.blocks, stage.repeat - first))
    at = self.longest
    return dataclasses.replace(self, stages=(*self.stages[:at], *parts, *self.stages[at + 1 :]))

  @property
  def mixtures(self) -> dict[str, range]:
    """The numbers of the layers whose feed-forward part is a mixture of experts, by the path of
    their block, as 'stages.0.blocks.1'.
    """
    found, first = {}, 0
    for s, stage in enumerate(self.stages):
      size = len(stage.blocks)
      for b, block in enumerate(stage.blocks):
        if block.moe is not None:
          found[f"stages.{s}.blocks.{b}"] = range(first + b, first + size * stage.repeat, size)
      first += size * stage.repeat
    if self.mtp is not None and self.mtp.block.moe is not None:
      found |= {f"mtp.{i}": range(first + i, first + i + 1) for i in range(self.mtp.layers)}
    return found

  @property
  def blocks(self) -> tuple[BlockSpec, ...]:
    """Every block, in order."""
    return tuple(b for stage in self.stages for b in stage.blocks * stage.repeat)


LONGEST = 16  # blocks in a cycle that is looked for


def staged(blocks: Sequence[BlockSpec]) -> tuple[Stage, ...]:
  """These blocks in order, as the stages that compile the fewest of them, and then are fewest."""
  best: list[tuple[int, tuple[Stage, ...]]] = [(0, ())]  # for each number of first blocks
  for end in range(1, len(blocks) + 1):
    options = []
    for cycle in range(1, min(LONGEST, end) + 1):
      last = tuple(blocks[end - cycle : end])
      start, repeat = end, 0
      while start >= cycle and tuple(blocks[start - cycle : start]) == last:
        start, repeat = start - cycle, repeat + 1
        options.append((best[start][0] + cycle, (*best[start][1], Stage(last, repeat))))
    best.append(min(options, key=lambda option: (option[0], len(option[1]))))
  return best[-1][1]
