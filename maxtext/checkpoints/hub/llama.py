"""Llama and those that differ from it by a few fields."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import LOCAL, NopeLayers, OptionalWindow
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  MLP_BIAS,
  SIZES,
  WINDOW,
  Act,
  Always,
  Field,
  Function,
  Json,
  Keys,
)
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, DENSE, ENDS, IN, LAYER, OUT, TURN
from maxtext.checkpoints.tables import Map

JOINED_MLP = (
  Map(("mlp.gate.kernel", "mlp.up.kernel"), f"{LAYER}mlp.gate_up_proj.weight", TURN),
  Map("mlp.down.kernel", f"{LAYER}mlp.down_proj.weight", TURN),
)
JOINED = (
  *ENDS,
  Map(
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{LAYER}self_attn.qkv_proj.weight",
    IN,
  ),
  Map("attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", OUT),
  *JOINED_MLP,
  *BEFORE,
)

GLM4 = (
  *ENDS,
  *ATTENTION,
  *JOINED_MLP,
  Map("attention_norm.scale", f"{LAYER}input_layernorm.weight"),
  Map("post_attention_norm.scale", f"{LAYER}post_self_attn_layernorm.weight"),
  Map("mlp_norm.scale", f"{LAYER}post_attention_layernorm.weight"),
  Map("post_mlp_norm.scale", f"{LAYER}post_mlp_layernorm.weight"),
)
NO_OUT_BIAS = Always({"attention_out_bias": False})

BARE = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
BIASES = {"attention_bias": False, "mlp_bias": False}
LLAMA = (*SIZES, Act(), ATTENTION_BIAS, MLP_BIAS, Rope())
OPTIONAL = Function(
  lambda config: {
    "sliding_window_size": config.get("sliding_window") if config["use_sliding_window"] else None
  },
  lambda keys: {
    "sliding_window": keys.get("sliding_window_size"),
    "use_sliding_window": keys.get("sliding_window_size") is not None,
  },
)
QWEN = {
  **BARE,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32_768,
  "max_window_layers": 28,
  "use_sliding_window": False,
}


def _original(keys: Keys) -> Json:
  """The length before longrope, which has a field of its own here too."""
  length = keys.get("original_max_position_embeddings")
  return {"original_max_position_embeddings": length} if length else {}


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
    (*SIZES, Act(), Rope(share=1.0), WINDOW, Function(lambda config: {}, _original)),
    {**BARE, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
  ),
  Family(
    "glm4",
    "Glm4ForCausalLM",
    "glm4",
    GLM4,
    (*SIZES, Act(), ATTENTION_BIAS, NO_OUT_BIAS, Rope(share=0.5, fixed=True)),
    {
      **BARE,
      "rms_norm_eps": 1.5625e-07,
      "head_dim": 128,
      "attention_bias": True,
      "max_position_embeddings": 131_072,
      "hidden_size": 4096,
      "num_attention_heads": 32,
      "num_key_value_heads": 2,
      "num_hidden_layers": 40,
      "intermediate_size": 13_696,
      "vocab_size": 151_552,
    },
  ),
  Family(
    "seed_oss",
    "SeedOssForCausalLM",
    "seed_oss",
    DENSE,
    (*LLAMA, Field("attention_out_bias", "attention_out_bias")),
    {
      **BARE,
      **BIASES,
      "attention_bias": True,
      "attention_out_bias": False,
      "head_dim": 128,
      "num_key_value_heads": 8,
      "max_position_embeddings": 524_288,
    },
  ),
  Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "smollm3",
    DENSE,
    (*SIZES, Act(), ATTENTION_BIAS, MLP_BIAS, Rope(2_000_000.0), OPTIONAL, NopeLayers(LOCAL)),
    {
      **BARE,
      **BIASES,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32_768,
      "tie_word_embeddings": True,
      "no_rope_layer_interval": 4,
      "use_sliding_window": False,
    },
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
