"""The tensors of each family on the Hugging Face hub: one table each."""

from __future__ import annotations

from maxtext.checkpoints.tables import Map

_LAYER = "model.layers.{l}."
_OUT = "h k d -> d (h k)"
_IN = "d h k -> (h k) d"
_TURN = "a b -> b a"

ENDS = (
  Map("embedding", "model.embed_tokens.weight"),
  Map("norm.scale", "model.norm.weight"),
  Map("unembedding", "lm_head.weight", _TURN),
)
ATTENTION = (
  *(
    entry
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    for entry in (
      Map(f"attention.{ours}.kernel", f"{_LAYER}self_attn.{theirs}.weight", _IN),
      Map(f"attention.{ours}.bias", f"{_LAYER}self_attn.{theirs}.bias", "h k -> (h k)"),
    )
  ),
  Map("attention.out.kernel", f"{_LAYER}self_attn.o_proj.weight", _OUT),
  Map("attention.out.bias", f"{_LAYER}self_attn.o_proj.bias"),
  Map("attention.query_norm.scale", f"{_LAYER}self_attn.q_norm.weight"),
  Map("attention.key_norm.scale", f"{_LAYER}self_attn.k_norm.weight"),
)
MLP = tuple(
  entry
  for ours in ("gate", "up", "down")
  for entry in (
    Map(f"mlp.{ours}.kernel", f"{_LAYER}mlp.{ours}_proj.weight", _TURN),
    Map(f"mlp.{ours}.bias", f"{_LAYER}mlp.{ours}_proj.bias"),
  )
)
BEFORE = (
  Map("attention_norm.scale", f"{_LAYER}input_layernorm.weight"),
  Map("mlp_norm.scale", f"{_LAYER}post_attention_layernorm.weight"),
)
AROUND = (
  Map("attention_norm.scale", f"{_LAYER}input_layernorm.weight"),
  Map("post_attention_norm.scale", f"{_LAYER}post_attention_layernorm.weight"),
  Map("mlp_norm.scale", f"{_LAYER}pre_feedforward_layernorm.weight"),
  Map("post_mlp_norm.scale", f"{_LAYER}post_feedforward_layernorm.weight"),
)

LLAMA = (*ENDS, *ATTENTION, *MLP, *BEFORE)
GEMMA2 = (*ENDS, *ATTENTION, *MLP, *AROUND)
PHI3 = (
  *ENDS,
  Map(
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{_LAYER}self_attn.qkv_proj.weight",
    _IN,
  ),
  Map("attention.out.kernel", f"{_LAYER}self_attn.o_proj.weight", _OUT),
  Map(("mlp.gate.kernel", "mlp.up.kernel"), f"{_LAYER}mlp.gate_up_proj.weight", _TURN),
  Map("mlp.down.kernel", f"{_LAYER}mlp.down_proj.weight", _TURN),
  *BEFORE,
)

_H = "transformer.h.{l}."
GPT2 = (
  Map("embedding", "transformer.wte.weight"),
  Map("positions", "transformer.wpe.weight"),
  Map("norm.scale", "transformer.ln_f.weight"),
  Map("norm.bias", "transformer.ln_f.bias"),
  Map("unembedding", "lm_head.weight", _TURN),
  Map("attention_norm.scale", f"{_H}ln_1.weight"),
  Map("attention_norm.bias", f"{_H}ln_1.bias"),
  Map(
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{_H}attn.c_attn.weight",
    "d h k -> d (h k)",
    axis=1,
  ),
  Map(
    tuple(f"attention.{part}.bias" for part in ("query", "key", "value")),
    f"{_H}attn.c_attn.bias",
    "h k -> (h k)",
  ),
  Map("attention.out.kernel", f"{_H}attn.c_proj.weight", "h k d -> (h k) d"),
  Map("attention.out.bias", f"{_H}attn.c_proj.bias"),
  Map("mlp_norm.scale", f"{_H}ln_2.weight"),
  Map("mlp_norm.bias", f"{_H}ln_2.bias"),
  Map("mlp.up.kernel", f"{_H}mlp.c_fc.weight"),
  Map("mlp.up.bias", f"{_H}mlp.c_fc.bias"),
  Map("mlp.down.kernel", f"{_H}mlp.c_proj.weight"),
  Map("mlp.down.bias", f"{_H}mlp.c_proj.bias"),
)

# model_type of config.json -> the family's table
TABLES: dict[str, tuple[Map, ...]] = {
  "llama": LLAMA,
  "mistral": LLAMA,
  "qwen2": LLAMA,
  "qwen3": LLAMA,
  "granite": LLAMA,
  "gemma": LLAMA,
  "gemma2": GEMMA2,
  "gemma3_text": GEMMA2,
  "olmo2": GEMMA2,
  "olmo3": GEMMA2,
  "phi3": PHI3,
  "gpt2": GPT2,
}
