"""DeepSeek V2 and V3: multi-head latent attention."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  MLP_BIAS,
  Act,
  Always,
  Field,
  Function,
  Json,
  Keys,
)
from maxtext.checkpoints.hub.rotary import LatentRope
from maxtext.checkpoints.hub.tensors import BEFORE, ENDS, IN, LAYER, MLP, OUT, TURN
from maxtext.checkpoints.tables import Map
from maxtext.errors import CheckpointError

LATENT = (
  Map("attention.query.kernel", f"{LAYER}self_attn.q_proj.weight", IN),
  Map("attention.wq_a.kernel", f"{LAYER}self_attn.q_a_proj.weight", TURN),
  Map("attention.wq_a.bias", f"{LAYER}self_attn.q_a_proj.bias"),
  Map("attention.q_norm.scale", f"{LAYER}self_attn.q_a_layernorm.weight"),
  Map("attention.wq_b.kernel", f"{LAYER}self_attn.q_b_proj.weight", IN),
  Map("attention.wkv_a.kernel", f"{LAYER}self_attn.kv_a_proj_with_mqa.weight", TURN),
  Map("attention.wkv_a.bias", f"{LAYER}self_attn.kv_a_proj_with_mqa.bias"),
  Map("attention.kv_norm.scale", f"{LAYER}self_attn.kv_a_layernorm.weight"),
  Map("attention.wkv_b.kernel", f"{LAYER}self_attn.kv_b_proj.weight", IN),
  Map("attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", OUT),
  Map("attention.out.bias", f"{LAYER}self_attn.o_proj.bias"),
)


def _heads(config: Json) -> Keys:
  """The query heads; the file may say, too, what follows from other fields."""
  count, keys = config["num_attention_heads"], config.get("num_key_value_heads")
  config.get("head_dim"), config.get("qk_head_dim")
  if keys not in (None, count):
    raise CheckpointError(
      f"config.json: num_key_value_heads {keys} is not num_attention_heads {count}, "
      "and latent attention has a key per head"
    )
  return {"base_num_query_heads": count}


def _written_heads(keys: Keys) -> Json:
  count = keys["base_num_query_heads"]
  return {"num_attention_heads": count, "num_key_value_heads": count}


SIZES = (
  Field("base_emb_dim", "hidden_size"),
  Function(_heads, _written_heads),
  Field("base_mlp_dim", "intermediate_size"),
  Field("base_num_decoder_layers", "num_hidden_layers"),
  Field("vocab_size", "vocab_size"),
  Field("normalization_layer_epsilon", "rms_norm_eps"),
  Field("max_position_embeddings", "max_position_embeddings"),
  Field("logits_via_embedding", "tie_word_embeddings"),
  Field("q_lora_rank", "q_lora_rank", null=0, there=lambda rank: rank or None),
  Field("kv_lora_rank", "kv_lora_rank"),
  Field("qk_nope_head_dim", "qk_nope_head_dim"),
  Field("qk_rope_head_dim", "qk_rope_head_dim"),
  Field("v_head_dim", "v_head_dim"),
  Act(),
  ATTENTION_BIAS,
  LatentRope(),
)
DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "q_lora_rank": 1536,
  "kv_lora_rank": 512,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "v_head_dim": 128,
}

ROUTING = (  # fields that only layers with experts have
  "moe_intermediate_size",
  "n_shared_experts",
  "n_routed_experts",
  "routed_scaling_factor",
  "n_group",
  "topk_group",
  "topk_method",
  "num_experts_per_tok",
  "norm_topk_prob",
  "num_nextn_predict_layers",
  "output_router_logits",
)


def _dense(config: Json) -> Keys:
  """Nothing, since all layers are dense."""
  for field in ROUTING:
    config.get(field)
  first = config["first_k_dense_replace"]
  if first < config["num_hidden_layers"]:
    raise CheckpointError(
      f"config.json: first_k_dense_replace {first} leaves layers with experts, which are not there "
      "yet"
    )
  return {}


DENSE = Function(_dense, lambda keys: {"first_k_dense_replace": keys["base_num_decoder_layers"]})
TABLE = (*ENDS, *LATENT, *MLP, *BEFORE)

AHEAD = (  # of a layer of multi-token prediction, besides those of all layers
  Map("token_norm.scale", f"{LAYER}enorm.weight"),
  Map("hidden_norm.scale", f"{LAYER}hnorm.weight"),
  Map("joint.kernel", f"{LAYER}eh_proj.weight", TURN),
  Map("head_norm.scale", f"{LAYER}shared_head.norm.weight"),
)
# Such layers are left out, unless mtp_num_layers asks for them: their embedding and unembedding are
# copies of the model's.
FURTHER = Function(lambda config: {}, lambda keys: _further(keys.get("mtp_num_layers", 0)))


def _further(layers: int) -> Json:
  return {"num_nextn_predict_layers": layers} if layers else {}


FAMILIES = (
  Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "deepseek3",
    TABLE,
    (*SIZES, MLP_BIAS, Always({"rope_interleave": True}), DENSE),
    {**DEFAULTS, "mlp_bias": False, "max_position_embeddings": 2048, "first_k_dense_replace": 0},
  ),
  Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "deepseek3",
    (*TABLE, *AHEAD),
    (*SIZES, Field("rope_interleave", "rope_interleave"), DENSE, FURTHER),
    {
      **DEFAULTS,
      "rope_interleave": True,
      "max_position_embeddings": 4096,
      "first_k_dense_replace": 3,
    },
    unused=(r"^model\.layers\.{depth}\.",),
  ),
)
