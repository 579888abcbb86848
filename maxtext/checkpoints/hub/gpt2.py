"""GPT-2."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.parts import Act, Field, Function, Json, Keys, Only
from maxtext.checkpoints.hub.tensors import TURN
from maxtext.checkpoints.tables import Map

H = "transformer.h.{l}."
SCALE, BY_DEPTH = "query_pre_attn_scalar", "scale_attn_by_inverse_layer_idx"
TENSORS = (
  Map("embedding", "transformer.wte.weight"),
  Map("positions", "transformer.wpe.weight"),
  Map("norm.scale", "transformer.ln_f.weight"),
  Map("norm.bias", "transformer.ln_f.bias"),
  Map("unembedding", "lm_head.weight", TURN),
  Map("attention_norm.scale", f"{H}ln_1.weight"),
  Map("attention_norm.bias", f"{H}ln_1.bias"),
  Map(
    tuple(f"attention.{part}.kernel" for part in ("query", "key", "value")),
    f"{H}attn.c_attn.weight",
    "d h k -> d (h k)",
    axis=1,
  ),
  Map(
    tuple(f"attention.{part}.bias" for part in ("query", "key", "value")),
    f"{H}attn.c_attn.bias",
    "h k -> (h k)",
  ),
  Map("attention.out.kernel", f"{H}attn.c_proj.weight", "h k d -> (h k) d"),
  Map("attention.out.bias", f"{H}attn.c_proj.bias"),
  Map("mlp_norm.scale", f"{H}ln_2.weight"),
  Map("mlp_norm.bias", f"{H}ln_2.bias"),
  Map("mlp.up.kernel", f"{H}mlp.c_fc.weight"),
  Map("mlp.up.bias", f"{H}mlp.c_fc.bias"),
  Map("mlp.down.kernel", f"{H}mlp.c_proj.weight"),
  Map("mlp.down.bias", f"{H}mlp.c_proj.bias"),
)


def _heads(config: Json) -> Keys:
  count = config["n_head"]
  return {
    "base_num_query_heads": count,
    "base_num_kv_heads": count,
    "head_dim": config["n_embd"] // count,
  }


def _scales(config: Json) -> Keys:
  """What scores are multiplied by: where it goes by the layer, each is a block of its own."""
  scaled = config.get("scale_attn_weights", True)
  if not config.get(BY_DEPTH):
    return {} if scaled else {SCALE: 1.0}
  first = (config["n_embd"] // config["n_head"]) ** -0.5 if scaled else 1.0
  names = [f"layer{i}" for i in range(1, config["n_layer"] + 1)]
  own = lambda i: {"like": "layer", "attention": {"scale": first / i}}
  return {"layer_pattern": names, "blocks": {name: own(i) for i, name in enumerate(names, 1)}}


def _scaled(keys: Keys) -> Json:
  """The same; a model whose layers are others is not what comes of it when it is read again."""
  match keys.get("blocks"):
    case {"layer1": {"attention": {"scale": first}}}:
      return {"scale_attn_weights": float(first) != 1.0, BY_DEPTH: True}
  return {"scale_attn_weights": keys.get(SCALE) != 1.0, BY_DEPTH: False}


def _rates(keys: Keys) -> Json:
  """Shares that are dropped in training, of which we have one."""
  rate = keys.get("dropout_rate", 0.0)
  return {"resid_pdrop": rate, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


FAMILIES = (
  Family(
    "gpt2",
    "GPT2LMHeadModel",
    "gpt2",
    TENSORS,
    (
      Field("base_emb_dim", "n_embd"),
      Function(_heads, lambda keys: {"n_head": keys["base_num_query_heads"]}),
      Field("base_mlp_dim", "n_inner", null=lambda config: 4 * config["n_embd"]),
      Field("base_num_decoder_layers", "n_layer"),
      Field("vocab_size", "vocab_size"),
      Field("trainable_position_size", "n_positions"),
      Field("normalization_layer_epsilon", "layer_norm_epsilon"),
      Act(("activation_function",), "gelu_new", gated=False),
      Function(lambda config: {}, _rates),
      Field("logits_via_embedding", "tie_word_embeddings"),
      Function(_scales, _scaled),
      Only("add_cross_attention", False),
    ),
    {
      "n_embd": 768,
      "n_head": 12,
      "n_layer": 12,
      "n_positions": 1024,
      "vocab_size": 50_257,
      "layer_norm_epsilon": 1e-5,
      "tie_word_embeddings": True,
    },
  ),
)
