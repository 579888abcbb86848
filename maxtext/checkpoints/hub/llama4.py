"""The text part of Llama 4."""

from __future__ import annotations

import dataclasses

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import NopeLayers, cycle
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  SIZES,
  Act,
  Always,
  Field,
  Function,
  Json,
  Keys,
)
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, ENDS, LAYER, TURN
from maxtext.checkpoints.tables import Map

MLP = tuple(
  Map(f"mlp.{ours}.kernel", f"{LAYER}feed_forward.{ours}_proj.weight", TURN)
  for ours in ("gate", "up", "down")
)
EXPERTS = (
  Map("moe.router.kernel", f"{LAYER}feed_forward.router.weight", TURN),
  Map(("moe.gate.kernel", "moe.up.kernel"), f"{LAYER}feed_forward.experts.gate_up_proj", axis=2),
  Map("moe.down.kernel", f"{LAYER}feed_forward.experts.down_proj"),
  *(
    Map(f"moe.shared.{ours}.kernel", f"{LAYER}feed_forward.shared_expert.{ours}_proj.weight", TURN)
    for ours in ("gate", "up", "down")
  ),
)
TABLE = (*ENDS, *ATTENTION, *MLP, *EXPERTS, *BEFORE)


@dataclasses.dataclass(frozen=True)
class Layouts:
  """Which layers turn and which have experts; `turning` says the first, moe_layers the second.

  Our dense blocks are `dense`, `full_dense`, `nope_dense` and `full_nope_dense`.
  """

  turning: NopeLayers = NopeLayers("chunked_attention", "chunk_attn_window_size", turning=True)

  def read(self, config: Json) -> Keys:
    depth, every = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    sparse = config.get("moe_layers")
    if sparse is None:
      sparse = range(every - 1, depth, every)
    names = self.turning.read(config)["layer_pattern"]
    names = [names[i % len(names)] for i in range(depth)]
    pattern = [name if i in sparse else dense(name) for i, name in enumerate(names)]
    return {"layer_pattern": cycle(pattern)}

  def write(self, keys: Keys) -> Json:
    depth, every = keys["base_num_decoder_layers"], keys.get("interleave_moe_layer_step", 1)
    pattern = keys.get("layer_pattern")
    if not pattern:
      sparse = list(range(every - 1, depth, every))
      return {**self.turning.write(keys), "moe_layers": sparse}
    layers = [pattern[i % len(pattern)] for i in range(depth)]
    back = {dense(name): name for name in ("layer", "full", "nope", "full_nope")}
    turning = [back.get(name, name) for name in layers]
    sparse = [i for i, name in enumerate(layers) if name not in back]
    return {**self.turning.write({**keys, "layer_pattern": turning}), "moe_layers": sparse}


def dense(name: str) -> str:
  """The block that has no experts, and is else as this one."""
  return {"layer": "dense"}.get(name, f"{name}_dense")


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
  """The floor as a whole number: transformers opens no other."""
  floor = keys.get("temperature_tuning_floor_scale", 8192)
  return {
    "attn_temperature_tuning": keys.get("temperature_tuning", False),
    "attn_scale": keys.get("temperature_tuning_scale", 0.1),
    "floor_scale": int(floor) if float(floor).is_integer() else floor,
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
      Layouts(),
      Field("base_moe_mlp_dim", "intermediate_size"),
      Field("num_experts", "num_local_experts"),
      Field("num_experts_per_tok", "num_experts_per_tok"),
      Always({"shared_experts": 1}),
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
      "intermediate_size": 8192,
      "num_local_experts": 16,
      "num_experts_per_tok": 1,
    },
  ),
)
