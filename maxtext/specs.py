"""What a decoder is, as data: a model family is a value of these types, not a class of its own.

Letters: d width, h query heads, g key/value heads, k head_dim, f mlp hidden, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_exact", "relu", "linear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WavelengthScaling:
  """Pairs that turn less than `low_freq_factor` times in `original_length` tokens are slowed by
  `factor`, those that turn more than `high_freq_factor` times are not, blended between.
  """

  kind: Literal["wavelength"] = "wavelength"
  factor: float
  original_length: int
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self):
    _at_least(self, 1, "factor", "original_length")
    _above(self, 0, "low_freq_factor")
    _above(self, self.low_freq_factor, "high_freq_factor", other="low_freq_factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
  """YaRN (Peng et al. 2023, section 3.2): pairs up to the one that turns `beta_fast` times in
  `original_length` tokens are kept, from the one of `beta_slow` turns on slowed by `factor`, with
  a ramp between, whose ends are whole pairs with `truncate`.

  `attention_factor` multiplies cos and sin; None: 0.1 ln(factor) + 1.
  """

  kind: Literal["yarn"] = "yarn"
  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None

  def __post_init__(self):
    _at_least(self, 1, "factor", "original_length")
    _above(self, 0, "beta_slow")
    _above(self, self.beta_slow, "beta_fast", other="beta_slow")
    if self.attention_factor is not None:
      _above(self, 0, "attention_factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkScaling:
  """The slowest timescale grows with the tokens of a run, `length`, beyond `original_length`.

  The length is static, unlike in "dynamic" scaling: a cached key fits every later query.
  """

  kind: Literal["ntk"] = "ntk"
  factor: float
  original_length: int
  length: int

  def __post_init__(self):
    _at_least(self, 1, "factor", "original_length", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling:
  """LongRoPE (Ding et al. 2024): pair i is slowed by `long[i]` in a run of more than
  `original_length` tokens, by `short[i]` in others; `attention_factor` multiplies cos and sin.
  """

  kind: Literal["long"] = "long"
  short: tuple[float, ...]
  long: tuple[float, ...]
  original_length: int
  length: int
  attention_factor: float = 1.0

  def __post_init__(self):
    _at_least(self, 1, "original_length", "length")
    _above(self, 0, "attention_factor")
    for name in ("short", "long"):
      if not all(factor > 0 for factor in getattr(self, name)):
        raise ConfigError(name, "must be above 0 for every pair")
    if len(self.short) != len(self.long):
      raise ConfigError("long", f"{len(self.long)} factors, but short has {len(self.short)}")


Scaling = WavelengthScaling | YarnScaling | NtkScaling | LongScaling


# The published names of rotary kinds: the scaling, its factor and its original length by default.
ROPE_TYPES: dict[str, tuple[type | None, float, int]] = {
  "default": (None, 1.0, 1),
  "llama3.1": (WavelengthScaling, 8.0, 8192),
  "yarn": (YarnScaling, 40.0, 4096),
}


@dataclasses.dataclass(frozen=True)
class SectionsSpec:
  """Positions on three axes (time, height, width): `sizes` pairs turn by each of them.

  `interleaved`: the axes alternate, t h w t h w ..., while they last; the rest turns by time.
  """

  sizes: tuple[int, ...]
  interleaved: bool = False

  def __post_init__(self):
    if len(self.sizes) != 3 or min(self.sizes) < 0:
      raise ConfigError(
        "sizes", f"{list(self.sizes)} are not the pairs of three axes; write [time, height, width]"
      )
    time, height, width = self.sizes
    pairs = time + height + width
    if self.interleaved and (height > (pairs + 1) // 3 or width > pairs // 3):
      raise ConfigError(
        "sizes",
        f"{list(self.sizes)} cannot alternate; use at most {(pairs + 1) // 3} pairs for the height "
        f"and {pairs // 3} for the width",
      )


@dataclasses.dataclass(frozen=True)
class RopeSpec:
  """Rotary positions: pair i of n turns once in `min_timescale * (max/min)^(i/n) * factor` x 2 pi
  tokens, or as its `scaling` says.

  The first `fraction` of the channels turn as if they were the whole head; `proportional`: of the
  whole head's pairs the first `fraction` turn. Pair i is channels i and i + n, or with `interleave`
  2i and 2i + 1.
  """

  max_timescale: float = 10_000.0
  min_timescale: float = 1.0
  factor: float = 1.0
  fraction: float = 1.0
  proportional: bool = False
  interleave: bool = False
  sections: SectionsSpec | None = None
  scaling: Scaling | None = None

  def __post_init__(self):
    _above(self, 0, "min_timescale", "factor", "fraction")
    if self.max_timescale <= self.min_timescale:
      raise ConfigError(
        "max_timescale", f"{self.max_timescale} is not above min_timescale={self.min_timescale}"
      )
    if self.fraction > 1:
      raise ConfigError("fraction", f"{self.fraction} is more than the whole head; use at most 1")
    if self.scaling is not None and self.factor != 1:
      raise ConfigError(
        "factor", f"{self.factor:g} and a scaling both stretch positions; leave one away"
      )
    if self.scaling is not None and self.proportional:
      raise ConfigError("proportional", "has no scaling; leave the scaling away, or use factor")

  def turning(self, head_dim: int) -> int:
    """How many channels of a head turn, those that do so by an angle of 0 included."""
    return head_dim if self.proportional else int(head_dim * self.fraction)

  def check(self, head_dim: int) -> None:
    """Raises ConfigError where a head of this width cannot be turned so."""
    dim = self.turning(head_dim)
    if dim < 2 or dim % 2:
      raise ConfigError(
        "fraction",
        f"{self.fraction:g} of {head_dim} channels is {dim}, and rotary positions turn pairs; "
        "use a fraction that gives an even number",
      )
    if self.proportional and self.fraction * head_dim < 2:
      raise ConfigError(
        "fraction", f"{self.fraction:g} of {head_dim} channels is no pair; raise it"
      )
    if self.sections is not None and sum(self.sections.sizes) != dim // 2:
      raise ConfigError(
        "sections",
        f"{list(self.sections.sizes)} are {sum(self.sections.sizes)} pairs, "
        f"but {dim} channels turn; use sizes whose sum is {dim // 2}",
      )
    if isinstance(self.scaling, LongScaling) and len(self.scaling.short) != dim // 2:
      raise ConfigError(
        "scaling",
        f"short and long have {len(self.scaling.short)} factors; use {dim // 2}, one for each pair",
      )
    if isinstance(self.scaling, NtkScaling) and dim == 2:
      raise ConfigError("scaling", "ntk needs two pairs to turn, and there is one; widen the head")


@dataclasses.dataclass(frozen=True)
class GridRopeSpec:
  """Rotary positions of the patches of an image, row by row: half of the pairs turn by the column
  and half by the row, or with `rows_first` in the other order.

  With `class_token` a last token follows, at (0, 0), and the patches start at (1, 1).
  """

  height: int
  width: int
  max_timescale: float = 10_000.0
  interleave: bool = True
  rows_first: bool = False
  class_token: bool = True

  def __post_init__(self):
    _at_least(self, 1, "height", "width")
    _above(self, 1, "max_timescale")


def _at_least(spec: object, low: int, *names: str) -> None:
  for name in names:
    if getattr(spec, name) < low:
      raise ConfigError(name, f"{getattr(spec, name):g} is not at least {low}")


def _above(spec: object, low: float, *names: str, other: str = "") -> None:
  for name in names:
    if getattr(spec, name) <= low:
      least = f"{other}={low:g}" if other else f"{low:g}"
      raise ConfigError(name, f"{getattr(spec, name):g} is not above {least}")


@dataclasses.dataclass(frozen=True)
class NormSpec:
  """Normalisation over the width: root mean square, the same with a scale of 1 + weight or with no
  weight at all (l2), or layer norm with a bias.
  """

  kind: Literal["rms", "rms_plus_one", "l2", "layer"] = "rms"
  eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class QkNormSpec(NormSpec):
  """Normalisation of queries and of keys: head by head, or `whole`, over all heads at once; before
  the rotary positions, or with `rotated` after them (and then only where there are any).
  """

  whole: bool = False
  rotated: bool = False


@dataclasses.dataclass(frozen=True)
class TemperatureSpec:
  """Queries at position p are multiplied by 1 + scale * log(1 + floor((p + 1) / floor_scale))."""

  scale: float = 0.1
  floor_scale: float = 8192.0

  def __post_init__(self):
    if self.floor_scale <= 0:
      raise ConfigError("floor_scale", f"{self.floor_scale} is not above 0")


@dataclasses.dataclass(frozen=True)
class LatentSpec:
  """Low-rank queries and keys (multi-head latent attention, DeepSeek-V2 2024, section 2.1).

  Keys and values are expanded from a latent of `kv_rank`, and all heads share a rotary key of
  `rope_dim`; queries come from one of `q_rank` (None: straight from the input). A head's query has
  nope_dim + rope_dim channels, its value value_dim. The scores' scale is multiplied by mscale^2.
  A cache holds latents, or with `expanded_cache` keys and values.
  """

  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int
  q_rank: int | None = None
  norm: NormSpec = NormSpec()
  mscale: float = 1.0
  expanded_cache: bool = False

  def __post_init__(self):
    for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank"):
      if (size := getattr(self, name)) is not None and size < 1:
        raise ConfigError(name, f"{size} is not at least 1")
    if self.rope_dim % 2:
      raise ConfigError("rope_dim", f"{self.rope_dim} is odd, rotary positions turn pairs")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """One attention layer: its heads, who is seen, and how scores are made.

  A query sees its past: `window` tokens back (None: all of it), within its `chunk` of positions, up
  to the end of its `block` of positions, or with causal=False the future too. `share_kv` uses the
  keys, before norm and rotation, as values; `gate` multiplies the output by a sigmoid of a second
  query projection; `sink` is a learned score per head that has no value; `fused` keeps queries,
  keys and values in one kernel. Patches of an image are rotated by their place in a `grid`.
  """

  heads: int
  kv_heads: int
  head_dim: int
  rope: RopeSpec | None = RopeSpec()
  grid: GridRopeSpec | None = None
  window: int | None = None
  chunk: int | None = None
  block: int | None = None
  causal: bool = True
  qk_norm: QkNormSpec | None = None
  v_norm: NormSpec | None = None
  soft_cap: float | None = None
  scale: float | None = None  # None: head_dim ** -0.5
  temperature: TemperatureSpec | None = None
  bias: bool = False
  out_bias: bool | None = None  # None: as `bias`
  share_kv: bool = False
  gate: bool = False
  sink: bool = False
  fused: bool = False
  dropout: float = 0.0
  latent: LatentSpec | None = None

  def __post_init__(self):
    for name in ("heads", "kv_heads", "head_dim"):
      if getattr(self, name) < 1:
        raise ConfigError(name, f"{getattr(self, name)} is not at least 1")
    if self.heads % self.kv_heads:
      raise ConfigError("kv_heads", f"{self.kv_heads} does not divide {self.heads} query heads")
    if self.rope is not None and self.head_dim % 2:
      raise ConfigError("head_dim", f"{self.head_dim} is odd, rotary positions turn pairs")
    if self.rope is not None:
      try:
        self.rope.check(self.head_dim if self.latent is None else self.latent.rope_dim)
      except ConfigError as e:
        raise ConfigError(f"rope.{e.where}", e.problem) from None
    for name, plain in (
      ("window", "the whole past"),
      ("chunk", "no chunks"),
      ("block", "no blocks"),
    ):
      if (length := getattr(self, name)) is not None and length < 1:
        raise ConfigError(name, f"{length} is not at least 1 (null: {plain})")
    if self.soft_cap is not None and self.soft_cap <= 0:
      raise ConfigError("soft_cap", f"{self.soft_cap} is not above 0 (null: no cap)")
    if not 0 <= self.dropout < 1:
      raise ConfigError("dropout", f"{self.dropout} is not from 0 up to 1")
    if not self.causal and self.block is not None:
      raise ConfigError("block", "means nothing to a layer that sees the future; leave out causal")
    if self.fused and (self.share_kv or self.gate):
      raise ConfigError("fused", "has no place for share_kv or gate; leave it out")
    if self.grid is not None and self.rope is not None:
      raise ConfigError("grid", "and rope both rotate queries and keys; set rope: null")
    if self.temperature is not None and self.rope is not None:
      raise ConfigError("temperature", "is for layers without rotary positions; set rope: null")
    if self.latent is not None:
      self._check_latent(self.latent)

  def _check_latent(self, latent: LatentSpec) -> None:
    plain = {"share_kv", "gate", "sink", "fused", "bias"}
    if given := sorted(name for name in plain if getattr(self, name)):
      raise ConfigError(given[0], "is not there for latent attention; leave it out")
    for name in ("qk_norm", "v_norm", "temperature"):
      if getattr(self, name) is not None:
        raise ConfigError(name, "is not there for latent attention; its latents have norms")
    if self.kv_heads != self.heads:
      raise ConfigError(
        "kv_heads", f"{self.kv_heads}: latent attention has a key per head; write {self.heads}"
      )
    if (wide := latent.nope_dim + latent.rope_dim) != self.head_dim:
      raise ConfigError("head_dim", f"{self.head_dim} is not nope_dim + rope_dim = {wide}")


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


@dataclasses.dataclass(frozen=True)
class CacheQuantSpec:
  """In how many bits a cache keeps keys and values, and which numbers share a scale.

  'dkv': the head_dim numbers of a token's head; 'heads_and_dkv': those of all its heads.
  """

  format: Literal["int8", "int4", "fp8"] = "int8"
  axis: Literal["dkv", "heads_and_dkv"] = "heads_and_dkv"

  def __post_init__(self):
    for key, value, known in (
      ("kv_quant_dtype", self.format, ("int8", "int4", "fp8")),
      ("kv_quant_axis", self.axis, ("dkv", "heads_and_dkv")),
    ):
      if value not in known:
        raise ConfigError(key, f"{value!r} is none of {', '.join(known)}")
