"""GPT-NeoX and Pythia."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import ATTENTION_BIAS, Act, Field, Function, Json, Keys
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import OUT, TURN
from maxtext.checkpoints.tables import Map
from maxtext.errors import CheckpointError

H = "gpt_neox.layers.{l}."
TENSORS = (
  Map("embedding", "gpt_neox.embed_in.weight"),
  Map("norm.scale", "gpt_neox.final_layer_norm.weight"),
  Map("norm.bias", "gpt_neox.final_layer_norm.bias"),
  Map("unembedding", "embed_out.weight", TURN),
  *(
    Map(f"{ours}_norm.{part}", f"{H}{theirs}_layernorm.{name}")
    for ours, theirs in (("attention", "input"), ("mlp", "post_attention"))
    for part, name in (("scale", "weight"), ("bias", "bias"))
  ),
  Map(  # head by head its query, its key and its value
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{H}attention.query_key_value.weight",
    "d h k -> h k d",
    axis=1,
    whole="h k d -> (h k) d",
  ),
  Map(
    tuple(f"attention.{part}.bias" for part in ("query", "key", "value")),
    f"{H}attention.query_key_value.bias",
    axis=1,
    whole="h k -> (h k)",
  ),
  Map("attention.out.kernel", f"{H}attention.dense.weight", OUT),
  Map("attention.out.bias", f"{H}attention.dense.bias"),
  Map("mlp.up.kernel", f"{H}mlp.dense_h_to_4h.weight", TURN),
  Map("mlp.up.bias", f"{H}mlp.dense_h_to_4h.bias"),
  Map("mlp.down.kernel", f"{H}mlp.dense_4h_to_h.weight", TURN),
  Map("mlp.down.bias", f"{H}mlp.dense_4h_to_h.bias"),
)


def _heads(config: Json) -> Keys:
  count = config["num_attention_heads"]
  return {
    "base_num_query_heads": count,
    "base_num_kv_heads": count,
    "head_dim": config["hidden_size"] // count,
  }


def _written_heads(keys: Keys) -> Json:
  count = keys["base_num_query_heads"]
  if keys["base_num_kv_heads"] != count or keys["head_dim"] * count != keys["base_emb_dim"]:
    raise CheckpointError("gpt_neox has a key per head, and heads that are shares of the width")
  return {"num_attention_heads": count}


def _order(config: Json) -> Keys:
  return {"layer_pattern": None if config["use_parallel_residual"] else ["serial"]}


def _written_order(keys: Keys) -> Json:
  kinds = set(keys.get("layer_pattern") or ["layer"])
  if kinds not in ({"layer"}, {"serial"}):
    raise CheckpointError("layer_pattern: all layers are one of layer and serial in a config.json")
  return {"use_parallel_residual": kinds == {"layer"}}


FAMILIES = (
  Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "gpt_neox",
    TENSORS,
    (
      Field("base_emb_dim", "hidden_size"),
      Function(_heads, _written_heads),
      Field("base_mlp_dim", "intermediate_size"),
      Field("base_num_decoder_layers", "num_hidden_layers"),
      Field("vocab_size", "vocab_size"),
      Field("normalization_layer_epsilon", "layer_norm_eps"),
      Field("max_position_embeddings", "max_position_embeddings"),
      Field("logits_via_embedding", "tie_word_embeddings"),
      Act(default="gelu", gated=False),
      ATTENTION_BIAS,
      Function(_order, _written_order),
      Rope(share=0.25, names=("rotary_emb_base", "rotary_pct")),
    ),
    {
      "layer_norm_eps": 1e-5,
      "max_position_embeddings": 2048,
      "tie_word_embeddings": False,
      "attention_bias": True,
      "use_parallel_residual": True,
      "vocab_size": 50_432,
      "hidden_size": 6144,
      "num_hidden_layers": 44,
      "num_attention_heads": 64,
      "intermediate_size": 24_576,
    },
  ),
)
