"""Each kind of attention layer equals its twin in transformers, in float32, with copied weights.

Windows and chunks are shorter than the text, and documents are packed where the twin can mask them.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext.layers.grouped import GroupedAttention
from maxtext.layers.latent import LatentAttention
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.specs import (
  AttentionSpec,
  LatentSpec,
  NormSpec,
  QkNormSpec,
  RopeSpec,
  TemperatureSpec,
  WavelengthScaling,
  YarnScaling,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDTH, HEADS, GROUPS, HEAD_DIM, LENGTH = 32, 4, 2, 16, 40
NOISE = 2e-5  # float32 sums in another order


@dataclasses.dataclass(frozen=True)
class Twin:
  """An attention layer of transformers: its module, and the tables of its rotary embedding."""

  module: torch.nn.Module
  rotary: torch.nn.Module
  complex_form: bool = False

  def __call__(self, x: np.ndarray, positions: np.ndarray, seen: np.ndarray) -> np.ndarray:
    x, positions = torch.from_numpy(x), torch.from_numpy(positions)
    bias = torch.where(torch.tensor(seen)[:, None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
      tables = self.rotary(x, positions)
      out = self.module(x, position_embeddings=tables, attention_mask=bias)
    return out[0].numpy()

  def weight(self, name: str) -> np.ndarray:
    return dict(self.module.named_parameters())[name].detach().numpy()

  def has(self, name: str) -> bool:
    return name in dict(self.module.named_parameters())


def twin(family: str, attention: str, rotary: str, **settings) -> Twin:
  """The layer with index 0 of a tiny model, its weights redrawn so that scores are of size one."""
  modeling = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
  configs = __import__(f"transformers.models.{family}.configuration_{family}", fromlist=["x"])
  name = attention.removesuffix("Attention")
  config_class = getattr(configs, f"{name}TextConfig", None) or getattr(configs, f"{name}Config")
  config = config_class(
    **{
      "hidden_size": WIDTH,
      "num_attention_heads": HEADS,
      "num_key_value_heads": GROUPS,
      "head_dim": HEAD_DIM,
      "num_hidden_layers": 2,
      "max_position_embeddings": 4096,
      **settings,
    }
  )
  config._attn_implementation = "eager"
  torch.manual_seed(0)
  module = getattr(modeling, attention)(config, layer_idx=0).eval()
  for parameter in module.parameters():
    scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
    torch.nn.init.normal_(parameter, std=scale)
  table = getattr(modeling, rotary)(config)
  return Twin(module, table)


def load(layer: nnx.Module, weights: dict[str, np.ndarray]) -> None:
  """Put every one of the weights into the layer, and nothing else is left as it was drawn."""
  paths = {".".join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(layer))}
  assert set(paths) == set(weights)
  for path, variable in nnx.to_flat_state(nnx.state(layer)):
    new = weights[".".join(map(str, path))]
    assert new.shape == variable.shape
    variable.set_value(jnp.asarray(new))
  nnx.update(layer, nnx.state(layer))


def projections(their: Twin) -> dict[str, np.ndarray]:
  """The weights of the usual projections, in our shapes and names."""
  found = {}
  for ours, name, heads in (("query", "q", HEADS), ("key", "k", GROUPS), ("value", "v", GROUPS)):
    weight = their.weight(f"{name}_proj.weight")
    found[f"{ours}.kernel"] = weight.T.reshape(WIDTH, heads, HEAD_DIM)
    if their.has(f"{name}_proj.bias"):
      found[f"{ours}.bias"] = their.weight(f"{name}_proj.bias").reshape(heads, HEAD_DIM)
  found["out.kernel"] = their.weight("o_proj.weight").T.reshape(HEADS, HEAD_DIM, WIDTH)
  if their.has("o_proj.bias"):
    found["out.bias"] = their.weight("o_proj.bias")
  for ours, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
    if their.has(f"{name}.weight"):
      found[f"{ours}.scale"] = their.weight(f"{name}.weight")
  if their.has("sinks"):
    found["sinks"] = their.weight("sinks")
  return found


def assert_equal(layer: nnx.Module, their: Twin, packed: bool = True, **structure) -> None:
  """On two rows, one of them of two packed documents."""
  random = np.random.default_rng(0)
  x = random.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
  restarted = np.concatenate([np.arange(23), np.arange(LENGTH - 23) + (0 if packed else 23)])
  positions = np.stack([np.arange(LENGTH), restarted])
  segments = np.stack([np.ones(LENGTH, int), np.repeat([1, 2], [23, LENGTH - 23])])
  mask = Mask.of(jnp.asarray(positions), jnp.asarray(segments))
  seen = np.asarray(mask.narrow(**structure).dense())
  ours, _ = nnx.jit(lambda layer, x, mask: layer(x, mask))(layer, jnp.asarray(x), mask)
  theirs = their(x, positions, seen)
  assert np.abs(theirs).max() > 0.1  # there is something to compare
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=NOISE)


def grouped(**more) -> AttentionSpec:
  return AttentionSpec(**{"heads": HEADS, "kv_heads": GROUPS, "head_dim": HEAD_DIM, **more})


def build(spec: AttentionSpec, kernel: str = "dot_product") -> nnx.Module:
  kind = LatentAttention if spec.latent else GroupedAttention
  return kind(spec, WIDTH, Compute(kernel=kernel), nnx.Rngs(0))


ROPE = {"rope_type": "default", "rope_theta": 100.0}
PER_LAYER = {"sliding_attention": ROPE, "full_attention": ROPE}
CASES = {
  "llama": (
    ("llama", "LlamaAttention", "LlamaRotaryEmbedding"),
    {"rope_parameters": ROPE, "attention_bias": True},
    grouped(rope=RopeSpec(100.0), bias=True),
  ),
  "llama3.1": (
    ("llama", "LlamaAttention", "LlamaRotaryEmbedding"),
    {
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
      }
    },
    grouped(rope=RopeSpec(100.0, scaling=WavelengthScaling(factor=8.0, original_length=16))),
  ),
  "gemma2": (
    ("gemma2", "Gemma2Attention", "Gemma2RotaryEmbedding"),
    {
      "rope_parameters": ROPE,
      "sliding_window": 7,
      "attn_logit_softcapping": 3.0,
      "query_pre_attn_scalar": 9,
      "layer_types": ["sliding_attention", "full_attention"],
    },
    grouped(rope=RopeSpec(100.0), window=7, soft_cap=3.0, scale=1 / 3),
  ),
  "qwen3": (
    ("qwen3", "Qwen3Attention", "Qwen3RotaryEmbedding"),
    {"rope_parameters": ROPE},
    grouped(rope=RopeSpec(100.0), qk_norm=QkNormSpec()),
  ),
  "olmo2": (
    ("olmo2", "Olmo2Attention", "Olmo2RotaryEmbedding"),
    {"rope_parameters": ROPE, "rms_norm_eps": 1e-5},
    grouped(rope=RopeSpec(100.0), qk_norm=QkNormSpec(eps=1e-5, whole=True)),
  ),
  "gpt_oss": (
    ("gpt_oss", "GptOssAttention", "GptOssRotaryEmbedding"),
    {
      "sliding_window": 5,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
      },
    },
    grouped(
      window=5,
      bias=True,
      sink=True,
      rope=RopeSpec(
        100.0,
        scaling=YarnScaling(
          factor=8.0, original_length=64, beta_fast=4.0, beta_slow=1.0, truncate=False
        ),
      ),
    ),
  ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
def test_a_layer_equals_its_twin(name, kernel):
  classes, settings, spec = CASES[name]
  their, layer = twin(*classes, **settings), build(spec, kernel)
  load(layer, projections(their))
  assert_equal(layer, their, window=spec.window)


@dataclasses.dataclass(frozen=True)
class _PerLayer:
  """Rotary tables of one of a model's kinds of layers."""

  rotary: torch.nn.Module
  kind: str

  def __call__(self, x, positions):
    return self.rotary(x, positions, layer_type=self.kind)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_a_layer_with_centred_norms_and_a_theta_of_its_own_equals_its_twin(kind):
  factor = 4.0 if kind == "full_attention" else 1.0
  ropes = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
  }
  their = twin(
    "gemma3",
    "Gemma3Attention",
    "Gemma3RotaryEmbedding",
    rope_parameters=ropes,
    sliding_window=7,
    query_pre_attn_scalar=16,
    layer_types=[kind, kind],
  )
  their = dataclasses.replace(their, rotary=_PerLayer(their.rotary, kind))
  window = 7 if kind == "sliding_attention" else None
  theta = ropes[kind]["rope_theta"]
  norm = QkNormSpec("rms_plus_one")
  layer = build(grouped(rope=RopeSpec(theta, factor=factor), window=window, qk_norm=norm))
  load(layer, projections(their))
  assert_equal(layer, their, window=window)


@pytest.mark.parametrize("rotated", [True, False])
def test_a_layer_of_chunks_or_without_positions_equals_its_twin(rotated):
  """With rotation: norm after it, within chunks. Without: everything, at a temperature."""
  their = twin(
    "llama4",
    "Llama4TextAttention",
    "Llama4TextRotaryEmbedding",
    rope_parameters=ROPE,
    no_rope_layers=[int(rotated)] * 2,
    use_qk_norm=True,
    attn_temperature_tuning=True,
    floor_scale=8,
    attn_scale=0.3,
    intermediate_size_mlp=32,
    layer_types=["chunked_attention", "full_attention"],
  )
  spec = grouped(
    rope=RopeSpec(100.0, interleave=True) if rotated else None,
    qk_norm=QkNormSpec("l2", 1e-5, rotated=True),
    temperature=None if rotated else TemperatureSpec(0.3, 8.0),
    chunk=9 if rotated else None,
  )
  layer = build(spec)
  load(layer, projections(their))
  # the twin's temperature goes by the place in the row, ours by the position in the document
  assert_equal(layer, their, packed=rotated, chunk=spec.chunk)


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("interleave", [True, False])
def test_a_layer_of_latents_equals_its_twin(q_rank, interleave):
  factor, mscale = 8.0, 0.7
  rope = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": factor,
    "mscale": 1.0,
    "mscale_all_dim": mscale,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
  }
  sizes = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
  their = twin(
    "deepseek_v3",
    "DeepseekV3Attention",
    "DeepseekV3RotaryEmbedding",
    num_key_value_heads=HEADS,
    head_dim=8,
    q_lora_rank=q_rank,
    rope_interleave=interleave,
    rope_parameters=rope,
    **sizes,
  )
  spread = lambda scale: 0.1 * scale * math.log(factor) + 1
  scaling = YarnScaling(
    factor=factor,
    original_length=64,
    beta_fast=4.0,
    beta_slow=1.0,
    attention_factor=spread(1.0) / spread(mscale),
  )
  latent = LatentSpec(20, 12, 8, 10, q_rank, NormSpec(), mscale=spread(mscale))
  rope = RopeSpec(100.0, interleave=interleave, scaling=scaling)
  spec = AttentionSpec(HEADS, HEADS, 20, rope=rope, latent=latent)
  layer = build(spec)
  weights = {
    "wkv_a.kernel": their.weight("kv_a_proj_with_mqa.weight").T,
    "kv_norm.scale": their.weight("kv_a_layernorm.weight"),
    "wkv_b.kernel": their.weight("kv_b_proj.weight").T.reshape(20, HEADS, 22),
    "out.kernel": their.weight("o_proj.weight").T.reshape(HEADS, 10, WIDTH),
  }
  if q_rank is None:
    weights["query.kernel"] = their.weight("q_proj.weight").T.reshape(WIDTH, HEADS, 20)
  else:
    weights["wq_a.kernel"] = their.weight("q_a_proj.weight").T
    weights["q_norm.scale"] = their.weight("q_a_layernorm.weight")
    weights["wq_b.kernel"] = their.weight("q_b_proj.weight").T.reshape(q_rank, HEADS, 20)
  load(layer, weights)
  assert_equal(layer, their)


def test_a_layer_with_a_gate_equals_its_twin():
  their = twin(
    "qwen3_next",
    "Qwen3NextAttention",
    "Qwen3NextRotaryEmbedding",
    rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
    layer_types=["full_attention", "full_attention"],
  )
  norm = QkNormSpec("rms_plus_one")
  layer = build(grouped(rope=RopeSpec(100.0, fraction=0.25), qk_norm=norm, gate=True))
  weights = projections_gated(their)
  load(layer, weights)
  assert_equal(layer, their)


def projections_gated(their: Twin) -> dict[str, np.ndarray]:
  """The same, where the query projection has a gate beside each head."""
  both = their.weight("q_proj.weight").T.reshape(WIDTH, HEADS, 2 * HEAD_DIM)
  found = {"query.kernel": both}
  for ours, name in (("key", "k"), ("value", "v")):
    weight = their.weight(f"{name}_proj.weight")
    found[f"{ours}.kernel"] = weight.T.reshape(WIDTH, GROUPS, HEAD_DIM)
  found["out.kernel"] = their.weight("o_proj.weight").T.reshape(HEADS, HEAD_DIM, WIDTH)
  for ours, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
    found[f"{ours}.scale"] = their.weight(f"{name}.weight")
  return found
