"""gpt-oss."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import Layers
from maxtext.checkpoints.hub.parts import ATTENTION_BIAS, SIZES, WINDOW, Field, Only
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, ENDS, LAYER, TURN
from maxtext.checkpoints.tables import Map

EXPERTS = f"{LAYER}mlp.experts."
TABLE = (
  *ENDS,
  *ATTENTION,
  Map("attention.sinks", f"{LAYER}self_attn.sinks"),
  Map("moe.router.kernel", f"{LAYER}mlp.router.weight", TURN),
  Map("moe.router.bias", f"{LAYER}mlp.router.bias"),
  Map(  # a gate and what it multiplies take turns
    ("moe.gate.kernel", "moe.up.kernel"),
    f"{EXPERTS}gate_up_proj",
    "e d f -> e d f ()",
    axis=3,
    whole="e d f p -> e d (f p)",
  ),
  Map(
    ("moe.gate.bias", "moe.up.bias"),
    f"{EXPERTS}gate_up_proj_bias",
    "e f -> e f ()",
    axis=2,
    whole="e f p -> e (f p)",
  ),
  Map("moe.down.kernel", f"{EXPERTS}down_proj"),
  Map("moe.down.bias", f"{EXPERTS}down_proj_bias"),
  *BEFORE,
)
KINDS = {"sliding_attention": "layer", "full_attention": "full"}
YARN = {
  "rope_type": "yarn",
  "factor": 32.0,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "truncate": False,
  "original_max_position_embeddings": 4096,
}

FAMILIES = (
  Family(
    "gpt_oss",
    "GptOssForCausalLM",
    "gpt_oss",
    TABLE,
    (
      # all of its feed-forward layers are experts
      *(part for part in SIZES if getattr(part, "theirs", "") != "intermediate_size"),
      Field("base_moe_mlp_dim", "intermediate_size"),
      Only("swiglu_alpha", 1.702),
      Only("hidden_act", "silu"),
      ATTENTION_BIAS,
      WINDOW,
      Layers(("layer", "full"), KINDS),
      Rope(150_000.0),
      Field("num_experts", "num_local_experts"),
      Field("num_experts_per_tok", "num_experts_per_tok"),
      Field("mlp_activations_limit", "swiglu_limit"),
    ),
    {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131_072,
      "tie_word_embeddings": False,
      "attention_bias": True,
      "sliding_window": 128,
      "num_local_experts": 128,
      "num_experts_per_tok": 4,
      "swiglu_limit": 7.0,
      "rope_parameters": YARN,
      "hidden_size": 2880,
      "intermediate_size": 2880,
      "num_hidden_layers": 36,
      "num_attention_heads": 64,
      "num_key_value_heads": 8,
      "head_dim": 64,
      "vocab_size": 201_088,
    },
  ),
)
