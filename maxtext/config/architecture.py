"""The `architecture` section: sizes and choices that decoder block files ask for by `${key}`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from maxtext.bounds import Count, CountOrOff, Fraction, NotNegative, Positive, Whole
from maxtext.specs import ROPE_TYPES, Activation


@dataclasses.dataclass(frozen=True)
class Architecture:
  decoder_block: str
  global_parameter_scale: Count
  base_emb_dim: Count
  base_num_query_heads: Count
  base_num_kv_heads: Count
  head_dim: Count | None
  base_mlp_dim: Count
  base_num_decoder_layers: Count
  layer_pattern: tuple[str, ...]
  mtp_num_layers: Whole
  blocks: Mapping[str, Any]
  mlp_activations: tuple[Activation, ...]
  mlp_activations_limit: Positive | None
  mlp_bias: bool
  attention_bias: bool
  attention_out_bias: bool | None
  dropout_rate: Fraction
  vocab_size: Count | None
  logits_via_embedding: bool
  embedding_multiplier: Positive
  residual_multiplier: Positive
  logits_multiplier: Positive
  normalization_layer_epsilon: Positive
  final_logits_soft_cap: Positive | None
  attn_logits_soft_cap: Positive | None
  clip_qkv: Positive | None
  sliding_window_size: Count | None
  chunk_attn_window_size: Count | None
  attention_sink: bool
  share_kv_projections: bool
  fused_qkv: bool
  use_qk_norm: bool
  use_post_attn_norm: bool
  use_post_ffw_norm: bool
  query_pre_attn_scalar: Positive | None
  nope_layer_interval: CountOrOff
  temperature_tuning: bool
  temperature_tuning_scale: NotNegative
  temperature_tuning_floor_scale: Positive
  q_lora_rank: Whole
  kv_lora_rank: Count
  qk_nope_head_dim: Count
  qk_rope_head_dim: Count
  v_head_dim: Count
  mscale: NotNegative
  mla_naive_kvcache: bool
  gdn_num_key_heads: Count
  gdn_num_value_heads: Count
  gdn_key_head_dim: Count
  gdn_value_head_dim: Count
  gdn_conv_kernel_dim: Count
  trainable_position_size: Count
  max_position_embeddings: Count | None
  rope_min_timescale: Positive
  rope_max_timescale: Positive
  local_rope_max_timescale: Positive
  rope_linear_scaling_factor: Positive
  rope_type: Literal["default", "llama3.1", "yarn", "dynamic", "longrope"]
  rope_use_scale: bool
  rope_factor: Positive | None
  original_max_position_embeddings: Count | None
  rope_low_freq_factor: Positive
  rope_high_freq_factor: Positive
  rope_short_factors: tuple[Positive, ...]
  rope_long_factors: tuple[Positive, ...]
  beta_fast: Positive
  beta_slow: Positive
  rope_truncate: bool
  rope_attention_scaling: bool
  rope_attention_factor: Positive | None
  rope_interleave: bool | None
  partial_rotary_factor: Fraction
  num_experts: Count
  num_experts_per_tok: Count
  base_moe_mlp_dim: Count | None
  shared_experts: Whole
  base_shared_mlp_dim: Count | None
  first_num_dense_layers: Whole
  interleave_moe_layer_step: Count
  routed_score_func: Literal["softmax", "softmax_of_chosen", "sigmoid"]
  norm_topk_prob: bool
  routed_scaling_factor: Positive
  routed_bias: bool
  n_routing_groups: CountOrOff
  topk_routing_group: CountOrOff

  def complaints(self) -> Iterator[tuple[str, ...]]:
    scale = self.global_parameter_scale
    if scale & (scale - 1):
      below = 1 << (scale.bit_length() - 1)
      yield (
        "global_parameter_scale",
        f"{scale} is not a power of two; use {below} or {2 * below}, or set the base_ sizes",
      )
    if self.dropout_rate == 1:
      yield "dropout_rate", "1 drops everything; use a fraction below 1"
    if self.rope_min_timescale >= self.rope_max_timescale:
      yield (
        "rope_max_timescale",
        f"{self.rope_max_timescale:g} must be above rope_min_timescale={self.rope_min_timescale:g}",
        "rope_min_timescale",
      )
    if self.rope_type == "yarn" and self.beta_slow > self.beta_fast:
      yield (
        "beta_slow",
        f"beta_fast={self.beta_fast:g} must not be below beta_slow={self.beta_slow:g}",
        "beta_fast",
      )
    yield from self._activation_complaints()

  def _activation_complaints(self) -> Iterator[tuple[str, ...]]:
    functions = [a for a in self.mlp_activations if a != "linear"]
    if len(functions) != 1 or len(self.mlp_activations) > 2:
      yield (
        "mlp_activations",
        f"[{', '.join(self.mlp_activations)}] must be one activation, as [gelu], "
        "or a gated one, as [silu, linear]",
      )

  def routing(self) -> dict[str, Any]:
    """The keys of experts that may say off, and whether there is a layer that all tokens share."""
    wanted = self.shared_experts > 0 or self.base_shared_mlp_dim is not None
    groups = max(self.n_routing_groups, 1)
    return {
      "with_shared_experts": wanted,
      "n_routing_groups": groups,
      "topk_routing_group": groups if self.topk_routing_group < 0 else self.topk_routing_group,
    }

  def sizes(self) -> dict[str, int]:
    """The base_ sizes after `global_parameter_scale` 2^k, and head_dim, which does not scale.

    Each factor of two goes, in turn, to heads and mlp, to the width, and to the layers.
    """
    thirds, rest = divmod(self.global_parameter_scale.bit_length() - 1, 3)
    wide, deep = 1 << thirds + (rest > 1), 1 << thirds
    heads = 1 << thirds + (rest > 0)
    expert = self.base_moe_mlp_dim or self.base_mlp_dim
    return {
      "base_emb_dim": self.base_emb_dim * wide,
      "base_num_query_heads": self.base_num_query_heads * heads,
      "base_num_kv_heads": self.base_num_kv_heads * heads,
      "base_mlp_dim": self.base_mlp_dim * heads,
      "base_moe_mlp_dim": expert * heads,
      "base_shared_mlp_dim": (self.base_shared_mlp_dim or self.shared_experts * expert) * heads,
      "base_num_decoder_layers": self.base_num_decoder_layers * deep,
      "head_dim": self.head_dim or self.base_emb_dim // self.base_num_query_heads,
    }

  def rotary(self) -> dict[str, Any]:
    """The rope keys that may be null, as `rope_type` has them there."""
    _, default, length = ROPE_TYPES.get(self.rope_type, (None, 1.0, 4096))
    interleave, factor = self.rope_interleave, self.rope_factor or default
    return {
      "rope_factor": factor,
      "original_max_position_embeddings": self.original_max_position_embeddings or length,
      "rope_interleave": self.rope_type == "yarn" if interleave is None else interleave,
      "rope_attention_factor": self.rope_attention_factor
      or (1 if self.rope_type == "longrope" else None),
      "latent_mscale": 0.1 * self.mscale * math.log(factor) + 1
      if self.rope_type == "yarn"
      else 1.0,
    }

  def latent(self) -> dict[str, Any]:
    """What the sizes of latent attention are together, and the rank of its queries, if any."""
    return {
      "qk_head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
      "q_lora_rank": self.q_lora_rank or None,
    }


# What block files may ask for besides keys, and the keys that it is made of, the first of which is
# the one to change.
MADE = {
  "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
  "latent_mscale": ("mscale", "rope_factor", "rope_type"),
  "base_moe_mlp_dim": ("base_moe_mlp_dim", "base_mlp_dim"),
  "base_shared_mlp_dim": ("base_shared_mlp_dim", "shared_experts"),
  "with_shared_experts": ("shared_experts", "base_shared_mlp_dim"),
}
