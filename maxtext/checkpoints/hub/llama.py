"""Llama and those that differ from it by a few fields."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import OptionalWindow
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  MLP_BIAS,
  SIZES,
  WINDOW,
  Act,
  Field,
)
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import BEFORE, DENSE, ENDS, IN, LAYER, OUT, TURN
from maxtext.checkpoints.tables import Map

JOINED = (
  *ENDS,
  Map(
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{LAYER}self_attn.qkv_proj.weight",
    IN,
  ),
  Map("attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", OUT),
  Map(("mlp.gate.kernel", "mlp.up.kernel"), f"{LAYER}mlp.gate_up_proj.weight", TURN),
  Map("mlp.down.kernel", f"{LAYER}mlp.down_proj.weight", TURN),
  *BEFORE,
)

BARE = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
BIASES = {"attention_bias": False, "mlp_bias": False}
LLAMA = (*SIZES, Act(), ATTENTION_BIAS, MLP_BIAS, Rope())
QWEN = {
  **BARE,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32_768,
  "max_window_layers": 28,
  "use_sliding_window": False,
}

FAMILIES = (
  Family("llama", "LlamaForCausalLM", "llama2", DENSE, LLAMA, {**BARE, **BIASES}),
  Family(
    "granite",
    "GraniteForCausalLM",
    "llama2",
    DENSE,
    (
      *LLAMA,
      Field("embedding_multiplier", "embedding_multiplier"),
      Field("residual_multiplier", "residual_multiplier"),
      Field("query_pre_attn_scalar", "attention_multiplier"),
      Field(
        "logits_multiplier",
        "logits_scaling",
        here=lambda divisor: 1 / divisor,
        there=lambda factor: 1 / factor,
      ),
    ),
    {
      **BARE,
      **BIASES,
      "embedding_multiplier": 1.0,
      "residual_multiplier": 1.0,
      "attention_multiplier": 1.0,
      "logits_scaling": 1.0,
    },
  ),
  Family(
    "mistral",
    "MistralForCausalLM",
    "mistral",
    DENSE,
    (*SIZES, Act(), Rope(), WINDOW),
    {**BARE, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
  ),
  Family(
    "phi3",
    "Phi3ForCausalLM",
    "phi3",
    JOINED,
    (*SIZES, Act(), Rope(partial=True), WINDOW),
    {**BARE, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
  ),
  Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "qwen2",
    DENSE,
    (*SIZES, Act(), Rope(), OptionalWindow()),
    QWEN,
  ),
  Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "qwen3",
    DENSE,
    (*SIZES, Act(), ATTENTION_BIAS, Rope(), OptionalWindow()),
    {**QWEN, "head_dim": 128, "attention_bias": False},
  ),
)
