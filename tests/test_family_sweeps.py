"""Families with settings that are drawn: nobody has chosen them so that they pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import twins
from tests.twins import VOCAB

Settings = dict[str, Any]
Draw = np.random.Generator
DEPTH = 5
ACTS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "swish", "gelu_fast"]


def one(draw: Draw, *options: Any) -> Any:
  return options[draw.integers(len(options))]


def sizes(draw: Draw, head_dim: bool = True) -> Settings:
  groups, share = one(draw, 1, 2, 3), one(draw, 1, 2, 3)
  heads = groups * share
  found = {
    "hidden_size": heads * one(draw, 6, 8, 10),
    "intermediate_size": one(draw, 30, 41, 64),
    "num_hidden_layers": DEPTH,
    "num_attention_heads": heads,
    "num_key_value_heads": groups,
    "vocab_size": VOCAB,
    "max_position_embeddings": one(draw, 16, 64),
    "rms_norm_eps": one(draw, 1e-5, 1e-3),
    "tie_word_embeddings": one(draw, True, False),
    "hidden_act": one(draw, *ACTS),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  if head_dim and one(draw, True, False):
    found["head_dim"] = one(draw, 8, 10, 16, 22)
  return found


def head(settings: Settings) -> int:
  return settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]


def rope(draw: Draw, width: int, kinds: tuple[str, ...] = (), part: float = 1.0) -> Settings:
  """Rotary parameters for heads of this width."""
  kinds = kinds or ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
  kind, pairs = one(draw, *kinds), int(width * part) // 2
  found = {"rope_type": kind, "rope_theta": one(draw, 30.0, 1000.0, 10_000.0)}
  original = {"original_max_position_embeddings": one(draw, 8, 16)}
  factor = {"factor": one(draw, 1.5, 4.0, 8.0)}
  if kind in ("linear", "dynamic"):
    found |= factor
  elif kind == "llama3":
    found |= factor | original | {"low_freq_factor": 1.0, "high_freq_factor": one(draw, 2.0, 4.0)}
  elif kind == "yarn":
    found |= factor | original
    found |= one(draw, {}, {"beta_fast": 4.0, "beta_slow": 0.5}, {"truncate": False})
    found |= one(draw, {}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.1})
  elif kind == "longrope":
    found |= original | one(draw, {}, {"attention_factor": 1.2}, {"factor": 3.0})
    for name in ("short_factor", "long_factor"):
      found[name] = [float(f) for f in np.sort(draw.uniform(1, 6, pairs))]
  return found


def kinds(draw: Draw, near: str = "sliding_attention") -> Settings:
  """A kind for each layer: drawn, all alike, or as the class has them."""
  mixed = [one(draw, near, "full_attention") for _ in range(DEPTH)]
  return one(draw, {}, *({"layer_types": ks} for ks in (mixed, [near] * DEPTH)))


def window(draw: Draw) -> Settings:
  return {"sliding_window": one(draw, 3, 5, 9)}


def flags(draw: Draw, *names: str) -> Settings:
  return {name: one(draw, True, False) for name in names}


def plain(draw: Draw, **more: Any) -> Settings:
  found = sizes(draw) | more
  return found | {"rope_parameters": rope(draw, head(found))}


def activated(settings: Settings) -> Settings:
  """As the classes of gemma call it."""
  return {("hidden_activation" if k == "hidden_act" else k): v for k, v in settings.items()}


def gemma2(draw: Draw) -> Settings:
  found = activated(sizes(draw)) | kinds(draw) | window(draw) | flags(draw, "attention_bias")
  found |= {"head_dim": one(draw, 8, 14), "query_pre_attn_scalar": one(draw, 5, 20)}
  found |= {"attn_logit_softcapping": one(draw, None, 3.0)}
  found |= {"final_logit_softcapping": one(draw, None, 4.0)}
  return found | {"rope_parameters": rope(draw, found["head_dim"])}


def gemma3(draw: Draw) -> Settings:
  found = gemma2(draw)
  local = {"rope_type": "default", "rope_theta": one(draw, 20.0, 300.0)}
  both = {"full_attention": found.pop("rope_parameters"), "sliding_attention": local}
  return found | {"rope_parameters": both}


def olmo3(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | window(draw) | kinds(draw) | flags(draw, "attention_bias")
  local = {"rope_type": "default", "rope_theta": one(draw, 20.0, 300.0)}
  return found | {
    "rope_parameters": {"full_attention": rope(draw, head(found)), "sliding_attention": local}
  }


def qwen(draw: Draw, **more: Any) -> Settings:
  found = plain(draw) | {"head_dim": one(draw, 8, 12)} | more
  found |= {"rope_parameters": rope(draw, found.get("head_dim") or head(found))}
  if one(draw, True, False):
    found |= {"use_sliding_window": True, "max_window_layers": one(draw, 0, 2)}
    found |= window(draw) | kinds(draw)
  return found


def qwen2(draw: Draw) -> Settings:
  found = qwen(draw)
  del found["head_dim"]
  return found | {"rope_parameters": rope(draw, head(found))}


def phi3(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | one(draw, {}, window(draw))
  found["hidden_size"] = found["num_attention_heads"] * 8
  part = one(draw, 1.0, 0.5)
  scaled = rope(draw, 8, ("default", "longrope"), part) | {"partial_rotary_factor": part}
  original = scaled.get("original_max_position_embeddings", 4096)
  return found | {"rope_parameters": scaled, "original_max_position_embeddings": original}


def gpt2(draw: Draw) -> Settings:
  heads = one(draw, 1, 3, 4)
  return {
    "n_embd": heads * one(draw, 5, 8, 12),
    "n_head": heads,
    "n_layer": one(draw, 2, 3),
    "n_positions": 64,
    "n_inner": one(draw, None, 50),
    "vocab_size": VOCAB,
    "activation_function": one(draw, *ACTS),
    "tie_word_embeddings": one(draw, True, False),
    "layer_norm_epsilon": one(draw, 1e-5, 1e-3),
    "pad_token_id": 0,
  }


def gpt_neox(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | flags(draw, "attention_bias", "use_parallel_residual")
  del found["num_key_value_heads"], found["rms_norm_eps"]
  found["hidden_size"] = found["num_attention_heads"] * 12
  part = one(draw, 1.0, 0.5, 0.34)
  return found | {"rope_parameters": {**rope(draw, 12, part=part), "partial_rotary_factor": part}}


def glm4(draw: Draw) -> Settings:
  found = sizes(draw) | {"head_dim": one(draw, 8, 12)} | flags(draw, "attention_bias")
  part = one(draw, 1.0, 0.5)
  scaled = rope(draw, found["head_dim"], part=part) | {"partial_rotary_factor": part}
  return found | {"rope_parameters": scaled}


def nope(draw: Draw) -> Settings:
  drawn = [one(draw, 0, 1) for _ in range(DEPTH)]
  return one(draw, {"no_rope_layer_interval": 2}, {"no_rope_layers": [*drawn[1:], 1]})


def smollm3(draw: Draw) -> Settings:
  found = plain(draw) | nope(draw) | flags(draw, "attention_bias", "mlp_bias")
  windowed = {"use_sliding_window": True} | window(draw) | kinds(draw)
  return found | one(draw, {}, windowed)


def llama4(draw: Draw) -> Settings:
  found = plain(draw, head_dim=one(draw, 8, 16)) | nope(draw) | flags(draw, "attention_bias")
  found |= flags(draw, "use_qk_norm", "attn_temperature_tuning") | kinds(draw, "chunked_attention")
  found |= {"attention_chunk_size": one(draw, 4, 7), "floor_scale": 5, "attn_scale": 0.4}
  found |= {"intermediate_size_mlp": 50, "num_local_experts": 4}
  found |= {"num_experts_per_tok": one(draw, 1, 2)}
  return found | one(draw, {"moe_layers": [0, 3]}, {"interleave_moe_layer_step": one(draw, 1, 2)})


def mixture(draw: Draw) -> Settings:
  """Experts as deepseek has them."""
  groups, size = one(draw, 1, 2, 4), one(draw, 2, 3)
  best = one(draw, 1, max(groups // 2, 1))
  return {
    "first_k_dense_replace": one(draw, 0, 2, DEPTH),
    "n_routed_experts": groups * size,
    "n_group": groups,
    "topk_group": best,
    "num_experts_per_tok": one(draw, 1, best * size),
    "n_shared_experts": one(draw, 1, 2),
    "moe_intermediate_size": one(draw, 10, 23),
    "routed_scaling_factor": one(draw, 1.0, 2.3),
    "norm_topk_prob": one(draw, True, False),
  }


def glm4_moe(draw: Draw) -> Settings:
  return glm4(draw) | mixture(draw) | flags(draw, "use_qk_norm")


def gpt_oss(draw: Draw) -> Settings:
  found = plain(draw, head_dim=one(draw, 8, 14)) | window(draw) | kinds(draw)
  found |= {"num_local_experts": 5, "num_experts_per_tok": one(draw, 1, 3, 5)}
  found |= {"swiglu_limit": one(draw, 0.5, 7.0), "hidden_act": "silu"}
  return found | flags(draw, "attention_bias")


def latent(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | flags(draw, "attention_bias")
  found |= {"num_key_value_heads": found["num_attention_heads"]}
  found |= {"q_lora_rank": one(draw, None, 9, 20), "kv_lora_rank": one(draw, 8, 17)}
  found |= {"qk_nope_head_dim": one(draw, 5, 12), "qk_rope_head_dim": one(draw, 6, 8)}
  found |= {"v_head_dim": one(draw, 7, 12)} | mixture(draw)
  return found | {"rope_parameters": rope(draw, found["qk_rope_head_dim"])}


def deepseek_v2(draw: Draw) -> Settings:
  """Torch takes pairs of channels as complex numbers only where these begin at an even place."""
  even = {"qk_nope_head_dim": one(draw, 4, 12), "kv_lora_rank": one(draw, 8, 18)}
  routing = {"topk_method": one(draw, "greedy", "group_limited_greedy")}
  return latent(draw) | even | routing | flags(draw, "mlp_bias")


def deepseek_v3(draw: Draw) -> Settings:
  found = latent(draw) | flags(draw, "rope_interleave")
  scaled = found["rope_parameters"]
  if scaled["rope_type"] != "yarn":
    scaled.pop("mscale_all_dim", None)
  return found


def experts(draw: Draw, name: str = "num_experts") -> Settings:
  count = one(draw, 3, 4, 7)
  return {name: count, "num_experts_per_tok": one(draw, 1, 2, count)}


def qwen_moe(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | experts(draw) | flags(draw, "norm_topk_prob")
  found |= {"moe_intermediate_size": one(draw, 11, 24), "decoder_sparse_step": one(draw, 1, 2)}
  found |= {"mlp_only_layers": one(draw, [], [1], [0, 3])}
  found |= one(draw, {}, {"use_sliding_window": True} | window(draw))
  return found | {"rope_parameters": rope(draw, head(found))}


def qwen2_moe(draw: Draw) -> Settings:
  found = qwen_moe(draw) | flags(draw, "qkv_bias") | {"max_window_layers": one(draw, 1, 4)}
  found |= {"shared_expert_intermediate_size": one(draw, 9, 26)}
  return found | (kinds(draw) if found.get("use_sliding_window") else {})


def qwen3_moe(draw: Draw) -> Settings:
  found = qwen_moe(draw) | flags(draw, "attention_bias")
  found |= {"head_dim": one(draw, 8, 12)}
  return found | {"rope_parameters": rope(draw, found["head_dim"])}


def olmoe(draw: Draw) -> Settings:
  found = sizes(draw, head_dim=False) | experts(draw)
  found |= flags(draw, "norm_topk_prob", "attention_bias")
  return found | {"rope_parameters": rope(draw, head(found))}


FAMILIES: dict[str, tuple[str, Callable[[Draw], Settings]]] = {
  "llama": ("Llama", lambda draw: plain(draw) | flags(draw, "attention_bias", "mlp_bias")),
  "granite": (
    "Granite",
    lambda draw: (
      plain(draw)
      | flags(draw, "attention_bias", "mlp_bias")
      | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
      | {"attention_multiplier": 0.2}
    ),
  ),
  "mistral": (
    "Mistral",
    lambda draw: plain(draw) | one(draw, window(draw), {"sliding_window": None}),
  ),
  "qwen2": ("Qwen2", qwen2),
  "qwen3": ("Qwen3", lambda draw: qwen(draw) | flags(draw, "attention_bias")),
  "gemma": ("Gemma", lambda draw: plain(draw, head_dim=one(draw, 8, 14))),
  "gemma2": ("Gemma2", gemma2),
  "gemma3": ("Gemma3", gemma3),
  "olmo2": (
    "Olmo2",
    lambda draw: (
      (found := sizes(draw, head_dim=False) | flags(draw, "attention_bias"))
      | {"rope_parameters": rope(draw, head(found))}
    ),
  ),
  "olmo3": ("Olmo3", olmo3),
  "phi3": ("Phi3", phi3),
  "gpt2": ("GPT2", gpt2),
  "gpt_neox": ("GPTNeoX", gpt_neox),
  "glm4": ("Glm4", glm4),
  "seed_oss": (
    "SeedOss",
    lambda draw: plain(draw) | flags(draw, "attention_bias", "attention_out_bias", "mlp_bias"),
  ),
  "smollm3": ("SmolLM3", smollm3),
  "gpt_oss": ("GptOss", gpt_oss),
  "glm4_moe": ("Glm4Moe", glm4_moe),
  "mixtral": (
    "Mixtral",
    lambda draw: plain(draw) | one(draw, {}, window(draw)) | experts(draw, "num_local_experts"),
  ),
  "qwen2_moe": ("Qwen2Moe", qwen2_moe),
  "qwen3_moe": ("Qwen3Moe", qwen3_moe),
  "olmoe": ("Olmoe", olmoe),
  "llama4": ("Llama4", llama4),
  "deepseek_v2": ("DeepseekV2", deepseek_v2),
  "deepseek_v3": ("DeepseekV3", deepseek_v3),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_its_twin_whatever_its_settings(family, seed):
  name, settings = FAMILIES[family]
  twins.assert_twins(name, settings(np.random.default_rng(seed)), seed)
