"""Rotary positions, as data: timescales, their scalings for a longer context, and grids."""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError
from maxtext.specs.limits import above, at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class WavelengthScaling:
  """Pairs that turn less than `low_freq_factor` times in `original_length` tokens are slowed by
  `factor`, those that turn more than `high_freq_factor` times are not, blended between. The two may
  be one.
  """

  kind: Literal["wavelength"] = "wavelength"
  factor: float
  original_length: int
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self):
    at_least(self, 1, "factor", "original_length")
    above(self, 0, "low_freq_factor")
    if self.high_freq_factor < self.low_freq_factor:
      above(self, self.low_freq_factor, "high_freq_factor", other="low_freq_factor")


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
    at_least(self, 1, "factor", "original_length")
    above(self, 0, "beta_slow")
    if self.beta_fast < self.beta_slow:
      above(self, self.beta_slow, "beta_fast", other="beta_slow")
    if self.attention_factor is not None:
      above(self, 0, "attention_factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkScaling:
  """The slowest timescale grows with `length` tokens beyond `original_length`.

  With a length of None it is that of each document, as far as it goes when it is computed: then a
  token that is decoded turns its query by more than the keys of tokens that were there before it.
  """

  kind: Literal["ntk"] = "ntk"
  factor: float
  original_length: int
  length: int | None = None

  def __post_init__(self):
    at_least(self, 1, "factor", "original_length")
    if self.length is not None:
      at_least(self, 1, "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongScaling:
  """LongRoPE (Ding et al. 2024): pair i is slowed by `long[i]` where there are more than
  `original_length` tokens, by `short[i]` elsewhere; `attention_factor` multiplies cos and sin.

  The tokens are `length`, or with None those of each document, as in NtkScaling.
  """

  kind: Literal["long"] = "long"
  short: tuple[float, ...]
  long: tuple[float, ...]
  original_length: int
  length: int | None = None
  attention_factor: float = 1.0

  def __post_init__(self):
    at_least(self, 1, "original_length")
    if self.length is not None:
      at_least(self, 1, "length")
    above(self, 0, "attention_factor")
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
    above(self, 0, "min_timescale", "factor", "fraction")
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
    if self.sections is not None and getattr(self.scaling, "length", 0) is None:
      raise ConfigError("scaling", "goes by documents, which have one axis; set its length")
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
    at_least(self, 1, "height", "width")
    above(self, 1, "max_timescale")
