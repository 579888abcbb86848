"""Qwen3-Next: gated delta nets, attention with a gate, and experts."""

from __future__ import annotations

from maxtext.checkpoints.hub.family import Family
from maxtext.checkpoints.hub.layers import FULL, cycle, named
from maxtext.checkpoints.hub.mixtures import CHOICE, EXPERT, NORMALIZE, TABLE
from maxtext.checkpoints.hub.parts import (
  ATTENTION_BIAS,
  SIZES,
  Act,
  Field,
  Function,
  Json,
  Keys,
)
from maxtext.checkpoints.hub.rotary import Rope
from maxtext.checkpoints.hub.tensors import DELTA
from maxtext.errors import CheckpointError

LINEAR = "linear_attention"
NAMES = {LINEAR: "linear", FULL: "layer"}  # theirs -> our blocks with experts
DENSE = {"linear": "linear_dense", "layer": "dense"}  # and without
OWN = ["linear", "linear", "linear", "layer"]


def _layers(config: Json) -> Keys:
  """Experts are in layers whose number decoder_sparse_step divides, counted from 1, but for
  mlp_only_layers, counted from 0.
  """
  depth, step, count = (
    config[name] for name in ("num_hidden_layers", "decoder_sparse_step", "num_experts")
  )
  only, kinds = config.get("mlp_only_layers") or (), config.get("layer_types")
  every = config.get("full_attention_interval") or 4
  kinds = kinds or [LINEAR if (i + 1) % every else FULL for i in range(depth)]
  names = [named(NAMES, kind) for kind in kinds[:depth]]
  sparse = [count > 0 and (i + 1) % step == 0 and i not in only for i in range(depth)]
  pattern = cycle([name if s else DENSE[name] for name, s in zip(names, sparse)])
  return {"layer_pattern": None if pattern == OWN else pattern, "num_experts": count or None}


def _written(keys: Keys) -> Json:
  depth, own = keys["base_num_decoder_layers"], keys.get("layer_pattern")
  step, first = keys.get("interleave_moe_layer_step", 1), keys.get("first_num_dense_layers", 0)
  names = [(own or OWN)[i % len(own or OWN)] for i in range(depth)]
  if not own:
    dense = [(i + 1) % step != 0 or i < first for i in range(depth)]
    names = [DENSE[name] if d else name for name, d in zip(names, dense)]
  sparse = {dense: name for name, dense in DENSE.items()}
  if unknown := [name for name in names if name not in {*DENSE, *sparse}]:
    raise CheckpointError(f"layer_pattern: {unknown[0]!r} has no name in a config.json")
  theirs = {ours: kind for kind, ours in NAMES.items()}
  return {
    "layer_types": [theirs[sparse.get(name, name)] for name in names],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i, name in enumerate(names) if name in sparse],
    "num_experts": keys.get("num_experts", 8),
  }


FAMILIES = (
  Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    "qwen3_next",
    (*TABLE, *DELTA),
    (
      *SIZES,
      Act(),
      ATTENTION_BIAS,
      Rope(share=0.25),
      Function(_layers, _written),
      Field("gdn_num_key_heads", "linear_num_key_heads"),
      Field("gdn_num_value_heads", "linear_num_value_heads"),
      Field("gdn_key_head_dim", "linear_key_head_dim"),
      Field("gdn_value_head_dim", "linear_value_head_dim"),
      Field("gdn_conv_kernel_dim", "linear_conv_kernel_dim"),
      EXPERT,
      Field("base_shared_mlp_dim", "shared_expert_intermediate_size"),
      *CHOICE,
      NORMALIZE,
    ),
    {
      "rms_norm_eps": 1e-6,
      "max_position_embeddings": 32_768,
      "tie_word_embeddings": False,
      "num_key_value_heads": 2,
      "head_dim": 256,
      "attention_bias": False,
      "num_experts": 512,
      "decoder_sparse_step": 1,
      "norm_topk_prob": True,
    },
    (r"^mtp\.",),  # what predicts further tokens: transformers leaves it out too
  ),
)
