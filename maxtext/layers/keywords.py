"""The published keywords of an attention layer, folded into what our layers are made from."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from maxtext import sharding
from maxtext.caches import PagedCache, PromptCache, RowCache, Storage, axis_order
from maxtext.errors import ConfigError, closest
from maxtext.kernels import Options
from maxtext.layers.grouped import Names
from maxtext.layers.params import Compute
from maxtext.layers.vllm import Serving
from maxtext.specs import (
  ROPE_TYPES,
  AttentionSpec,
  CacheQuantSpec,
  GridRopeSpec,
  LatentSpec,
  NormSpec,
  QkNormSpec,
  RopeSpec,
  SectionsSpec,
  TemperatureSpec,
  YarnScaling,
)


class AttentionType(enum.Enum):
  """Whom a query sees: its past, a window or a chunk of it, everything, or its past and its block;
  MLA is the past, by way of latents.
  """

  GLOBAL = "global"
  LOCAL_SLIDING = "local_sliding"
  CHUNK = "chunk"
  FULL = "full"
  MLA = "mla"
  BLOCK_DIFFUSION = "block_diffusion"


_GIVEN_AS = {  # a field of the spec, or of what is in it -> the keyword or key that sets it
  "heads": "num_query_heads",
  "kv_heads": "num_kv_heads",
  "soft_cap": "attn_logits_soft_cap",
  "dropout": "dropout_rate",
  "scale": "query_pre_attn_scalar",
  "bias": "use_bias_in_projections",
  "share_kv": "share_kv_projections",
  "fused": "fused_qkv",
  "sink": "attention_sink",
  "qk_norm": "use_qk_norm",
  "sizes": "mrope_section",
  "rope.sections": "mrope_section",
  "rope.fraction": "partial_rotary_factor",
  "fraction": "partial_rotary_factor",
  "floor_scale": "temperature_tuning_floor_scale",
}
_TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of scaling by wavelength
MODES = ("train", "prefill", "autoregressive")
COMPUTE_ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3))


@dataclasses.dataclass(frozen=True)
class Keywords:
  """What a caller gave, by name; `config` is any object with the run's keys, or a run's Config."""

  given: Mapping[str, Any]

  def __getattr__(self, name: str) -> Any:
    return self.given[name]

  def setting(self, key: str, default: Any = None) -> Any:
    """A key of the run's configuration, wherever it stands in it; `default` where it has none."""
    found = (_held(holder, key) for holder in _holders(self.config))
    return next((value for value in found if value is not None), default)

  def check(self) -> None:
    """Raises ValueError or ConfigError for what no layer can be made from."""
    if self.num_kv_heads == -1:
      raise ValueError("num_kv_heads is not defined.")
    if self.num_kv_heads < 1:
      raise ConfigError("num_kv_heads", f"{self.num_kv_heads} is not at least 1")
    if self.num_query_heads % self.num_kv_heads:
      raise ValueError("Invalid num_kv_heads for GQA.")
    if tuple(self.compute_axis_order) not in COMPUTE_ORDERS:
      known = " or ".join(map(str, COMPUTE_ORDERS))
      raise ValueError(f"compute_axis_order must be {known}, but got {self.compute_axis_order}")
    check_mode(self.model_mode)
    if isinstance(self.config, str):
      raise ConfigError("config", f"{self.config!r} is a name; give the configuration, loaded")
    if self.use_mrope and not self.mrope_section:
      raise ConfigError("mrope_section", f"{self.mrope_section}: use_mrope needs three numbers")
    if self.quant is not None:
      raise ConfigError("quant", "products of quantised weights are not there yet; use None")
    mla = attention_type(self.attention_type) is AttentionType.MLA
    if mla and self.attention_kernel == "vllm_rpa":
      raise ConfigError("attention_kernel", "'vllm_rpa' has no latents; MLA takes any other")
    if self.model_mode != "train" and not self.prompt_length < self.max_target_length:
      raise ConfigError(
        "max_prefill_predict_length",
        f"{self.prompt_length} leaves no room to generate in max_target_length="
        f"{self.max_target_length}; use less",
      )

  @property
  def prompt_length(self) -> int:
    """Slots of the prompt's part of the cache."""
    if self.max_prefill_predict_length > 0:
      return self.max_prefill_predict_length
    return max(1, self.max_target_length // 2)

  def cache_kind(self) -> type:
    """The cache that suits what computes attention."""
    if self.attention_kernel == "vllm_rpa":
      return Serving
    if self.attention_kernel == "paged":
      return PagedCache
    return RowCache if self.use_ragged_attention else PromptCache

  def slots(self) -> tuple[int, int]:
    """Slots of the prompt's and of the generated part of the cache."""
    return self.prompt_length, self.max_target_length - self.prompt_length

  def storages(self) -> tuple[Storage, Storage]:
    """How the two parts are stored."""
    orders = (
      axis_order(key, self.given[key])
      for key in ("prefill_cache_axis_order", "ar_cache_axis_order")
    )
    quant, block = _cache_quant(self.kv_quant), self.ragged_block_size
    first, second = (Storage(self.dtype, quant, order, spans=True, block=block) for order in orders)
    return first, second

  def spec(self) -> AttentionSpec:
    """What the layer computes. Raises ConfigError at the keyword that it cannot be made from."""
    try:
      return self._spec()
    except ConfigError as e:
      raise ConfigError(_GIVEN_AS.get(e.where, e.where), e.problem) from None

  def _spec(self) -> AttentionSpec:
    kind = attention_type(self.attention_type)
    latent = self.latent() if kind is AttentionType.MLA else None
    tempered = self.temperature_tuning and self.is_nope_layer
    return AttentionSpec(
      heads=self.num_query_heads,
      kv_heads=self.num_kv_heads,
      head_dim=self.head_dim if latent is None else self._latent_head_dim(latent),
      rope=self.rope(kind),
      grid=self.grid() if self.is_vision else None,
      window=self._reach(kind, AttentionType.LOCAL_SLIDING, "sliding_window_size"),
      chunk=self._reach(kind, AttentionType.CHUNK, "chunk_attn_window_size"),
      block=self._reach(kind, AttentionType.BLOCK_DIFFUSION, "causal_block_size"),
      causal=kind is not AttentionType.FULL,
      qk_norm=QkNormSpec("rms", self._eps) if self.use_qk_norm else None,
      soft_cap=self.attn_logits_soft_cap or None,
      scale=self.query_pre_attn_scalar,
      temperature=TemperatureSpec(
        self.temperature_tuning_scale, self.temperature_tuning_floor_scale
      )
      if tempered
      else None,
      bias=self.use_bias_in_projections,
      share_kv=self.share_kv_projections,
      sink=bool(self.setting("attention_sink", False)),
      fused=bool(self.setting("fused_qkv", False)),
      dropout=self.dropout_rate,
      latent=latent,
    )

  @property
  def _eps(self) -> float:
    return self.setting("normalization_layer_epsilon", 1e-6)

  def _reach(self, kind: AttentionType, own: AttentionType, key: str) -> int | None:
    """The length that attention of kind `own` needs, a keyword or a key of the configuration."""
    if kind is not own:
      return None
    length = self.given.get(key) or self.setting(key)
    if not length or length < 1:
      raise ConfigError(key, f"{length}: attention_type={own.value} needs a length of at least 1")
    return length

  def latent(self) -> LatentSpec:
    """The ranks and widths of latent attention."""
    return LatentSpec(
      kv_rank=self.setting("kv_lora_rank", 512),
      nope_dim=self.setting("qk_nope_head_dim", 128),
      rope_dim=self.setting("qk_rope_head_dim", 64),
      value_dim=self.setting("v_head_dim", 128),
      q_rank=self.setting("q_lora_rank", 0) or None,
      norm=NormSpec("rms", self._eps),
      mscale=self._mscale(),
      expanded_cache=self.setting("mla_naive_kvcache", False),
    )

  def _mscale(self) -> float:
    """YaRN's factor of the scores' scale, in a context longer than the original one."""
    length, original = (
      self.setting(key, 0)
      for key in ("max_position_embeddings", "original_max_position_embeddings")
    )
    if not original or length <= original:
      return 1.0
    return 0.1 * self.setting("mscale", 1.0) * math.log(self.setting("rope_factor", 40)) + 1

  def _latent_head_dim(self, latent: LatentSpec) -> int:
    """The width of latent attention's queries; head_dim may say it, or that of the values."""
    width = latent.nope_dim + latent.rope_dim
    if self.head_dim not in (width, latent.value_dim):
      raise ConfigError(
        "head_dim",
        f"{self.head_dim} is neither qk_nope_head_dim + qk_rope_head_dim = {width} nor "
        f"v_head_dim = {latent.value_dim}",
      )
    return width

  def grid(self) -> GridRopeSpec:
    """How the patches of an image are rotated."""
    side = self.setting("image_size_for_vit", 336) // self.setting("patch_size_for_vit", 14)
    return GridRopeSpec(side, side, self.setting("rope_theta_for_vit", 10_000))

  def rope(self, kind: AttentionType) -> RopeSpec | None:
    """How queries and keys are rotated."""
    if self.is_nope_layer or self.is_vision:
      return None
    name = self.rope_type or self.setting("rope_type", "default")
    own = "local" if kind is AttentionType.LOCAL_SLIDING else "global"
    theta = self.setting(f"{own}_rope_max_timescale", 0)
    parts: dict[str, Any] = {
      "max_timescale": theta if theta > 0 else self.setting("rope_max_timescale", 10_000),
      "min_timescale": self.setting("rope_min_timescale", 1),
      "fraction": self.setting("partial_rotary_factor", 1.0),
      "sections": SectionsSpec(tuple(self.mrope_section)) if self.use_mrope else None,
      "interleave": self.setting("rope_interleave", name == "yarn"),
    }
    if name not in ROPE_TYPES:
      near = closest(name, ROPE_TYPES)
      raise ConfigError("rope_type", f"{name!r} is none of {', '.join(ROPE_TYPES)}{near}")
    scaling, factor, length = ROPE_TYPES[name]
    factor = self.setting("rope_factor", factor)
    length = self.setting("original_max_position_embeddings", length)
    if scaling is YarnScaling:
      parts["scaling"] = self._yarn(factor, length)
    elif scaling is not None and self.setting("rope_use_scale", True):
      turns = {name: self.setting(f"rope_{name}", turn) for name, turn in _TURNS.items()}
      parts["scaling"] = scaling(factor=factor, original_length=length, **turns)
    else:
      parts["factor"] = self.setting("rope_linear_scaling_factor", 1.0)
    return RopeSpec(**parts)

  def _yarn(self, factor: float, length: int) -> YarnScaling:
    scaled = self.setting("rope_attention_scaling", False)
    return YarnScaling(
      factor=factor,
      original_length=length,
      beta_fast=self.setting("beta_fast", 32),
      beta_slow=self.setting("beta_slow", 1),
      truncate=self.setting("rope_truncate", True),
      attention_factor=self.setting("rope_attention_factor") if scaled else 1.0,
    )

  def kernels(self) -> tuple[str, str | None]:
    """The kernels of `kernel` and `decode_kernel`: what reads a part of a cache is 'ragged'."""
    name = "autoselected" if self.attention_kernel == "paged" else self.attention_kernel
    if name == "vllm_rpa" and self.model_mode == "train":
      name = "autoselected"
    ragged = self.attention_kernel == "paged" or self.use_ragged_attention
    return name, "ragged" if ragged else None

  def compute(self) -> Compute:
    """How the layer computes it."""
    precision = self.setting("matmul_precision", "default")
    kernel, decode_kernel = self.kernels()
    return Compute(
      dtype=jnp.dtype(self.dtype),
      weight_dtype=jnp.dtype(self.weight_dtype),
      kernel=Options.of(kernel, self.setting),
      decode_kernel=decode_kernel,
      matmul_precision=None if precision == "default" else precision,
      f32_scores=self.float32_qk_product,
      heads_first=tuple(self.compute_axis_order) == COMPUTE_ORDERS[1],
      reshape_q=self.reshape_q,
    )

  def names(self) -> dict[str, Names]:
    """The logical axes of activations in every mode.

    Raises ConfigError where they are not as many as the activation has.
    """
    for name, axes in self.given.items():
      count = 3 if name.endswith("input_axis_names") else 4
      if name.endswith("_axis_names") and len(axes) != count:
        raise ConfigError(name, f"{axes} are {len(axes)} names, and these arrays have {count} axes")
    qkv = ("query", "key", "value")
    train = {name: getattr(self, f"{name}_axis_names") for name in (*qkv, "input", "out")}
    prefill = {name: getattr(self, f"prefill_{name}_axis_names") for name in train}
    decode = {name: ("decode_batch", "decode_length", *train[name][2:]) for name in qkv}
    decode |= {name: getattr(self, f"decode_{name}_axis_names") for name in ("input", "out")}
    return dict(zip(MODES, (Names(**axes) for axes in (train, prefill, decode))))

  def layout(self) -> sharding.Layout | None:
    """The mesh with the configuration's rules; None without a mesh."""
    rules = self.setting("logical_axis_rules")
    if self.mesh is None or (rules is None and self.mesh.size == 1):
      return None
    if rules is None:
      raise ConfigError("mesh", "config has no logical_axis_rules, which say what a mesh splits")
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    table: dict[str, tuple[str, ...]] = {}
    for name, axes in pairs:
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      table.setdefault(name, tuple(axis for axis in axes if axis in self.mesh.shape))
    return sharding.Layout(self.mesh, sharding.Rules({sharding.SLOTS: ()} | table))


def check_mode(mode: Any) -> None:
  """Raises ConfigError for what is no model_mode."""
  if mode not in MODES:
    near = closest(str(mode), MODES)
    raise ConfigError("model_mode", f"{mode!r} is none of {', '.join(MODES)}{near}")


def attention_type(given: Any) -> AttentionType:
  """The type that is given, itself or as its value; raises ConfigError."""
  try:
    return AttentionType(given)
  except ValueError:
    known = [kind.value for kind in AttentionType]
    near = closest(str(given), known)
    problem = f"{given!r} is none of {', '.join(known)}{near}"
    raise ConfigError("attention_type", problem) from None


def _cache_quant(given: Any) -> CacheQuantSpec | None:
  """What `kv_quant` asks for: a CacheQuantSpec, or anything with its `dtype` and `axis_cfg`."""
  if given is None or isinstance(given, CacheQuantSpec):
    return given
  if not (hasattr(given, "dtype") and hasattr(given, "axis_cfg")):
    problem = f"{given!r} is not a CacheQuantSpec, and has no dtype and axis_cfg"
    raise ConfigError("kv_quant", problem)
  name = str(jnp.dtype(given.dtype))
  return CacheQuantSpec("fp8" if name == "float8_e4m3fn" else name, given.axis_cfg)


def _held(holder: Any, key: str) -> Any:
  """What an object or a mapping has under a key; None where it has none, whatever it raises."""
  if isinstance(holder, Mapping):
    return holder.get(key)
  try:
    return getattr(holder, key, None)
  except (KeyError, ValueError):
    return None


def _holders(config: Any) -> Iterator[Any]:
  """A configuration, and the sections that it consists of."""
  if config is None:
    return
  yield config
  if dataclasses.is_dataclass(config):
    yield from (getattr(config, field.name) for field in dataclasses.fields(config))
