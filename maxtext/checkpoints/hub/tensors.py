"""The names that most families on the Hugging Face hub give to tensors, as pieces of tables."""

from __future__ import annotations

from maxtext.checkpoints.tables import Map

LAYER = "model.layers.{l}."
OUT = "h k d -> d (h k)"
IN = "d h k -> (h k) d"
TURN = "a b -> b a"

ENDS = (
  Map("embedding", "model.embed_tokens.weight"),
  Map("norm.scale", "model.norm.weight"),
  Map("unembedding", "lm_head.weight", TURN),
)
ATTENTION = (
  *(
    entry
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    for entry in (
      Map(f"attention.{ours}.kernel", f"{LAYER}self_attn.{theirs}.weight", IN),
      Map(f"attention.{ours}.bias", f"{LAYER}self_attn.{theirs}.bias", "h k -> (h k)"),
    )
  ),
  Map("attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", OUT),
  Map("attention.out.bias", f"{LAYER}self_attn.o_proj.bias"),
  Map("attention.query_norm.scale", f"{LAYER}self_attn.q_norm.weight"),
  Map("attention.key_norm.scale", f"{LAYER}self_attn.k_norm.weight"),
)
MLP = tuple(
  entry
  for ours in ("gate", "up", "down")
  for entry in (
    Map(f"mlp.{ours}.kernel", f"{LAYER}mlp.{ours}_proj.weight", TURN),
    Map(f"mlp.{ours}.bias", f"{LAYER}mlp.{ours}_proj.bias"),
  )
)
BEFORE = (
  Map("attention_norm.scale", f"{LAYER}input_layernorm.weight"),
  Map("mlp_norm.scale", f"{LAYER}post_attention_layernorm.weight"),
)
AROUND = (
  Map("attention_norm.scale", f"{LAYER}input_layernorm.weight"),
  Map("post_attention_norm.scale", f"{LAYER}post_attention_layernorm.weight"),
  Map("mlp_norm.scale", f"{LAYER}pre_feedforward_layernorm.weight"),
  Map("post_mlp_norm.scale", f"{LAYER}post_feedforward_layernorm.weight"),
)

DENSE = (*ENDS, *ATTENTION, *MLP, *BEFORE)
DENSE_AROUND = (*ENDS, *ATTENTION, *MLP, *AROUND)

_DELTA = f"{LAYER}linear_attn."
DELTA = (
  Map("delta.qkvz_proj.kernel", f"{_DELTA}in_proj_qkvz.weight", "d g c -> (g c) d"),
  Map("delta.ba_proj.kernel", f"{_DELTA}in_proj_ba.weight", "d g c -> (g c) d"),
  Map(
    tuple(f"delta.{part}_conv" for part in ("query", "key", "value")),
    f"{_DELTA}conv1d.weight",
    "w g c -> (g c) () w",
  ),
  Map("delta.dt_bias", f"{_DELTA}dt_bias"),
  Map("delta.a_log", f"{_DELTA}A_log"),
  Map("delta.norm.scale", f"{_DELTA}norm.weight"),
  Map("delta.out.kernel", f"{_DELTA}out_proj.weight", OUT),
)
