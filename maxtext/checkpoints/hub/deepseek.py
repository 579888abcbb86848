"""DeepSeek V2 and V3, with multi-head latent attention, and GLM 4.5, with the same router."""

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
  Only,
)
from maxtext.checkpoints.hub.parts import SIZES as GROUPED_SIZES
from maxtext.checkpoints.hub.rotary import LatentRope, Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, ENDS, IN, LAYER, MLP, OUT, TURN
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
  """Nothing of what follows from other fields, which the file may say too."""
  count, keys = config["num_attention_heads"], config.get("num_key_value_heads")
  config.get("head_dim"), config.get("qk_head_dim")
  if keys not in (None, count):
    raise CheckpointError(
      f"config.json: num_key_value_heads {keys} is not num_attention_heads {count}, "
      "and latent attention has a key per head"
    )
  return {}


SIZES = (
  Field("base_emb_dim", "hidden_size"),
  Field("base_num_query_heads", "num_attention_heads"),
  Function(_heads, lambda keys: {"num_key_value_heads": keys["base_num_query_heads"]}),
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

EXPERTS = (
  Map("moe.router.kernel", f"{LAYER}mlp.gate.weight", TURN),
  Map("moe.choice_bias", f"{LAYER}mlp.gate.e_score_correction_bias"),
  *(
    Map(f"moe.{ours}.kernel", f"{LAYER}mlp.experts.{{e}}.{ours}_proj.weight", TURN)
    for ours in ("gate", "up", "down")
  ),
  *(
    Map(f"moe.shared.{ours}.{part}", f"{LAYER}mlp.shared_experts.{ours}_proj.{theirs}", form)
    for ours in ("gate", "up", "down")
    for part, theirs, form in (("kernel", "weight", TURN), ("bias", "bias", ""))
  ),
)


AHEAD = (  # of a layer of multi-token prediction, besides those of all layers
  Map("token_norm.scale", f"{LAYER}enorm.weight"),
  Map("hidden_norm.scale", f"{LAYER}hnorm.weight"),
  Map("joint.kernel", f"{LAYER}eh_proj.weight", TURN),
  Map("head_norm.scale", f"{LAYER}shared_head.norm.weight"),
)


def _left_out(config: Json) -> Keys:
  config.get("num_nextn_predict_layers"), config.get("num_mtp_layers")
  return {}


def _further(keys: Keys) -> Json:
  layers = keys.get("mtp_num_layers", 0)
  return {"num_nextn_predict_layers": layers} if layers else {}


def _written_pattern(keys: Keys) -> Json:
  """How many first layers are dense; a pattern of one's own has no field."""
  if keys.get("layer_pattern") or keys.get("interleave_moe_layer_step", 1) != 1:
    raise CheckpointError(
      "layer_pattern: in a config.json the first layers are dense, the others not"
    )
  return {"first_k_dense_replace": keys.get("first_num_dense_layers", 0)}


MIXTURE = (
  Function(
    lambda config: {"first_num_dense_layers": config["first_k_dense_replace"]}, _written_pattern
  ),
  Field("base_moe_mlp_dim", "moe_intermediate_size"),
  Field("num_experts", "n_routed_experts"),
  Field("num_experts_per_tok", "num_experts_per_tok"),
  Field("shared_experts", "n_shared_experts"),
  Field("routed_scaling_factor", "routed_scaling_factor"),
  Only("moe_layer_freq", 1),
)
BIASED = (
  *MIXTURE,
  Field("n_routing_groups", "n_group"),
  Field("topk_routing_group", "topk_group"),
  Field("norm_topk_prob", "norm_topk_prob"),
  Always({"routed_score_func": "sigmoid", "routed_bias": True}),
  Only("scoring_func", "sigmoid"),
  Only("topk_method", "noaux_tc"),
  # Further layers are left out, unless mtp_num_layers asks for them: their embedding and
  # unembedding are copies of the model's.
  Function(_left_out, _further),
)


def _groups(config: Json) -> Keys:
  """What topk_method says; transformers does not divide by a sum here, told to or not."""
  method, groups, best = (config.get(f) for f in ("topk_method", "n_group", "topk_group"))
  config.get("norm_topk_prob")
  if method == "greedy":
    return {"n_routing_groups": -1, "topk_routing_group": -1}
  if method != "group_limited_greedy":
    raise CheckpointError(
      f"config.json: topk_method {method!r} is none of greedy, group_limited_greedy"
    )
  return {"n_routing_groups": groups, "topk_routing_group": best}


def _written_groups(keys: Keys) -> Json:
  groups, best = keys.get("n_routing_groups", -1), keys.get("topk_routing_group", -1)
  score, normalize = keys.get("routed_score_func", "softmax"), keys.get("norm_topk_prob", False)
  if score != "softmax" or normalize or keys.get("routed_bias", False):
    raise CheckpointError(
      "routed_score_func: deepseek_v2 has softmax, whose chosen are not divided"
    )
  if groups < 1:
    return {"topk_method": "greedy"}
  return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": best}


TABLE = (*ENDS, *LATENT, *MLP, *EXPERTS, *BEFORE)


FAMILIES = (
  Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "deepseek2",
    TABLE,
    (
      *SIZES,
      MLP_BIAS,
      Always({"rope_interleave": True}),
      *MIXTURE,
      Function(_groups, _written_groups),
      Only("scoring_func", "softmax"),
    ),
    {
      **DEFAULTS,
      "mlp_bias": False,
      "max_position_embeddings": 2048,
      "first_k_dense_replace": 0,
      "n_routed_experts": 64,
      "n_shared_experts": 2,
      "routed_scaling_factor": 1.0,
      "topk_method": "greedy",
      "moe_intermediate_size": 1407,
    },
  ),
  Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "deepseek3",
    (*TABLE, *AHEAD),
    (*SIZES, Field("rope_interleave", "rope_interleave"), *BIASED),
    {
      **DEFAULTS,
      "rope_interleave": True,
      "max_position_embeddings": 4096,
      "first_k_dense_replace": 3,
      "moe_intermediate_size": 2048,
      "n_routed_experts": 256,
      "n_shared_experts": 1,
      "num_experts_per_tok": 8,
      "routed_scaling_factor": 2.5,
      "n_group": 8,
      "topk_group": 4,
      "norm_topk_prob": True,
    },
    unused=(r"^model\.layers\.{depth}\.",),
  ),
  Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    "glm4_moe",
    (*ENDS, *ATTENTION, *MLP, *EXPERTS, *BEFORE, *AHEAD),
    (
      *GROUPED_SIZES,
      Act(),
      ATTENTION_BIAS,
      Field("use_qk_norm", "use_qk_norm"),
      Rope(share=0.5),
      *BIASED,
    ),
    {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131_072,
      "tie_word_embeddings": False,
      "attention_bias": False,
      "use_qk_norm": False,
      "num_key_value_heads": 8,
      "first_k_dense_replace": 1,
      "moe_intermediate_size": 1408,
      "n_routed_experts": 128,
      "n_shared_experts": 1,
      "num_experts_per_tok": 8,
      "routed_scaling_factor": 1.0,
      "n_group": 1,
      "topk_group": 1,
      "norm_topk_prob": True,
    },
    unused=(r"^model\.layers\.{depth}\.",),
  ),
)
