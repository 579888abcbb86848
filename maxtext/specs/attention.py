"""Attention, as data.

Letters: d width, h query heads, g key/value heads, k head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.errors import ConfigError
from maxtext.specs.norms import NormSpec
from maxtext.specs.rotary import GridRopeSpec, RopeSpec


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
  A cache holds latents, or with `expanded_cache` keys and values. `bias`: of the projections down
  to latents.
  """

  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int
  q_rank: int | None = None
  norm: NormSpec = NormSpec()
  mscale: float = 1.0
  bias: bool = False
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
  keys, before norm and rotation, as values; `clip` cuts queries, keys and values at plus and minus
  it before the rotation; `gate` multiplies the output by a sigmoid of a second query projection;
  `sink` is a learned score per head that has no value; `fused` keeps queries, keys and values in
  one kernel. Patches of an image are rotated by their place in a `grid`.

  A layer `keeps` its keys and values, as queries meet them, under a name, for later layers that by
  this name take them (`takes`) and make none of their own: those of the nearest layer before.
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
  clip: float | None = None
  temperature: TemperatureSpec | None = None
  bias: bool = False
  out_bias: bool | None = None  # None: as `bias`
  share_kv: bool = False
  keeps: str | None = None
  takes: str | None = None
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
    if self.rope is not None and self.latent is None and self.head_dim % 2:
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
    for name, plain in (("soft_cap", "no cap"), ("clip", "not cut")):
      if (limit := getattr(self, name)) is not None and limit <= 0:
        raise ConfigError(name, f"{limit} is not above 0 (null: {plain})")
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
    if self.takes is not None:
      own = {"keeps", "share_kv", "fused", "v_norm"}
      if given := sorted(name for name in own if getattr(self, name)):
        raise ConfigError(given[0], "is for a layer with keys and values of its own; leave it out")
    if self.latent is not None:
      self._check_latent(self.latent)

  @property
  def kv_projections(self) -> int:
    """How many there are: of keys and of values, of both in one, or none."""
    return 0 if self.takes else 1 if self.share_kv else 2

  def _check_latent(self, latent: LatentSpec) -> None:
    plain = {"share_kv", "keeps", "takes", "gate", "sink", "fused", "bias", "clip"}
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
