"""Rotary positions in a config.json, in both spellings: nested, and with rope_theta beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from maxtext.checkpoints.hub.parts import Json, Keys
from maxtext.errors import CheckpointError

KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
LOCAL, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions of all layers alike; `theta` where the file does not say.

  `share` of each head turns where the file does not say; None: all of it, and the file may not say.
  `fixed`: which channels turn together is the block file's. `names`: older ones, as fields of the
  file, of rope_theta and partial_rotary_factor.
  """

  theta: float = 10_000.0
  share: float | None = None
  fixed: bool = False
  names: tuple[str, str] = ("rope_theta", "partial_rotary_factor")

  def read(self, config: Json) -> Keys:
    flat = _flat(config)
    for name, old in zip(("rope_theta", "partial_rotary_factor"), self.names):
      if (value := config.get(old)) is not None and flat.get(name) is None:
        flat = {**flat, name: value}
    found = read(flat, self.theta, config, self.share)
    return {k: v for k, v in found.items() if k != "rope_interleave" or not self.fixed}

  def write(self, keys: Keys) -> Json:
    theta, scaling = written(keys)
    found = {"rope_theta": theta, "rope_scaling": scaling, self.names[0]: theta}
    if self.share is not None:
      share = keys.get("partial_rotary_factor", 1.0)
      found |= {"partial_rotary_factor": share, self.names[1]: share}
      found["rope_scaling"] = scaling and {**scaling, "partial_rotary_factor": share}
    return found


@dataclasses.dataclass(frozen=True)
class LatentRope(Rope):
  """Those of latent attention, whose scores YaRN sharpens too, by mscale_all_dim."""

  def read(self, config: Json) -> Keys:
    flat, found = _flat(config), super().read(config)
    weight = flat.get("mscale_all_dim") or 0
    if _kind(flat) == "yarn":
      return {**found, "mscale": weight}
    if weight and _kind(flat) != "default":
      raise CheckpointError(f"config.json: mscale_all_dim {weight} is there with yarn only")
    return found

  def write(self, keys: Keys) -> Json:
    found = super().write(keys)
    weight = keys.get("mscale", 1.0)
    if keys.get("rope_type") != "yarn" or not weight:
      return found
    scaling = dict(found["rope_scaling"])
    factor = scaling["factor"]
    turned = scaling.pop("attention_factor", _mscale(factor, 1.0))
    over = (turned * _mscale(factor, weight) - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    return {**found, "rope_scaling": {**scaling, "mscale": rounded(over), "mscale_all_dim": weight}}


def rounded(number: float) -> float:
  """Without the last digits, which come of computing with it."""
  return float(f"{number:.12g}")


@dataclasses.dataclass(frozen=True)
class LocalRope:
  """Rotary positions of their own, not scaled, in layers with a window.

  Their theta is the field `local`, `local_theta` where the file does not say.
  """

  theta: float
  local_theta: float
  local: str = ""

  def read(self, config: Json) -> Keys:
    nested = _nested(config)
    if nested is None:
      near, far = {"rope_theta": config.get(self.local) if self.local else None}, _flat(config)
    else:
      near, far = dict(nested.get(LOCAL) or {}), dict(nested.get(FULL) or {})
      near_theta = config.get(self.local) if self.local else None
      near = {"rope_theta": near_theta, **near}
    if (kind := _kind(near)) != "default":
      raise CheckpointError(
        f"config.json: rope_type {kind!r} is not there for {LOCAL}; only 'default' is"
      )
    local = near.get("rope_theta") or self.local_theta
    return {**read(far, self.theta, config, None), "local_rope_max_timescale": local}

  def write(self, keys: Keys) -> Json:
    theta, scaling = written(keys)
    local = keys.get("local_rope_max_timescale", 10_000.0)
    far = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    near = {"rope_type": "default", "rope_theta": local}
    return {
      "rope_theta": theta,
      "rope_scaling": scaling,
      **({self.local: local} if self.local else {}),
      "rope_parameters": {FULL: far, LOCAL: near},
    }


def read(rope: Json, theta: float, config: Json, part: float | None) -> Keys:
  """The keys of one set of rotary parameters, of which `config` may have some besides; `part` as
  Rope.share.
  """
  kind = _kind(rope)
  if kind not in KINDS:
    raise CheckpointError(f"config.json: rope_type {kind!r} is none of {', '.join(KINDS)}")
  found: Keys = {"rope_max_timescale": rope.get("rope_theta") or theta}
  share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
  if share not in (None, 1) and part is None:
    kind_of = config.get("model_type")
    raise CheckpointError(f"config.json: partial_rotary_factor {share} is not there for {kind_of}")
  if part is not None:
    found["partial_rotary_factor"] = part if share is None else share
  longest = config.get("max_position_embeddings")
  original = config.get("original_max_position_embeddings")
  original = original or rope.get("original_max_position_embeddings") or longest
  if kind == "default":
    return found
  factor = rope.get("factor")
  if kind == "longrope" or (kind == "yarn" and rope.get("short_factor")):
    return found | {"rope_type": "longrope"} | _long(rope, original, longest)
  if factor is None and kind == "yarn" and original and longest:
    factor = longest / original
  if kind == "linear":
    return found | {"rope_linear_scaling_factor": _needed(factor, "factor", kind)}
  factor = _needed(factor, "factor", kind)
  if kind == "dynamic":  # transformers counts from the longest text, whatever else it is told
    original = longest
  found |= {
    "rope_factor": factor,
    "original_max_position_embeddings": _needed(original, "original_max_position_embeddings", kind),
  }
  if kind == "llama3":
    turns = ("low_freq_factor", "high_freq_factor")
    found |= {f"rope_{name}": _needed(rope.get(name), name, kind) for name in turns}
    return found | {"rope_type": "llama3.1"}
  if kind == "yarn":
    return found | {"rope_type": "yarn", "rope_interleave": False} | _yarn(rope, factor)
  return found | {"rope_type": "dynamic"}


def written(keys: Keys) -> tuple[float, Json | None]:
  """rope_theta and rope_scaling."""
  theta, kind = keys.get("rope_max_timescale", 10_000.0), keys.get("rope_type", "default")
  stretch = keys.get("rope_linear_scaling_factor") or 1.0
  if kind == "default" or (kind == "llama3.1" and not keys.get("rope_use_scale", True)):
    return theta, None if stretch == 1 else {"rope_type": "linear", "factor": stretch}
  if kind == "longrope":
    return theta, _written_long(keys)
  if kind == "dynamic":
    return theta, {"rope_type": kind, "factor": float(keys["rope_factor"])}
  scaling = {
    "rope_type": {"llama3.1": "llama3"}.get(kind, kind),
    "factor": float(keys["rope_factor"]),
    "original_max_position_embeddings": keys["original_max_position_embeddings"],
  }
  if kind == "llama3.1":
    low, high = keys.get("rope_low_freq_factor", 1), keys.get("rope_high_freq_factor", 4)
    return theta, scaling | {"low_freq_factor": float(low), "high_freq_factor": float(high)}
  fixed = keys.get("rope_attention_factor") if keys.get("rope_attention_scaling") else 1.0
  scaling |= {"beta_fast": keys.get("beta_fast", 32), "beta_slow": keys.get("beta_slow", 1)}
  scaling |= {} if keys.get("rope_truncate", True) else {"truncate": False}
  if fixed is not None:
    scaling |= {"attention_factor": float(fixed)}
  return theta, scaling


def _nested(config: Json) -> Mapping[str, Json] | None:
  """rope_parameters by kinds of layers, if they are."""
  new = config.get("rope_parameters") or {}
  return new if isinstance(new.get(FULL), Mapping) or isinstance(new.get(LOCAL), Mapping) else None


def _flat(config: Json) -> Json:
  """Rotary parameters of all layers, whichever the spelling."""
  if nested := _nested(config):
    kinds = ", ".join(nested)
    what = "all layers turn alike in this family"
    raise CheckpointError(f"config.json: rope_parameters has kinds of layers ({kinds}); {what}")
  rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
  for spelling in ("rope_parameters", "rope_scaling"):
    told = config.get(spelling) or {}
    rope |= {name: value for name, value in told.items() if value is not None}
  return rope


def _kind(rope: Json) -> str:
  kind = rope.get("rope_type") or rope.get("type") or "default"
  return "longrope" if kind == "su" else kind


def _needed(value: Any, name: str, kind: str) -> Any:
  if value is None:
    raise CheckpointError(f"config.json: rope_type {kind!r} needs {name}")
  return value


def _yarn(rope: Json, factor: float) -> Keys:
  told = rope.get("attention_factor")
  over, under = rope.get("mscale"), rope.get("mscale_all_dim")
  if told is None and over and under:
    told = _mscale(factor, over) / _mscale(factor, under)
  return {
    "beta_fast": rope.get("beta_fast") or 32,
    "beta_slow": rope.get("beta_slow") or 1,
    "rope_truncate": rope.get("truncate", True),
    "rope_attention_scaling": True,
    "rope_attention_factor": told,
  }


def _long(rope: Json, original: Any, longest: Any) -> Keys:
  original = _needed(original, "original_max_position_embeddings", "longrope")
  told, factor = rope.get("attention_factor"), rope.get("factor")
  return {
    "rope_short_factors": list(_needed(rope.get("short_factor"), "short_factor", "longrope")),
    "rope_long_factors": list(_needed(rope.get("long_factor"), "long_factor", "longrope")),
    "original_max_position_embeddings": original,
    "rope_attention_factor": told or _sharpened(factor or longest / original, original),
  }


def _sharpened(factor: float, original: float) -> float:
  """LongRoPE's factor of cos and sin in a stretched context (Ding et al. 2024, appendix A.2)."""
  return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _written_long(keys: Keys) -> Json:
  original, factor = keys["original_max_position_embeddings"], keys.get("rope_attention_factor", 1)
  scaling = {
    "rope_type": "longrope",
    "short_factor": list(keys["rope_short_factors"]),
    "long_factor": list(keys["rope_long_factors"]),
    "original_max_position_embeddings": original,
  }
  longest = keys.get("max_position_embeddings")
  usual = longest and math.isclose(factor, _sharpened(longest / original, original), rel_tol=1e-9)
  return scaling if usual else scaling | {"attention_factor": float(factor)}


def _mscale(factor: float, weight: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
