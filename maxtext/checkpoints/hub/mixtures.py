"""Mixtral, the Qwen models with experts, and OLMoE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import FULL, LOCAL, cycle, named
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  SIZES,
  WINDOW,
  Act,
  Field,
  Function,
  Ignored,
  Json,
  Keys,
)
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import ATTENTION, BEFORE, ENDS, LAYER, MLP, TURN
from maxtext.checkpoints.tables import Map
from maxtext.errors import CheckpointError


def experts(place: str, names: Sequence[str]) -> tuple[Map, ...]:
  """A router and each expert's gate, up and down, which have these names."""
  return (
    Map("moe.router.kernel", f"{LAYER}{place}.gate.weight", TURN),
    *(
      Map(f"moe.{ours}.kernel", f"{LAYER}{place}.experts.{{e}}.{theirs}.weight", TURN)
      for ours, theirs in zip(("gate", "up", "down"), names)
    ),
  )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SHARED = (
  *(
    Map(f"moe.shared.{ours}.kernel", f"{LAYER}mlp.shared_expert.{ours}_proj.weight", TURN)
    for ours in ("gate", "up", "down")
  ),
  Map("moe.shared_gate.kernel", f"{LAYER}mlp.shared_expert_gate.weight", TURN),
)
TABLE = (*ENDS, *ATTENTION, *MLP, *experts("mlp", PROJECTIONS), *SHARED, *BEFORE)

DENSE = {"layer": "dense", "full": "full_dense"}  # our names of blocks with experts, and without
SPARSE = {dense: sparse for sparse, dense in DENSE.items()}


@dataclasses.dataclass(frozen=True)
class SparseLayers:
  """Layers with experts are those whose number decoder_sparse_step divides, counted from 1, but for
  mlp_only_layers, counted from 0. A window that use_sliding_window turns on is that of all layers,
  or with `kinds` of those of layer_types, else of every other of the first max_window_layers. The
  number of experts is spelt num_experts on the hub, by transformers 5 num_local_experts too.
  """

  kinds: bool = False

  def read(self, config: Json) -> Keys:
    depth, step = config["num_hidden_layers"], config["decoder_sparse_step"]
    only, count = config.get("mlp_only_layers") or (), config.get("num_local_experts")
    count = config["num_experts"] if count is None else count
    sparse = [
      count > 0 and number % step == 0 and number - 1 not in only for number in range(1, depth + 1)
    ]
    window = config.get("sliding_window") or None
    window = window if config.get("use_sliding_window") else None
    names = ["layer"] * depth
    if self.kinds:
      kinds, first = config.get("layer_types"), config["max_window_layers"]
      near = lambda i: window is not None and i % 2 == 0 and i < first
      kinds = kinds or [LOCAL if near(i) else FULL for i in range(depth)]
      names = [named({LOCAL: "layer", FULL: "full"}, kind) for kind in kinds[:depth]]
      if "layer" not in names:
        window, names = None, ["layer"] * depth
    names = [name if s else DENSE[name] for name, s in zip(names, sparse)]
    pattern = cycle(names)
    return {
      "num_experts": count or None,
      "sliding_window_size": window,
      "layer_pattern": None if pattern == ["layer"] else pattern,
    }

  def write(self, keys: Keys) -> Json:
    names = _names(keys)
    sparse = [i for i, name in enumerate(names) if name in DENSE]
    step = math.gcd(*(i + 1 for i in sparse)) if sparse else 1
    found = {
      "num_experts": keys.get("num_experts", 8),
      "decoder_sparse_step": step,
      "mlp_only_layers": [
        i for i in range(len(names)) if (i + 1) % step == 0 and names[i] not in DENSE
      ],
    }
    window = keys.get("sliding_window_size")
    near = [SPARSE.get(name, name) == "layer" for name in names]
    if window is None or not any(near):
      return found | {"use_sliding_window": False, "sliding_window": None}
    found |= {"use_sliding_window": True, "sliding_window": window}
    if self.kinds:
      return found | {"layer_types": [LOCAL if n else FULL for n in near]}
    if not all(near):
      raise CheckpointError("layer_pattern: in a config.json a window is that of all layers")
    return found


def _names(keys: Keys) -> list[str]:
  """The block of every layer."""
  depth, own = keys["base_num_decoder_layers"], keys.get("layer_pattern")
  step, first = keys.get("interleave_moe_layer_step", 1), keys.get("first_num_dense_layers", 0)
  if not own:
    return ["layer" if (i + 1) % step == 0 and i >= first else "dense" for i in range(depth)]
  if unknown := [name for name in own if name not in {**DENSE, **SPARSE}]:
    raise CheckpointError(f"layer_pattern: {unknown[0]!r} has no name in a config.json")
  return [own[i % len(own)] for i in range(depth)]


CHOICE = (
  Field("num_experts_per_tok", "num_experts_per_tok"),
  Ignored("output_router_logits"),
  Ignored("router_aux_loss_coef"),
)
NORMALIZE = Field("norm_topk_prob", "norm_topk_prob")
EXPERT = Field("base_moe_mlp_dim", "moe_intermediate_size")
# Their only feed-forward layers are experts, whose width is the only one.
WIDTH = Function(
  lambda config: {},
  lambda keys: {"intermediate_size": keys.get("base_moe_mlp_dim") or keys["base_mlp_dim"]},
)
DEFAULTS = {
  "rms_norm_eps": 1e-6,
  "max_position_embeddings": 32_768,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "decoder_sparse_step": 1,
  "norm_topk_prob": False,
}

FAMILIES = (
  Family(
    "mixtral",
    "MixtralForCausalLM",
    "mixtral",
    (*ENDS, *ATTENTION, *experts("block_sparse_moe", ("w1", "w3", "w2")), *BEFORE),
    (
      *SIZES,
      WIDTH,
      Act(),
      Rope(1_000_000.0),
      WINDOW,
      Field("num_experts", "num_local_experts"),
      Ignored("router_jitter_noise"),
      *CHOICE,
    ),
    {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131_072,
      "tie_word_embeddings": False,
      "num_key_value_heads": 8,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
  ),
  Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    TABLE,
    (
      *SIZES,
      EXPERT,
      Field("base_shared_mlp_dim", "shared_expert_intermediate_size"),
      Act(),
      Field("attention_bias", "qkv_bias"),
      Rope(),
      SparseLayers(kinds=True),
      *CHOICE,
      NORMALIZE,
    ),
    {
      **DEFAULTS,
      "num_key_value_heads": 16,
      "sliding_window": 4096,
      "max_window_layers": 28,
      "moe_intermediate_size": 1408,
      "shared_expert_intermediate_size": 5632,
      "num_experts_per_tok": 4,
      "num_experts": 60,
      "qkv_bias": True,
    },
  ),
  Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    TABLE,
    (*SIZES, EXPERT, Act(), ATTENTION_BIAS, Rope(), SparseLayers(), *CHOICE, NORMALIZE),
    {
      **DEFAULTS,
      "num_key_value_heads": 4,
      "sliding_window": 4096,
      "moe_intermediate_size": 768,
      "num_experts_per_tok": 8,
      "num_experts": 128,
      "attention_bias": False,
    },
  ),
  Family(
    "olmoe",
    "OlmoeForCausalLM",
    "olmoe",
    (*ENDS, *ATTENTION, *experts("mlp", PROJECTIONS), *BEFORE),
    (
      *SIZES,
      WIDTH,
      Act(),
      ATTENTION_BIAS,
      Rope(),
      Field("num_experts", "num_experts"),
      *CHOICE,
      NORMALIZE,
      Field("clip_qkv", "clip_qkv", null=None),
    ),
    {
      "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096,
      "tie_word_embeddings": False,
      "attention_bias": False,
      "num_experts": 64,
      "num_experts_per_tok": 8,
      "norm_topk_prob": False,
    },
  ),
)
