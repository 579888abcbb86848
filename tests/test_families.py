"""Every family equals its Hugging Face twin, on tiny random weights and awkward settings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from maxtext.checkpoints import hub
from maxtext.checkpoints.tables import applied, undone
from maxtext.errors import CheckpointError
from tests import twins
from tests.twins import NO_HEAD_DIM, SIZES, VOCAB, plain, transformers

WINDOW = {"sliding_window": 5}
SHARP = {"query_pre_attn_scalar": 20, "tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "low_freq_factor": 1.0} | ORIGINAL
LLAMA3 |= {"high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "beta_fast": 4, "beta_slow": 0.5} | ORIGINAL
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "vocab_size": VOCAB}

NEOX = {key: v for key, v in NO_HEAD_DIM.items() if key != "num_key_value_heads"}
NEOX |= {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 50.0}}
LONG = {"rope_type": "longrope", "rope_theta": 100.0}
LONG |= {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 7.0]}
LONGEST = {"original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
SHORT = {"max_position_embeddings": 16}
LATENT = NO_HEAD_DIM | {"num_key_value_heads": 6}
LATENT |= {"kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
EXPERTS |= {"n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7}
GROUPS = {"n_group": 4, "topk_group": 2}
SHARPENED = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
LLAMA4 = SIZES | {"intermediate_size_mlp": 72, "attention_chunk_size": 7, "moe_layers": [1, 2, 3]}
LLAMA4 |= {"no_rope_layers": [1, 0, 1, 1], "floor_scale": 5, "attn_scale": 0.4}
LLAMA4 |= {"num_local_experts": 6, "num_experts_per_tok": 2}
OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 0.8}
OSS |= {"rope_parameters": YARN | {"truncate": False}}

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 3}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "mlp_only_layers": [1]}
DELTA |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DELTA |= {"shared_expert_intermediate_size": 28}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama, llama3 rope, biases": (
    "Llama",
    SIZES | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
  ),
  "llama, yarn, tied": ("Llama", SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True}),
  "llama, linear rope": ("Llama", NO_HEAD_DIM | {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
  "mistral": ("Mistral", SIZES | WINDOW),
  "qwen2, half windowed": (
    "Qwen2",
    NO_HEAD_DIM | WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
  ),
  "qwen3, biases": ("Qwen3", SIZES | {"attention_bias": True}),
  "mixtral, windowed": ("Mixtral", SIZES | WINDOW | {"num_local_experts": 5}),
  "qwen2_moe, half dense, half windowed": (
    "Qwen2Moe",
    NO_HEAD_DIM
    | WINDOW
    | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 22}
    | {"shared_expert_intermediate_size": 34, "decoder_sparse_step": 2}
    | {"use_sliding_window": True, "layer_types": MIXED},
  ),
  "qwen3_moe, dense at first": (
    "Qwen3Moe",
    SIZES
    | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 22}
    | {"mlp_only_layers": [0], "norm_topk_prob": True},
  ),
  "olmoe": (
    "Olmoe",
    NO_HEAD_DIM | {"num_experts": 7, "num_experts_per_tok": 2, "clip_qkv": 0.6},
  ),
  "qwen3_next": ("Qwen3Next", SIZES | DELTA),
  "granite": (
    "Granite",
    NO_HEAD_DIM
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
    | {"attention_multiplier": 0.2},
  ),
  "gemma": ("Gemma", SIZES),
  "gemma2": ("Gemma2", SIZES | WINDOW | SHARP | CAPS),
  "gemma3": (
    "Gemma3",
    SIZES
    | WINDOW
    | SHARP
    | {"layer_types": MIXED}
    | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
  ),
  "olmo2": ("Olmo2", NO_HEAD_DIM),
  "olmo3": (
    "Olmo3",
    NO_HEAD_DIM
    | WINDOW
    | {"rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL}},
  ),
  "phi3": ("Phi3", NO_HEAD_DIM | WINDOW),
  "gpt2": ("GPT2", GPT2),
  "gpt2, scores as they are": (
    "GPT2",
    GPT2 | {"scale_attn_weights": False, "activation_function": "relu2"},
  ),
  "gpt2, scores by depth": ("GPT2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
  "phi3, longrope": ("Phi3", NO_HEAD_DIM | {"rope_parameters": LONG} | LONGEST),
  "llama, dynamic rope": ("Llama", SIZES | {"rope_parameters": DYNAMIC} | SHORT),
  "gpt_neox": ("GPTNeoX", NEOX),
  "smollm3": ("SmolLM3", NO_HEAD_DIM | {"no_rope_layers": [1, 0, 0, 1]}),
  "seed_oss": ("SeedOss", SIZES | {"attention_out_bias": True, "mlp_bias": True}),
  "glm4": ("Glm4", SIZES | {"rope_parameters": {"rope_theta": 50.0}}),
  "deepseek_v3, yarn, low rank, biases": (
    "DeepseekV3",
    LATENT
    | EXPERTS
    | GROUPS
    | {"q_lora_rank": 20, "attention_bias": True, "rope_parameters": SHARPENED},
  ),
  "deepseek_v2": (
    "DeepseekV2",
    LATENT | EXPERTS | GROUPS | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
  ),
  "glm4_moe": ("Glm4Moe", SIZES | EXPERTS | {"use_qk_norm": True, "attention_bias": True}),
  "gpt_oss": ("GptOss", SIZES | WINDOW | OSS),
  "llama4": ("Llama4", LLAMA4),
}


@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_its_twin(case):
  """Logits of whole rows, of rows that hold two documents, and beside padding."""
  twins.assert_twins(*CASES[case])


def test_the_first_layer_that_differs_is_found():
  """One in the middle, and the last, of which a norm cannot be told."""
  model, tokens = twins.twin(*CASES["gpt2"]), twins.random_tokens(rows=1, length=9)
  held = twins.tensors_of(model)
  mine = lambda: twins.ours(plain(model.config), held).decoder
  first = lambda: twins.first_difference(mine(), model, tokens)
  assert first() == "the unembedding"  # after which nothing is left that could differ
  for layer, words in ((2, "layer 2 or the last norm"), (1, "layer 1")):
    held[f"transformer.h.{layer}.mlp.c_fc.weight"] += 0.1
    assert first() == words


# What does not count here: token ids, rates of dropout, and n_inner: a null is four widths.
APART = {"architectures", "dtype", "attn_pdrop", "resid_pdrop", "embd_pdrop", "n_inner"}
APART |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def configuration(name: str, settings: dict[str, Any]) -> dict[str, Any]:
  return plain(twins.configuration(name, settings))


@pytest.mark.parametrize("case", CASES)
def test_a_written_config_says_what_was_read(case):
  """Our keys come back, and transformers reads the configuration that the twin has."""
  theirs = configuration(*CASES[case])
  keys, unread = hub.family(theirs).keys(theirs)
  written = json.loads(json.dumps(hub.family(theirs).config(keys)))
  assert hub.keys(written) == keys and not unread
  back = plain(transformers.AutoConfig.for_model(**written))
  assert {k: v for k, v in back.items() if k in theirs and k not in APART} == {
    k: v for k, v in theirs.items() if k not in APART
  }


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES.values()}))
def test_what_a_config_leaves_out_is_as_transformers_has_it(name):
  """A field that is gone is as in the twin's class, or is said to be missing."""
  told = {"num_experts_per_tok": 3} if name == "DeepseekV2" else {}  # of which there is no default
  theirs = configuration(name, told)
  for field in theirs.keys() - APART - {"model_type"}:
    rest = {key: value for key, value in theirs.items() if key != field}
    try:
      keys = hub.keys(rest)
    except CheckpointError as error:
      assert str(error) == f"config.json: {field} is missing"
      continue
    assert keys == hub.keys(plain(transformers.AutoConfig.for_model(**rest))), field


def test_both_spellings_of_rotary_parameters_are_read():
  sizes = {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
  nested = hub.keys(sizes | {"rope_parameters": LLAMA3})
  scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
  flat = hub.keys(sizes | {"rope_theta": 500.0, "rope_scaling": scaling})
  assert nested == flat and flat["rope_type"] == "llama3.1" and flat["rope_factor"] == 4


def test_what_is_not_known_is_named():
  with pytest.raises(CheckpointError, match="model_type 'mamba' is not known; there are llama, "):
    hub.keys({"model_type": "mamba"})
  sizes = {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-6}
  with pytest.raises(CheckpointError, match="activation 'tanh' is none of silu"):
    hub.keys(sizes | {"hidden_act": "tanh"})
  axial = {"rope_type": "axial", "factor": 4.0}
  with pytest.raises(CheckpointError, match="rope_type 'axial' is none of default"):
    hub.keys(sizes | {"hidden_act": "silu", "rope_parameters": axial})


def test_a_form_is_undone_to_the_bit():
  array = np.random.default_rng(0).normal(size=(2, 3, 5))
  for form in ("d h k -> (h k) d", "h k d -> d (h k)", "a b c -> c b a", "a b c -> (b a c)"):
    np.testing.assert_array_equal(undone(applied(array, form), form, array.shape), array)
  assert applied(array, "d h k -> (h k) d")[1 * 5 + 2, 1] == array[1, 1, 2]
