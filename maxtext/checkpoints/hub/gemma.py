"""Gemma, Gemma 2 and the text part of Gemma 3."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import Layers
from maxtext.checkpoints.hub.parts import (
  ACTIVATIONS,
  ATTENTION_BIAS,
  SIZES,
  WINDOW,
  Act,
  Field,
  Only,
)
from maxtext.checkpoints.hub.rotary import LocalRope, Rope
from maxtext.checkpoints.hub.tensors import DENSE, DENSE_AROUND

DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "max_position_embeddings": 8192,
  "tie_word_embeddings": True,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "attention_bias": False,
}
KINDS = {"sliding_attention": "layer", "full_attention": "full"}
NEAR = {**KINDS, "sliding_attention": "local"}
CAUSAL = Only("use_bidirectional_attention", False)
GELU = "gelu_pytorch_tanh"
SCALED = (
  *SIZES,
  Act(("hidden_activation",), GELU),
  ATTENTION_BIAS,
  WINDOW,
  CAUSAL,
  Field("final_logits_soft_cap", "final_logit_softcapping", null=None),
  Field(
    "query_pre_attn_scalar",
    "query_pre_attn_scalar",
    here=lambda scalar: scalar**-0.5,
    there=lambda scale: rounded(scale**-2),
  ),
)


def rounded(number: float) -> float | int:
  """A whole number that rounding has moved, whole again."""
  whole = round(number)
  return whole if whole and abs(number / whole - 1) < 1e-12 else number


FAMILIES = (
  Family(
    "gemma",
    "GemmaForCausalLM",
    "gemma",
    DENSE,
    (
      *SIZES,
      # The first files say gelu, and mean its approximation.
      Act(("hidden_activation", "hidden_act"), GELU, names={**ACTIVATIONS, "gelu": "gelu"}),
      ATTENTION_BIAS,
      CAUSAL,
      Rope(),
    ),
    {**DEFAULTS, "num_key_value_heads": 16},
  ),
  Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "gemma2",
    DENSE_AROUND,
    (
      *SCALED,
      Field("attn_logits_soft_cap", "attn_logit_softcapping", null=None),
      Layers(("layer", "full"), KINDS),
      Rope(),
    ),
    {
      **DEFAULTS,
      "query_pre_attn_scalar": 256,
      "sliding_window": 4096,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
  ),
  Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "gemma3",
    DENSE_AROUND,
    (  # transformers has a field for the cap of scores here too, and does not use it
      *SCALED,
      Layers((*["local"] * 5, "full"), NEAR, every="sliding_window_pattern"),
      LocalRope(1_000_000.0, 10_000.0, local="rope_local_base_freq"),
    ),
    {
      **DEFAULTS,
      "query_pre_attn_scalar": 256,
      "sliding_window": 4096,
      "max_position_embeddings": 131_072,
      "hidden_size": 2304,
      "intermediate_size": 9216,
      "num_hidden_layers": 26,
      "num_attention_heads": 8,
      "vocab_size": 262_208,
    },
  ),
)
