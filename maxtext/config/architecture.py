"""The `architecture` section: sizes and choices that decoder block files ask for by `${key}`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from maxtext.bounds import Count, Fraction, Positive
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
  mlp_activations: tuple[Activation, ...]
  mlp_bias: bool
  attention_bias: bool
  dropout_rate: Fraction
  vocab_size: Count | None
  logits_via_embedding: bool
  embedding_multiplier: Positive
  residual_multiplier: Positive
  logits_multiplier: Positive
  normalization_layer_epsilon: Positive
  final_logits_soft_cap: Positive | None
  attn_logits_soft_cap: Positive | None
  sliding_window_size: Count | None
  chunk_attn_window_size: Count | None
  attention_sink: bool
  share_kv_projections: bool
  fused_qkv: bool
  use_qk_norm: bool
  use_post_attn_norm: bool
  use_post_ffw_norm: bool
  query_pre_attn_scalar: Positive | None
  trainable_position_size: Count
  max_position_embeddings: Count | None
  rope_min_timescale: Positive
  rope_max_timescale: Positive
  local_rope_max_timescale: Positive
  rope_linear_scaling_factor: Positive
  rope_type: Literal["default", "llama3.1", "yarn"]
  rope_use_scale: bool
  rope_factor: Positive | None
  original_max_position_embeddings: Count | None
  rope_low_freq_factor: Positive
  rope_high_freq_factor: Positive
  beta_fast: Positive
  beta_slow: Positive
  rope_truncate: bool
  rope_attention_scaling: bool
  rope_attention_factor: Positive | None
  rope_interleave: bool | None
  partial_rotary_factor: Fraction

  def complaints(self) -> Iterator[tuple[str, ...]]:
    scale, heads, kv_heads = (
      self.global_parameter_scale,
      self.base_num_query_heads,
      self.base_num_kv_heads,
    )
    if scale & (scale - 1):
      below = 1 << (scale.bit_length() - 1)
      yield (
        "global_parameter_scale",
        f"{scale} is not a power of two; use {below} or {2 * below}, or set the base_ sizes",
      )
    if heads % kv_heads:
      yield (
        "base_num_kv_heads",
        f"{heads} query heads cannot share {kv_heads} kv heads evenly; "
        f"base_num_kv_heads must be one of {_divisors(heads)}",
        "base_num_query_heads",
      )
    if self.head_dim is None and self.base_emb_dim % heads:
      yield (
        "base_emb_dim",
        f"width {self.base_emb_dim} is not a multiple of {heads} heads; "
        "change one of them, or set head_dim",
        "base_num_query_heads",
      )
    if self.dropout_rate == 1:
      yield "dropout_rate", "1 drops everything; use a fraction below 1"
    if self.rope_min_timescale >= self.rope_max_timescale:
      yield (
        "rope_max_timescale",
        f"{self.rope_max_timescale:g} must be above rope_min_timescale={self.rope_min_timescale:g}",
        "rope_min_timescale",
      )
    if self.rope_type == "yarn" and self.beta_slow >= self.beta_fast:
      yield (
        "beta_slow",
        f"beta_fast={self.beta_fast:g} must be above beta_slow={self.beta_slow:g}",
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

  def sizes(self) -> dict[str, int]:
    """The base_ sizes after `global_parameter_scale` 2^k, and head_dim, which does not scale.

    Each factor of two goes, in turn, to heads and mlp, to the width, and to the layers.
    """
    thirds, rest = divmod(self.global_parameter_scale.bit_length() - 1, 3)
    wide, deep = 1 << thirds + (rest > 1), 1 << thirds
    heads = 1 << thirds + (rest > 0)
    return {
      "base_emb_dim": self.base_emb_dim * wide,
      "base_num_query_heads": self.base_num_query_heads * heads,
      "base_num_kv_heads": self.base_num_kv_heads * heads,
      "base_mlp_dim": self.base_mlp_dim * heads,
      "base_num_decoder_layers": self.base_num_decoder_layers * deep,
      "head_dim": self.head_dim or self.base_emb_dim // self.base_num_query_heads,
    }

  def rotary(self) -> dict[str, Any]:
    """The rope keys that may be null, as `rope_type` has them there."""
    _, factor, length = ROPE_TYPES[self.rope_type]
    interleave = self.rope_interleave
    return {
      "rope_factor": self.rope_factor or factor,
      "original_max_position_embeddings": self.original_max_position_embeddings or length,
      "rope_interleave": self.rope_type == "yarn" if interleave is None else interleave,
    }


def _divisors(n: int) -> str:
  """`1, 2, 4, 8`, the last ten at most."""
  found = [d for d in range(1, min(n, 4096) + 1) if n % d == 0]
  return ", ".join(map(str, found[-10:]))
