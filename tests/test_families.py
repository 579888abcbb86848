"""Every family equals its Hugging Face twin, on tiny random weights and awkward settings."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from maxtext import config  # noqa: E402
from maxtext.checkpoints import hub  # noqa: E402
from maxtext.checkpoints.tables import applied, slots, undone  # noqa: E402
from maxtext.config.values import render  # noqa: E402
from maxtext.errors import CheckpointError  # noqa: E402
from maxtext.layers.decoder import Decoder  # noqa: E402
from maxtext.layers.merging import Plan  # noqa: E402
from maxtext.layers.params import Compute  # noqa: E402
from maxtext.masks import Mask  # noqa: E402

LENGTH, SPLIT, VOCAB = 24, 14, 96
TOLERANCE = 2e-4  # of the spread of the logits
SIZES = {
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 4,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "vocab_size": VOCAB,
  "max_position_embeddings": 64,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}
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
}


def twin(name: str, settings: dict[str, Any]) -> Any:
  """The torch model, its weights drawn wide: small ones would make it almost linear."""
  kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
  described = getattr(transformers, kind)(**settings)
  described._attn_implementation = "eager"
  kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
  model = getattr(transformers, kind)(described).eval().float()
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for path, p in model.named_parameters():
      p.copy_(torch.randn(p.shape, generator=draw) * (0.3 if p.ndim > 1 else 0.5))
      if p.ndim == 1 and path.endswith("weight") and "Gemma" not in name:
        p.add_(1)
  return model


def ours(described: dict[str, Any], tensors: dict[str, np.ndarray]) -> Decoder:
  """Our model with these tensors, each of which is taken and can be given back to the bit."""
  keys = {key: v for key, v in hub.keys(described).items() if key != "vocab_size"}
  argv = [f"{key}={render(value)}" for key, value in keys.items()]
  loaded = config.load([*argv, "max_target_length=64"], {}, purpose="decode")
  spec = loaded.decoder(described["vocab_size"])
  plan = Plan.of(functools.partial(Decoder, spec, Compute(kernel="dot_product"), loaded.memory))
  shapes = {path: declared.shape for path, declared in plan.declared.items()}
  params = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
  left = dict(tensors)
  if spec.tied:
    left.pop("lm_head.weight")
  stages = [(len(stage.blocks), stage.repeat) for stage in spec.stages]
  for slot in slots(hub.family(described).table, shapes, stages):
    tensor = left.pop(slot.name)
    assert tensor.shape == slot.shape, slot.name
    for (path, index, _), piece in zip(slot.parts, slot.split(tensor), strict=True):
      params[path][... if index is None else index] = piece
    parts = [
      params[path] if index is None else params[path][index] for path, index, _ in slot.parts
    ]
    np.testing.assert_array_equal(slot.join(parts), tensor)
  assert not left
  return plan.merge({path: jnp.asarray(value) for path, value in params.items()})


@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_its_twin(case):
  """Logits of whole rows, and of rows that hold two documents."""
  model = twin(*CASES[case])
  tensors = {name: value.numpy() for name, value in model.state_dict().items()}
  decoder = ours(json.loads(model.config.to_json_string()), tensors)
  tokens = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))
  row = np.broadcast_to(np.arange(LENGTH), tokens.shape)

  def same(positions: np.ndarray, segments: np.ndarray, *documents: np.ndarray) -> None:
    mask = Mask.of(jnp.asarray(positions), jnp.asarray(segments))
    found = np.asarray(decoder(jnp.asarray(tokens), mask))
    with torch.no_grad():
      expected = [model(torch.tensor(document)).logits.numpy() for document in documents]
    expected = np.concatenate(expected, axis=1)
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()

  same(row, np.ones_like(row), tokens)
  packed = np.where(row < SPLIT, row, row - SPLIT)
  same(packed, 1 + (row >= SPLIT), tokens[:, :SPLIT], tokens[:, SPLIT:])


# What does not count here: token ids, rates of dropout, and n_inner: a null is four widths.
APART = {"architectures", "dtype", "attn_pdrop", "resid_pdrop", "embd_pdrop", "n_inner"}
APART |= {"bos_token_id", "eos_token_id", "pad_token_id"}


def plain(configuration: Any) -> dict[str, Any]:
  return json.loads(configuration.to_json_string())


def configuration(name: str, settings: dict[str, Any]) -> dict[str, Any]:
  kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
  return plain(getattr(transformers, kind)(**settings))


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
  theirs = configuration(name, {})
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
  longrope = {"rope_type": "longrope", "factor": 4.0}
  with pytest.raises(CheckpointError, match="rope_type 'longrope' is none of default"):
    hub.keys(sizes | {"hidden_act": "silu", "rope_parameters": longrope})


def test_a_form_is_undone_to_the_bit():
  array = np.random.default_rng(0).normal(size=(2, 3, 5))
  for form in ("d h k -> (h k) d", "h k d -> d (h k)", "a b c -> c b a", "a b c -> (b a c)"):
    np.testing.assert_array_equal(undone(applied(array, form), form, array.shape), array)
  assert applied(array, "d h k -> (h k) d")[1 * 5 + 2, 1] == array[1, 1, 2]
