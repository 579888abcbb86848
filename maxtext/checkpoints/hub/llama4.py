"""The text part of Llama 4."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import NopeLayers
from maxtext.checkpoints.hub.parts import ATTENTION_BIAS, SIZES, Act, Field, Function, Json, Keys
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, ENDS, LAYER, TURN
from maxtext.checkpoints.tables import Map
from maxtext.errors import CheckpointError

MLP = tuple(
  Map(f"mlp.{ours}.kernel", f"{LAYER}feed_forward.{ours}_proj.weight", TURN)
  for ours in ("gate", "up", "down")
)
TABLE = (*ENDS, *ATTENTION, *MLP, *BEFORE)
ROUTING = (
  "num_experts_per_tok",
  "num_local_experts",
  "output_router_logits",
  "intermediate_size",
  "router_aux_loss_coef",
  "router_jitter_noise",
)


def _dense(config: Json) -> Keys:
  """Nothing, since all layers are dense."""
  for field in ROUTING:
    config.get(field)
  every, depth = config["interleave_moe_layer_step"], config["num_hidden_layers"]
  layers = config.get("moe_layers")
  if layers or (layers is None and every <= depth):
    raise CheckpointError("config.json: moe_layers have experts, which are not there yet")
  return {}


def _temperature(config: Json) -> Keys:
  scale, floor = config["attn_scale"], config["floor_scale"]
  if not config["attn_temperature_tuning"]:
    return {}
  return {
    "temperature_tuning": True,
    "temperature_tuning_scale": scale,
    "temperature_tuning_floor_scale": floor,
  }


def _written_temperature(keys: Keys) -> Json:
  return {
    "attn_temperature_tuning": keys.get("temperature_tuning", False),
    "attn_scale": keys.get("temperature_tuning_scale", 0.1),
    "floor_scale": keys.get("temperature_tuning_floor_scale", 8192),
  }


FAMILIES = (
  Family(
    "llama4_text",
    "Llama4ForCausalLM",
    "llama4",
    TABLE,
    (
      *(part for part in SIZES if getattr(part, "theirs", "") != "intermediate_size"),
      Field("base_mlp_dim", "intermediate_size_mlp"),
      Act(),
      ATTENTION_BIAS,
      Field("use_qk_norm", "use_qk_norm"),
      Field("chunk_attn_window_size", "attention_chunk_size", null=None),
      Function(_temperature, _written_temperature),
      NopeLayers("chunked_attention", "chunk_attn_window_size", turning=True),
      Function(_dense, lambda keys: {"moe_layers": []}),
      Rope(500_000.0, fixed=True),
    ),
    {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131_072,
      "tie_word_embeddings": False,
      "attention_bias": False,
      "use_qk_norm": True,
      "head_dim": 128,
      "num_key_value_heads": 8,
      "attention_chunk_size": 8192,
      "attn_temperature_tuning": True,
      "attn_scale": 0.1,
      "floor_scale": 8192,
      "no_rope_layer_interval": 4,
      "interleave_moe_layer_step": 1,
      "intermediate_size_mlp": 16_384,
    },
  ),
)
