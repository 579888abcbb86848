"""A model's config.json on the Hugging Face hub, as our keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from maxtext.errors import CheckpointError

Keys = dict[str, Any]
Json = Mapping[str, Any]

ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu_exact",
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "quick_gelu": "gelu_quick",
  "relu": "relu",
}
SIZES = {  # ours -> theirs
  "base_emb_dim": "hidden_size",
  "base_num_query_heads": "num_attention_heads",
  "base_num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "base_mlp_dim": "intermediate_size",
  "base_num_decoder_layers": "num_hidden_layers",
  "vocab_size": "vocab_size",
  "normalization_layer_epsilon": "rms_norm_eps",
  "logits_via_embedding": "tie_word_embeddings",
}
WINDOWED = {"sliding_attention": "layer", "full_attention": "full"}


def keys(config: Json) -> Keys:
  """The architecture keys of a model. Raises CheckpointError for one that is not known, or that has
  what we have not.
  """
  kind = config.get("model_type")
  if kind not in READERS:
    known = ", ".join(READERS)
    raise CheckpointError(f"config.json: model_type {kind!r} is not known; there are {known}")
  return {name: value for name, value in READERS[kind](config).items() if value is not None}


def _sizes(config: Json) -> Keys:
  found: Keys = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
  found["base_num_kv_heads"] = found["base_num_kv_heads"] or found["base_num_query_heads"]
  found["head_dim"] = found["head_dim"] or found["base_emb_dim"] // found["base_num_query_heads"]
  name = config.get("hidden_activation") or config.get("hidden_act")
  if name not in ACTIVATIONS:
    raise CheckpointError(f"config.json: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
  return {**found, "mlp_activations": [ACTIVATIONS[name], "linear"]}


def rope_of(config: Json, layers: str = "full_attention") -> Json:
  """The rotary parameters of a kind of layer, in the spelling that nests them all."""
  new = config.get("rope_parameters") or {}
  if isinstance(new.get(layers), Mapping):
    new = new[layers]
  old = config.get("rope_scaling") or {}
  rope = {**old, **new}
  rope.setdefault("rope_type", rope.get("type", "default"))
  rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
  return rope


def _rope(config: Json) -> Keys:
  rope = rope_of(config)
  kind, found = rope["rope_type"], {"rope_max_timescale": rope["rope_theta"]}
  share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
  if share not in (None, 1, 1.0):
    found["partial_rotary_factor"] = share
  if kind == "default":
    return found
  if kind == "linear":
    return found | {"rope_linear_scaling_factor": rope["factor"]}
  original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
  found |= {"rope_factor": rope["factor"], "original_max_position_embeddings": original}
  if kind == "llama3":
    found |= {name: rope[name.removeprefix("rope_")] for name in TURNS}
    return found | {"rope_type": "llama3.1"}
  if kind == "yarn":
    return found | {"rope_type": "yarn", "rope_interleave": False} | _yarn(rope)
  raise CheckpointError(f"config.json: rope_type {kind!r} is none of default, linear, llama3, yarn")


TURNS = ("rope_low_freq_factor", "rope_high_freq_factor")


def _yarn(rope: Json) -> Keys:
  if rope.get("mscale") or rope.get("mscale_all_dim"):
    raise CheckpointError("config.json: mscale is for latent attention, which this model has not")
  return {
    "beta_fast": rope.get("beta_fast") or 32,
    "beta_slow": rope.get("beta_slow") or 1,
    "rope_truncate": rope.get("truncate", True),
    "rope_attention_scaling": True,
    "rope_attention_factor": rope.get("attention_factor"),
  }


def _windows(config: Json) -> Keys:
  """The window, and which layers have it."""
  kinds = config.get("layer_types")
  if not config.get("sliding_window") or (kinds and "sliding_attention" not in kinds):
    return {"layer_pattern": ["full"] if kinds else None}
  pattern = [WINDOWED[kind] for kind in kinds] if kinds else None
  return {"sliding_window_size": config["sliding_window"], "layer_pattern": pattern}


def _llama(config: Json) -> Keys:
  own = {"attention_bias": config.get("attention_bias"), "mlp_bias": config.get("mlp_bias")}
  return {"decoder_block": "llama2"} | _sizes(config) | _rope(config) | own


def _granite(config: Json) -> Keys:
  return _llama(config) | {
    "embedding_multiplier": config.get("embedding_multiplier"),
    "residual_multiplier": config.get("residual_multiplier"),
    "logits_multiplier": 1 / config.get("logits_scaling", 1.0),
    "query_pre_attn_scalar": config.get("attention_multiplier"),
  }


def _mistral(config: Json) -> Keys:
  window = {"sliding_window_size": config.get("sliding_window")}
  return {"decoder_block": "mistral"} | _sizes(config) | _rope(config) | window


def _qwen2(config: Json) -> Keys:
  return {"decoder_block": "qwen2"} | _sizes(config) | _rope(config) | _qwen_windows(config)


def _qwen_windows(config: Json) -> Keys:
  if not config.get("use_sliding_window"):
    return {}
  if not config.get("layer_types"):
    first, depth = config.get("max_window_layers", 28), config["num_hidden_layers"]
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(depth)]
    config = {**config, "layer_types": kinds}
  return _windows(config)


def _qwen3(config: Json) -> Keys:
  bias = {"attention_bias": config.get("attention_bias")}
  own = bias | _qwen_windows(config)
  return {"decoder_block": "qwen3"} | _sizes(config) | _rope(config) | own


def _gemma(config: Json) -> Keys:
  tied = {"logits_via_embedding": config.get("tie_word_embeddings", True)}
  found = _sizes({"hidden_activation": "gelu_pytorch_tanh", **config})
  return {"decoder_block": "gemma"} | found | _rope(config) | tied


def _gemma2(config: Json) -> Keys:
  return (
    _gemma(config)
    | {
      "decoder_block": "gemma2",
      "attn_logits_soft_cap": config.get("attn_logit_softcapping"),
      "final_logits_soft_cap": config.get("final_logit_softcapping"),
      "query_pre_attn_scalar": config["query_pre_attn_scalar"] ** -0.5,
      "attention_bias": config.get("attention_bias"),
    }
    | _windows(config)
  )


def _gemma3(config: Json) -> Keys:
  found = _gemma2(config) | {"decoder_block": "gemma3"}
  if not config.get("layer_types"):
    every, depth = config.get("sliding_window_pattern", 6), config["num_hidden_layers"]
    found["layer_pattern"] = ["layer" if (i + 1) % every else "full" for i in range(depth)]
  local = config.get("rope_local_base_freq")
  if local is None:
    local = rope_of(config, "sliding_attention")["rope_theta"]
  return found | {"local_rope_max_timescale": local}


def _olmo2(config: Json) -> Keys:
  return _llama(config) | {"decoder_block": "olmo2"}


def _olmo3(config: Json) -> Keys:
  local = rope_of(config, "sliding_attention")["rope_theta"]
  own = {"decoder_block": "olmo3", "local_rope_max_timescale": local}
  found = _llama(config) | _windows(config) | own
  if found.get("layer_pattern"):
    found["layer_pattern"] = [
      "local" if name == "layer" else name for name in found["layer_pattern"]
    ]
  return found


def _phi3(config: Json) -> Keys:
  window = {"sliding_window_size": config.get("sliding_window")}
  return {"decoder_block": "phi3"} | _sizes(config) | _rope(config) | window


def _gpt2(config: Json) -> Keys:
  name = config.get("activation_function", "gelu_new")
  return {
    "decoder_block": "gpt2",
    "base_emb_dim": config["n_embd"],
    "base_num_query_heads": config["n_head"],
    "base_num_kv_heads": config["n_head"],
    "head_dim": config["n_embd"] // config["n_head"],
    "base_mlp_dim": config.get("n_inner") or 4 * config["n_embd"],
    "base_num_decoder_layers": config["n_layer"],
    "vocab_size": config["vocab_size"],
    "trainable_position_size": config["n_positions"],
    "normalization_layer_epsilon": config["layer_norm_epsilon"],
    "mlp_activations": [ACTIVATIONS[name]],
  }


READERS: dict[str, Callable[[Json], Keys]] = {
  "llama": _llama,
  "mistral": _mistral,
  "qwen2": _qwen2,
  "qwen3": _qwen3,
  "granite": _granite,
  "gemma": _gemma,
  "gemma2": _gemma2,
  "gemma3_text": _gemma3,
  "olmo2": _olmo2,
  "olmo3": _olmo3,
  "phi3": _phi3,
  "gpt2": _gpt2,
}
