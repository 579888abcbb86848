"""The published attention layer: its keywords, its modes, and its two styles."""

from __future__ import annotations

import inspect
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, Mesh

from maxtext import config as configs
from maxtext.errors import ConfigError
from maxtext.layers import attentions
from maxtext.layers.attentions import MLA, Attention, AttentionType, L2Norm, attention_as_linen
from maxtext.layers.grouped import GroupedAttention
from maxtext.masks import Mask
from maxtext.specs import CacheQuantSpec

REQUIRED = (
  "config num_query_heads num_kv_heads head_dim max_target_length mesh attention_kernel "
  "inputs_q_shape inputs_kv_shape"
).split()
PREFILL = (
  "activation_prefill_kv_batch",
  "prefill_activation_length",
  "activation_kv_heads",
  "activation_kv_head_dim",
)
TRAIN = (
  "activation_kv_batch",
  "activation_length_attn",
  "activation_kv_heads",
  "activation_kv_head_dim",
)
OUT = ("activation_heads", "activation_kv")
OPTIONAL = {
  "dtype": jnp.float32,
  "weight_dtype": jnp.float32,
  "max_prefill_predict_length": -1,
  "dropout_rate": 0.0,
  "kernel_init": None,  # a function of its own
  "float32_qk_product": False,
  "float32_logits": False,
  "quant": None,
  "kv_quant": None,
  "attention_type": AttentionType.GLOBAL,
  "attn_logits_soft_cap": None,
  "sliding_window_size": None,
  "use_ragged_attention": False,
  "ragged_block_size": 256,
  "use_qk_norm": False,
  "query_pre_attn_scalar": None,
  "use_bias_in_projections": False,
  "share_kv_projections": False,
  "temperature_tuning": False,
  "temperature_tuning_scale": 0.1,
  "temperature_tuning_floor_scale": 8192.0,
  "prefill_query_axis_names": PREFILL,
  "prefill_key_axis_names": PREFILL,
  "prefill_value_axis_names": PREFILL,
  "query_axis_names": TRAIN,
  "key_axis_names": TRAIN,
  "value_axis_names": TRAIN,
  "input_axis_names": ("activation_batch_attn", "activation_length_attn", "activation_embed_attn"),
  "out_axis_names": ("activation_batch_attn", "activation_length_attn", *OUT),
  "prefill_input_axis_names": (*PREFILL[:2], "activation_embed_attn"),
  "decode_input_axis_names": ("decode_batch", "decode_length", "activation_embed_attn"),
  "prefill_out_axis_names": (*PREFILL[:2], *OUT),
  "decode_out_axis_names": ("decode_batch", "decode_length", *OUT),
  "prefill_cache_axis_order": (1, 2, 0, 3),
  "ar_cache_axis_order": (1, 2, 0, 3),
  "compute_axis_order": (0, 1, 2, 3),
  "reshape_q": False,
  "is_nope_layer": False,
  "is_vision": False,
  "model_mode": "train",
  "use_mrope": False,
  "mrope_section": None,
  "name": None,
  "rope_type": None,
}
ROWS, WIDTH, PROMPT, LENGTH = 2, 32, 12, 30
PLAIN = types.SimpleNamespace(rope_max_timescale=100)


SINK = types.SimpleNamespace(rope_max_timescale=100, attention_sink=True)
CHUNKS = types.SimpleNamespace(rope_max_timescale=100, chunk_attn_window_size=7)
LATENT = types.SimpleNamespace(
  rope_max_timescale=100,
  kv_lora_rank=12,
  q_lora_rank=10,
  qk_nope_head_dim=6,
  qk_rope_head_dim=4,
  v_head_dim=8,
)
EXPANDED = types.SimpleNamespace(**vars(LATENT), mla_naive_kvcache=True)
FUSED = types.SimpleNamespace(rope_max_timescale=100, fused_qkv=True)
YARN = types.SimpleNamespace(
  rope_max_timescale=100, original_max_position_embeddings=16, rope_factor=4
)
PARTIAL = types.SimpleNamespace(rope_max_timescale=100, partial_rotary_factor=0.5)
LOCAL = types.SimpleNamespace(rope_max_timescale=100, local_rope_max_timescale=20)


SLIDING = {"attention_type": AttentionType.LOCAL_SLIDING, "sliding_window_size": 5}
LATENTS = {"attention_type": AttentionType.MLA, "num_kv_heads": 4, "head_dim": 10}


def keywords(**more):
  shape = (ROWS, LENGTH, WIDTH)
  given = dict(zip(REQUIRED, (PLAIN, 4, 2, 8, LENGTH, None, "dot_product", shape, shape)))
  return given | more


def make(kind=Attention, **more):
  return kind(**keywords(**more), rngs=nnx.Rngs(0))


def inputs(length=LENGTH, seed=0):
  x = np.random.default_rng(seed).normal(size=(ROWS, length, WIDTH))
  return jnp.asarray(x, jnp.float32)


def places(start, stop):
  return jnp.broadcast_to(jnp.arange(start, stop), (ROWS, stop - start))


def assert_close(ours, truth, noise=2e-6):
  """Equal to float32's noise in sums of a hundred."""
  np.testing.assert_allclose(ours, truth, rtol=0, atol=noise * max(1, np.abs(truth).max()))


def test_the_signature_is_the_published_one():
  found = inspect.signature(attention_as_linen).parameters
  assert list(found) == [*REQUIRED, *OPTIONAL] and len(found) == 53
  assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in found.values())
  assert all(found[name].default is inspect.Parameter.empty for name in REQUIRED)
  given = {name: found[name].default for name in OPTIONAL if name != "kernel_init"}
  assert given == {name: value for name, value in OPTIONAL.items() if name != "kernel_init"}
  assert found["kernel_init"].default.__qualname__ == "nd_dense_init.<locals>.init_fn"
  ours = list(inspect.signature(Attention.__init__).parameters)
  assert ours == ["self", *found, "rngs"]


def test_a_caller_may_pass_every_keyword_by_name():
  settings = configs.load(["base_emb_dim=32"], {})
  every = keywords(**OPTIONAL) | {
    "config": settings,
    "kernel_init": attentions.nd_dense_init(1.0, "fan_in", "normal"),
    "name": "self_attention",
  }
  assert len(every) == 53
  module = attention_as_linen(**every)
  x = inputs()
  variables = module.init(jax.random.key(0), x, x)
  assert module.name == "self_attention"
  assert set(variables["params"]) == {"query", "key", "value", "out"}
  out, _ = module.apply(variables, x, x, places(0, LENGTH), jnp.ones((ROWS, LENGTH), int))
  assert out.shape == x.shape


@pytest.mark.parametrize(
  "wrong, text",
  [
    ({"num_kv_heads": -1}, "num_kv_heads is not defined."),
    ({"num_kv_heads": 3}, "Invalid num_kv_heads for GQA."),
    ({"compute_axis_order": (1, 0, 2, 3)}, r"\(0, 1, 2, 3\) or \(0, 2, 1, 3\).*\(1, 0, 2, 3\)"),
    ({"quant": object()}, "quant: .* not there yet"),
    ({"model_mode": "decode"}, "model_mode: 'decode' is none of train, prefill, autoregressive"),
    ({"attention_type": AttentionType.LOCAL_SLIDING}, "sliding_window_size: None: .* needs"),
    ({"attention_type": AttentionType.CHUNK}, "chunk_attn_window_size: None: .* needs"),
    (
      {"attention_type": AttentionType.MLA, "num_kv_heads": 4, "config": LATENT, "head_dim": 10},
      "attention_type: 'mla' is for the layer MLA",
    ),
    ({"attention_type": "lcal_sliding"}, "attention_type: 'lcal_sliding'.* did you mean 'local_s"),
    ({"num_kv_heads": 0}, "num_kv_heads: 0 is not at least 1"),
    ({"use_mrope": True}, "mrope_section: None: use_mrope needs three numbers"),
    ({"kv_quant": "int8", "model_mode": "prefill"}, "kv_quant: 'int8' is not a CacheQuantSpec"),
    ({"rope_type": "yarm"}, "rope_type: 'yarm' is none of .*did you mean 'yarn'"),
    ({"ar_cache_axis_order": (0, 0, 1, 2)}, "ar_cache_axis_order: '0,0,1,2' is not an order"),
    ({"attention_kernel": "flsh", "attention_type": AttentionType.FULL}, "'flsh' is not a kernel"),
    ({"use_mrope": True, "mrope_section": (1, 1, 1)}, "mrope_section: .* sum is 4"),
    ({"num_query_heads": 0}, "num_query_heads: 0 is not at least 1"),
    ({"dropout_rate": 1.0}, "dropout_rate: 1.0 is not from 0"),
    ({"attn_logits_soft_cap": -1.0}, "attn_logits_soft_cap: -1.0 is not above 0"),
    ({"key_axis_names": ("a", None)}, r"key_axis_names: .* are 2 names, .* have 4 axes"),
    ({"config": "base.yml"}, "config: 'base.yml' is a name; give the configuration"),
    (
      {"kv_quant": types.SimpleNamespace(dtype=jnp.float8_e5m2, axis_cfg="dkv")},
      "kv_quant_dtype: 'float8_e5m2' is none of int8, int4, fp8",
    ),
    (LATENTS | {"config": LATENT, "attention_kernel": "vllm_rpa"}, "'vllm_rpa' has no latents"),
    ({"config": FUSED, "inputs_kv_shape": (ROWS, LENGTH, 16)}, "fused_qkv: needs inputs of one w"),
    (
      {"model_mode": "prefill", "max_prefill_predict_length": LENGTH},
      "max_prefill_predict_length: 30 leaves no room",
    ),
  ],
)
def test_what_cannot_be_served_is_refused_in_words(wrong, text):
  with pytest.raises(ValueError, match=text):
    make(**wrong)(inputs(), inputs())


T, ALL = 6, (2, 6)
CACHED = {"model_mode": "prefill", "max_prefill_predict_length": 4}


@pytest.mark.parametrize(
  "made, given, text",
  [
    ({}, {"inputs_q": (2, T, 16)}, r"inputs_q: has shape \(2, 6, 16\), .* length, 32\)"),
    ({}, {"inputs_kv": (2, T, 16)}, r"inputs_kv: has shape .*as inputs_kv_shape says"),
    ({}, {"inputs_q": (T, WIDTH)}, r"inputs_q: has shape \(6, 32\)"),
    ({}, {"inputs_kv": (1, T, WIDTH)}, "inputs_kv: has 1 rows, but inputs_q has 2"),
    ({}, {"inputs_positions": (T,)}, r"inputs_positions: has shape \(6,\); .* need \(2, 6\)$"),
    ({}, {"inputs_positions": (2, 5)}, "inputs_positions: has shape"),
    ({}, {"inputs_positions": (*ALL, 3)}, "inputs_positions: has shape"),
    ({}, {"decoder_segment_ids": (2, 5)}, "decoder_segment_ids: has shape"),
    ({}, {"decoder_segment_ids": jnp.ones(ALL, bool)}, "decoder_segment_ids: is of bool"),
    ({}, {"bidirectional_mask": jnp.ones((2, 1, T, T), bool)}, "bidirectional_mask: has shape"),
    ({}, {"bidirectional_mask": ALL}, "bidirectional_mask: is of int32; give booleans"),
    ({}, {"inputs_kv": (2, 5, WIDTH), "decoder_segment_ids": ALL}, "inputs_kv has another length"),
    ({}, {"rope_kwargs": {"height": 3}}, "rope_kwargs: height: .* takes none"),
    ({}, {"slot": 1}, "slot: means nothing in model_mode='train'"),
    ({}, {"previous_chunk": 1}, "previous_chunk: means nothing in model_mode='train'"),
    ({}, {"kv_cache": 1}, "kv_cache: is for a layer with attention_kernel='vllm_rpa'"),
    ({}, {"attention_metadata": 1}, "attention_metadata: is for a layer with"),
    (CACHED, {"inputs_kv": (2, 5, WIDTH), "model_mode": "prefill"}, "inputs_kv: a cache keeps"),
    (CACHED | {"use_ragged_attention": True}, {"slot": 2, "model_mode": "prefill"}, "slot: 2 is n"),
    ({"dropout_rate": 0.5}, {}, r"dropout_rate: needs rngs=\{'dropout': key\}"),
  ],
)
def test_a_call_that_means_nothing_is_refused_in_words(made, given, text):
  number = {"inputs_q": jnp.float32, "inputs_kv": jnp.float32}
  arrays = {"inputs_q": (2, T, WIDTH), "inputs_kv": (2, T, WIDTH)} | given
  ready = {n: jnp.ones(x, number.get(n, int)) if type(x) is tuple else x for n, x in arrays.items()}
  layer = Attention(**keywords(**made), rngs=nnx.Rngs(params=0))
  with pytest.raises(ConfigError, match=text):
    layer(ready.pop("inputs_q"), ready.pop("inputs_kv"), **ready)


def test_it_computes_in_its_dtype_whatever_the_inputs_are():
  x, layer = inputs(), make(dtype=jnp.bfloat16)
  assert layer(x, x)[0].dtype == layer.query_projection(x).dtype == jnp.bfloat16
  np.testing.assert_array_equal(layer(x, x)[0], layer(*[x.astype(jnp.bfloat16)] * 2)[0])
  assert make()(*[x.astype(jnp.bfloat16)] * 2)[0].dtype == jnp.float32


def test_a_configuration_may_raise_what_it_will_for_a_key_that_it_lacks():
  class Keys:
    def __init__(self, kind):
      self.kind = kind

    def __getattr__(self, key):
      raise self.kind(f"Requested key {key}, not in config")

  for kind in (ValueError, KeyError, AttributeError):
    assert make(config=Keys(kind)).spec == make(config=None).spec


def test_rotary_keys_of_the_configuration_are_honoured():
  keys = {"rope_low_freq_factor": 2, "rope_high_freq_factor": 5, "rope_interleave": True}
  rope = make(rope_type="llama3.1", config=keys).spec.rope
  assert (rope.scaling.low_freq_factor, rope.scaling.high_freq_factor) == (2, 5)
  assert rope.interleave and not make().spec.rope.interleave
  keys = {"rope_attention_scaling": True, "rope_attention_factor": 1.5}
  assert make(rope_type="yarn", config=keys).spec.rope.scaling.attention_factor == 1.5


def test_plain_initialisers_draw_kernels_too():
  layer = make(kernel_init=jax.nn.initializers.constant(0.5))
  assert (layer.query.kernel[...] == 0.5).all() and (layer.out.kernel[...] == 0.5).all()


def test_a_projection_has_two_names():
  layer = make()
  assert layer.kv_projection(inputs(), "key").shape == (ROWS, LENGTH, 2, 8)
  with pytest.raises(ValueError, match="'key' or 'value', but got query"):
    layer.kv_projection(inputs(), "query")


def test_every_published_method_works_alone():
  layer, x = make(), inputs()
  assert layer.convert_dense_general_inputs_shape(x.shape) == (WIDTH,)
  assert layer.convert_dense_general_inputs_shape(x.shape, (1, 2)) == (LENGTH, WIDTH)
  assert layer.init_query_w(x.shape).kernel.shape == (WIDTH, 4, 8)
  assert layer.init_kv_w(x.shape).kernel.shape == (WIDTH, 2, 8)
  assert layer.init_qkv_w(x.shape).kernel.shape == (WIDTH, 2, 4, 8)
  assert layer.init_out_w(48).kernel.shape == (4, layer.out_head_dim, 48)
  query = layer.query_projection(x)
  assert query.shape == (ROWS, LENGTH, 4, 8)
  assert layer.init_rotary_embedding().max_timescale == 100
  turned = layer.apply_rotary_embedding(query, places(0, LENGTH))
  assert_close(turned, layer.apply_rotary_embedding(query))
  assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(query, axis=-1))
  assert layer.out_projection(query).shape == x.shape
  empty = layer.init_kv_caches(x.shape)
  assert empty.prompt.slots + empty.generated.slots == LENGTH


def test_projections_mean_the_same_apart_fused_and_by_latents():
  x = inputs(5)
  for layer, keys in (
    (make(), (2, 8)),
    (make(config=FUSED), (2, 8)),
    (make(MLA, **LATENTS, config=LATENT), (4, 10)),
  ):
    q, k, v = layer.qkv_projection(x)
    assert q.shape[2:] == (4, keys[1]) and k.shape[2:] == keys
    assert v.shape[-1] == layer.out_head_dim
    assert_close(layer.query_projection(x), q)
    assert_close(layer.kv_projection(x, "key"), k)
    assert_close(layer.kv_projection(x, "value"), v)
    with pytest.raises(ValueError, match="'key' or 'value', but got query"):
      layer.kv_projection(x, "query")


def test_a_fused_layer_makes_keys_from_the_other_inputs():
  layer, x, y = make(config=FUSED), inputs(6), inputs(6, seed=1)
  apart = make()
  for name, part in zip(
    ("query", "key", "value"), jnp.split(layer.qkv_proj.kernel[...], [2, 3], 2)
  ):
    getattr(apart, name).kernel.set_value(part.reshape(WIDTH, -1, 8))
  apart.out.kernel.set_value(layer.out.kernel[...])
  assert_close(layer(x, y)[0], apart(x, y)[0])


def test_the_query_scale_is_replaced_by_the_scalar():
  plain, scaled = make(), make(query_pre_attn_scalar=8**-0.5)
  assert_close(plain(inputs(), inputs())[0], scaled(inputs(), inputs())[0])
  assert (
    np.abs(
      make(query_pre_attn_scalar=1.0)(inputs(), inputs())[0] - plain(inputs(), inputs())[0]
    ).max()
    > 0.01
  )


# -- modes: a prompt, then token by token, is one pass ----------------------------------------


MODES = {
  "global": {},
  "one kv head": {"num_kv_heads": 1},
  "as many kv heads": {"num_kv_heads": 4},
  "sliding": SLIDING,
  "sliding, cap, sinks": SLIDING | {"attn_logits_soft_cap": 2.0, "config": SINK},
  "chunks": {"attention_type": AttentionType.CHUNK, "config": CHUNKS},
  "qk norm, biases": {"use_qk_norm": True, "use_bias_in_projections": True},
  "shared values": {"share_kv_projections": True},
  "no positions, temperature": {
    "is_nope_layer": True,
    "temperature_tuning": True,
    "temperature_tuning_floor_scale": 4.0,
  },
  "heads first, two queries": {"compute_axis_order": (0, 2, 1, 3), "reshape_q": True},
  "other orders": {"prefill_cache_axis_order": (2, 0, 3, 1), "ar_cache_axis_order": (0, 1, 2, 3)},
  "long wavelengths": {"rope_type": "llama3.1"},
  "yarn": {"rope_type": "yarn", "config": YARN},
  "some channels": {"config": PARTIAL},
  "a theta of its own": SLIDING | {"config": LOCAL},
  "fused": {"config": FUSED},
  "ragged": {"use_ragged_attention": True, "ragged_block_size": 8},
  "ragged, sliding, sinks": SLIDING | {"use_ragged_attention": True, "config": SINK},
  "paged": {"attention_kernel": "paged", "ragged_block_size": 8},
  "latents": LATENTS | {"config": LATENT, "kind": MLA},
  "latents expanded": LATENTS | {"config": EXPANDED, "kind": MLA},
  "blockwise": {"attention_kernel": "blockwise"},
  "three axes": {"use_mrope": True, "mrope_section": (2, 1, 1)},
}


def positions_of(options, start, stop):
  plain = places(start, stop)
  return jnp.stack([plain] * 3, -1) if options.get("use_mrope") else plain


@nnx.jit(static_argnames=("mode", "more"))
def step(layer, x, positions, mode, more=False, slot=None, segments=None):
  options = {"model_mode": mode, "previous_chunk": more or None, "slot": slot}
  return layer(x, x, positions, segments, **options)[0]


def in_parts(layer, options, x, cuts):
  """The layer's outputs, the prompt given in parts that end at `cuts`, the rest one by one."""
  ends = [*cuts, *range(cuts[-1] + 1, x.shape[1] + 1)]
  out = []
  for begin, end in zip([0, *ends], ends):
    mode = "prefill" if end <= cuts[-1] else "autoregressive"
    at = positions_of(options, begin, end)
    out.append(step(layer, x[:, begin:end], at, mode, begin > 0 and mode == "prefill"))
  return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize("name", MODES)
def test_a_prompt_and_then_token_by_token_is_one_pass(name):
  options = dict(MODES[name])
  kind, x = options.pop("kind", Attention), inputs()
  train = make(kind, **options)
  whole = train(x, x, positions_of(options, 0, LENGTH))[0]
  cached = {"model_mode": "prefill", "max_prefill_predict_length": PROMPT}
  for cuts in ([PROMPT], [5, 9, PROMPT]):
    layer = make(kind, **options, **cached)
    assert_close(in_parts(layer, options, x, cuts), whole)
    again = in_parts(layer, options, x[:, ::-1], [4])  # a new prompt starts the cache anew
    assert_close(again[:, :PROMPT], make(kind, **options)(x[:, ::-1], x[:, ::-1])[0][:, :PROMPT])


@pytest.mark.parametrize(
  "dtype, axis", list(itertools.product(["int8", "int4", "fp8"], ["dkv", "heads_and_dkv"]))
)
def test_a_quantised_cache_is_near_the_exact_one(dtype, axis):
  options = {"kv_quant": CacheQuantSpec(dtype, axis)}
  layer = make(**options, model_mode="prefill", max_prefill_predict_length=PROMPT)
  x = inputs()
  whole = make()(x, x)[0]
  error = np.abs(in_parts(layer, {}, x, [PROMPT]) - whole).max() / np.abs(whole).max()
  assert 0 < error < {"int8": 0.02, "int4": 0.3, "fp8": 0.1}[dtype]  # steps of 1/127, 1/7, 1/16


def test_padding_of_prompts_changes_nothing():
  """A row of 7 tokens, padded on either side, among rows of other lengths."""
  x = inputs()
  layer = make(model_mode="prefill", max_prefill_predict_length=PROMPT)
  alone = make()(x[:, :10], x[:, :10])[0]
  for side in ("left", "right"):
    pad = ((0, 0), (5, 0), (0, 0)) if side == "left" else ((0, 0), (0, 5), (0, 0))
    prompt = jnp.pad(x[:, :7], pad, constant_values=9.0)
    real = slice(5, 12) if side == "left" else slice(0, 7)
    segments = jnp.zeros((ROWS, 12), int).at[:, real].set(1)
    at = jnp.zeros((ROWS, 12), int).at[:, real].set(jnp.arange(7))
    out = [step(layer, prompt, at, "prefill", segments=segments)[:, real]]
    for i in range(7, 10):
      out.append(step(layer, x[:, i : i + 1], places(i, i + 1), "autoregressive"))
    assert_close(jnp.concatenate(out, 1), alone)


def test_rows_of_a_ragged_cache_go_on_by_themselves():
  x, whole = inputs(), make()(inputs(), inputs())[0]
  for options in ({"use_ragged_attention": True}, {"attention_kernel": "paged"}):
    layer = make(**options, ragged_block_size=8, model_mode="prefill")
    for row, length in ((1, 9), (0, 6), (1, 9)):  # the last begins row 1 anew
      one = x[row : row + 1, :length]
      out = step(layer, one, places(0, length)[:1], "prefill", slot=row)
      assert_close(out[0], whole[row, :length])
    for i in range(3):
      at = jnp.array([[6 + i], [9 + i]])
      new = jnp.stack([x[0, 6 + i], x[1, 9 + i]])[:, None]
      out = step(layer, new, at, "autoregressive")
      assert_close(out[:, 0], jnp.stack([whole[0, 6 + i], whole[1, 9 + i]]))


def test_a_slot_needs_a_cache_of_rows():
  layer = make(model_mode="prefill")
  with pytest.raises(ConfigError, match="slot: .*use_ragged_attention"):
    layer(inputs(4)[:1], inputs(4)[:1], model_mode="prefill", slot=0)


def test_a_layer_made_to_train_has_no_cache():
  layer = make()
  assert layer.kv_cache is None
  with pytest.raises(ConfigError, match="model_mode: a layer made for 'train' has no cache"):
    layer(inputs(4), inputs(4), model_mode="prefill")


def test_a_call_that_does_not_fit_the_cache_is_refused_in_words():
  layer, x = make(model_mode="prefill", max_prefill_predict_length=PROMPT), inputs(PROMPT)
  layer(x, x, model_mode="prefill")
  one = x[:1, :1]
  with pytest.raises(ConfigError, match="inputs_q: 1 rows, but 2 are to be continued"):
    layer(one, one, places(PROMPT, PROMPT + 1)[:1], model_mode="autoregressive")
  with pytest.raises(ConfigError, match="model_mode: 'decode' is none of train"):
    layer(x, x, model_mode="decode")
  with pytest.raises(ConfigError, match="inputs_positions: must be given"):
    layer(x[:, :1], x[:, :1], model_mode="autoregressive")


def test_a_mesh_needs_rules():
  mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",), axis_types=(AxisType.Auto,))
  with pytest.raises(ConfigError, match="mesh: config has no logical_axis_rules"):
    make(mesh=mesh)


@pytest.mark.parametrize(
  "options", [{}, {"use_ragged_attention": True}, {"attention_kernel": "paged"}]
)
def test_a_token_beyond_the_last_slot_is_noticed(options):
  layer, x = make(**options, max_target_length=8, **CACHED, ragged_block_size=8), inputs(4)
  layer(x, x, model_mode="prefill")
  if not options:
    with pytest.raises(ConfigError, match="no slot left .* max_prefill_predict_length"):
      layer(x, x, model_mode="prefill", previous_chunk=1)
  one, found = x[:, :1], []
  for i in range(4, 9):
    found.append(bool(jnp.isnan(step(layer, one, places(i, i + 1), "autoregressive")).any()))
  assert found == [False] * 4 + [True]  # in a compiled program numbers that are none say so
  with pytest.raises(ConfigError, match="max_target_length: the cache has no slot left"):
    layer(one, one, places(9, 10), model_mode="autoregressive")


def test_a_ring_never_runs_full():
  layer, x = make(**SLIDING, max_target_length=14, **CACHED), inputs(4)
  layer(x, x, model_mode="prefill")
  for i in range(4, 20):
    out = step(layer, x[:, :1], places(i, i + 1), "autoregressive")
  assert np.isfinite(out).all()


def test_a_loop_may_carry_the_cache():
  layer = make(**CACHED, max_target_length=9)
  x, whole = inputs(9), make()(inputs(9), inputs(9))[0]
  layer(x[:, :4], x[:, :4], model_mode="prefill")

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  def generate(layer, i):
    token = jax.lax.dynamic_slice_in_dim(x, i, 1, 1)
    at = jnp.full((ROWS, 1), i)
    return layer, layer(token, token, at, model_mode="autoregressive")[0][:, 0]

  _, out = generate(layer, jnp.arange(4, 9))
  assert_close(jnp.moveaxis(out, 0, 1), whole[:, 4:])


def test_layers_may_be_stacked_and_scanned():
  @nnx.split_rngs(splits=2)
  @nnx.vmap
  def build(rngs):
    return Attention(**keywords(dropout_rate=0.5), rngs=rngs)

  layers, x = build(nnx.Rngs(0)), inputs(4)

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def run(x, layer):
    return layer(x, x, deterministic=True)[0]

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def noisy(x, layer):
    return layer(x, x)[0]

  one, truth = make(), x
  for i in range(2):
    for name in ("query", "key", "value", "out"):
      getattr(one, name).kernel.set_value(getattr(layers, name).kernel[...][i])
    truth = one(truth, truth)[0]
  assert_close(run(x, layers), truth)
  assert np.abs(noisy(x, layers) - noisy(x, layers)).max() > 0.01


def test_keys_and_values_are_kept_in_both_parts():
  layer = make(model_mode="prefill", max_prefill_predict_length=PROMPT)
  kv = jnp.asarray(np.random.default_rng(1).normal(size=(2, ROWS, 5, 2, 8)), jnp.float32)
  segments = jnp.array([[1] * 5, [0, 0, 1, 1, 1]])
  prompt, generated = layer.update_kv_caches(*kv, segments, "prefill")
  assert generated is None
  assert_close(prompt[0][:, :5], kv[0])
  np.testing.assert_array_equal(prompt[2][:, :5], segments)
  assert not prompt[2][:, 5:].any()
  one = kv[:, :, :1]
  prompt, generated = layer.update_kv_caches(*one, None, "autoregressive")
  assert_close(generated[1][:, :1], one[1])
  np.testing.assert_array_equal(generated[2][:, :3], [[1, 0, 0]] * 2)
  for mode, text in (("train", "'train' keeps no keys"), ("prefil", "did you mean 'prefill'")):
    with pytest.raises(ConfigError, match=f"model_mode: .*{text}"):
      layer.update_kv_caches(*kv, segments, mode)
  with pytest.raises(ConfigError, match=r"decoder_segment_ids: has shape \(2, 4\)"):
    layer.update_kv_caches(*kv, segments[:, :4], "prefill")
  layer.update_kv_caches(*kv, segments, "prefill", previous_chunk=1)
  with pytest.raises(ConfigError, match="no slot left"):
    layer.update_kv_caches(*kv, segments, "prefill", previous_chunk=1)


# -- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, dimensions", [(8, 3), (128, 4)])
def test_narrow_heads_are_kept_side_by_side(size, dimensions):
  """What stands in the last dimension fills a TPU's 128 lanes, with zeros if need be."""
  layer, x = make(head_dim=size), inputs()
  eqns = jax.make_jaxpr(lambda x: layer(x, x)[0])(x).jaxpr.eqns
  kept = {e.params["name"]: e.outvars[0].aval for e in eqns if e.primitive.name == "name"}
  for name in ("query_proj", "key_proj", "value_proj"):
    assert kept[name].ndim == dimensions


def seen_by(layer, x, **more):
  """bool [T S]: which inputs the outputs of row 0 depend on."""
  out = lambda x: layer(x, x, **more)[0][0].sum(-1)
  return np.abs(jax.jacobian(out)(x)[:, 0]).sum(-1) > 1e-7


def test_attention_types_are_what_they_say():
  i, j = np.indices((12, 12))
  x = inputs(12)
  config = types.SimpleNamespace(chunk_attn_window_size=5, causal_block_size=4)
  for kind, wanted in {
    AttentionType.GLOBAL: j <= i,
    AttentionType.LOCAL_SLIDING: (j <= i) & (j > i - 3),
    AttentionType.CHUNK: (j <= i) & (j // 5 == i // 5),
    AttentionType.BLOCK_DIFFUSION: j // 4 <= i // 4,
    AttentionType.FULL: j >= 0,
  }.items():
    layer = make(attention_type=kind, sliding_window_size=3, config=config)
    np.testing.assert_array_equal(seen_by(layer, x), wanted)


def test_marked_runs_see_each_other_both_ways():
  marked = jnp.array([[0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1]] * ROWS, bool)
  run = np.array([0, 1, 1, 1, 0, 2, 2, 0, 0, 0, 0, 3])
  i, j = np.indices((12, 12))
  wanted = (j <= i) | ((run[i] == run[j]) & (run[i] > 0))
  np.testing.assert_array_equal(seen_by(make(), inputs(12), bidirectional_mask=marked), wanted)


def test_marked_runs_of_a_prompt_in_parts_are_runs_of_their_own():
  """Without numbers of their own, a run of the second part would see one of the first part."""
  x, marked = inputs(8), jnp.tile(jnp.array([1, 1, 0, 0, 0, 1, 1, 0], bool), (ROWS, 1))
  for options in ({}, {"use_ragged_attention": True}):
    options |= {"attention_type": "local_sliding", "sliding_window_size": 2}
    whole = make(**options)(x, x, bidirectional_mask=marked)[0]
    layer = make(**options, model_mode="prefill")
    out = []
    for part in (slice(0, 4), slice(4, 8)):
      more = {"previous_chunk": part.start or None, "bidirectional_mask": marked[:, part]}
      out.append(layer(x[:, part], x[:, part], model_mode="prefill", **more)[0])
    assert_close(jnp.concatenate(out, 1), whole)


def test_other_inputs_than_the_queries_may_be_attended_to():
  layer = make(attention_type=AttentionType.FULL, inputs_kv_shape=(ROWS, 9, 16))
  kv = inputs(9)[..., :16]
  assert layer.key.kernel.shape == (16, 2, 8)
  out = layer(inputs(5), kv)[0]
  assert out.shape == (ROWS, 5, WIDTH)
  assert np.abs(jax.grad(lambda kv: layer(inputs(5), kv)[0].sum())(kv)).min(-1).max() > 0


def test_patches_of_an_image_are_rotated_by_their_place():
  config = types.SimpleNamespace(image_size_for_vit=28, patch_size_for_vit=7)
  layer = make(is_vision=True, attention_type=AttentionType.FULL, config=config)
  grid = layer.init_rotary_embedding()
  assert (grid.height, grid.width) == (4, 4)
  assert layer(inputs(17), inputs(17))[0].shape == (ROWS, 17, WIDTH)


# -- dropout, serving, meshes -------------------------------------------------------------------


def test_dropout_is_drawn_unless_it_is_deterministic():
  layer, x = make(dropout_rate=0.5), inputs()
  one, other = layer(x, x)[0], layer(x, x)[0]
  assert np.abs(one - other).max() > 0.01
  quiet = layer(x, x, deterministic=True)[0]
  assert_close(quiet, make()(x, x)[0])


def test_serving_has_a_dry_run_and_names_the_package_that_it_needs():
  layer = make(model_mode="autoregressive", attention_kernel="vllm_rpa")
  q, k = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 1, 2, 8))
  out, pages = layer.forward_serve_vllm(q, k, k)
  assert out is q and pages == []
  x = inputs(1)
  out, pages = layer(x, x, places(0, 1), model_mode="autoregressive")
  assert out.shape == x.shape and pages == []
  with pytest.raises(ImportError, match="pip install vllm-tpu"):
    layer.forward_serve_vllm(q, k, k, [jnp.zeros(1)], types.SimpleNamespace())


def test_a_mesh_changes_no_number():
  settings = configs.load(["base_emb_dim=32"], {})
  mesh = Mesh(
    np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  x = jnp.concatenate([inputs(), inputs(seed=1)])
  shape = {"inputs_q_shape": x.shape, "inputs_kv_shape": x.shape, "config": settings}
  cached = {"model_mode": "prefill", "max_prefill_predict_length": PROMPT}
  one, eight = make(**shape), make(**shape, mesh=mesh, **cached)
  truth = one(x, x)[0]

  @nnx.jit(static_argnames="mode")
  def run(eight, x, at, mode):
    at = jnp.broadcast_to(at, x.shape[:2])
    return eight(x, x, at, model_mode=mode)[0]

  assert_close(run(eight, x, jnp.arange(LENGTH), "train"), truth)
  assert_close(run(eight, x[:, :PROMPT], jnp.arange(PROMPT), "prefill"), truth[:, :PROMPT])
  lowered = jax.jit(lambda x: eight(x, x)[0]).lower(x)
  assert "sharding" in lowered.as_text()


# -- Linen --------------------------------------------------------------------------------------


class Model(linen.Module):
  """A layer of flax's older style around ours."""

  mode: str = "train"

  @linen.compact
  def __call__(self, x, positions, model_mode="train"):
    more = {"model_mode": self.mode, "max_prefill_predict_length": PROMPT, "use_qk_norm": True}
    x = linen.Dense(WIDTH)(x)
    layer = attention_as_linen(**keywords(**more), name="self_attention")
    return layer(x, x, positions, model_mode=model_mode)[0]


def test_linen_gives_the_same_bits():
  x = inputs()
  module = attention_as_linen(**keywords())
  variables = module.init(jax.random.key(0), x, x)
  layer = make()
  for name in ("query", "key", "value", "out"):
    boxed = variables["params"][name]["kernel"]
    assert isinstance(boxed, linen.LogicallyPartitioned)
    assert boxed.names == getattr(layer, name).kernel.get_metadata()["axes"]
    getattr(layer, name).kernel.set_value(boxed.value)
  ours = jax.jit(lambda v, x: module.apply(v, x, x)[0])(variables, x)
  np.testing.assert_array_equal(ours, nnx.jit(lambda layer, x: layer(x, x)[0])(layer, x))


class Layers(linen.Module):
  """Two layers by a scan that computes them again in the backward pass."""

  options: dict

  @linen.compact
  def __call__(self, x, mode):
    def layer(parent, x, _):
      attention = attention_as_linen(**keywords(**self.options), name="attention")
      return x + attention(x, x, model_mode=mode)[0], None

    axes = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True}}
    named = {linen.PARTITION_NAME: "layers"}
    run = linen.scan(linen.remat(layer), **axes, length=2, metadata_params=named)
    return run(self, x, None)[0]


def test_linen_layers_may_be_scanned_and_computed_again():
  x, model = inputs(4), Layers(CACHED | {"dtype": jnp.bfloat16})
  variables = model.init(jax.random.key(0), x, "prefill")
  kernel = variables["params"]["attention"]["query"]["kernel"]
  assert kernel.names == ("layers", "embed", "q_heads", "kv") and kernel.value.shape[0] == 2
  out, held = model.apply(variables, x, "prefill", mutable=["cache"])
  assert jax.tree.structure(held["cache"]) == jax.tree.structure(variables["cache"])
  params = {"params": variables["params"]}
  assert_close(out, model.apply(params, x, "train"), 1e-2)  # bfloat16
  gradient = jax.grad(lambda p: jnp.square(model.apply(p, x, "train")).sum())(params)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_linen_keeps_the_cache_in_its_collection():
  x = inputs()
  train, model = Model(), Model("prefill")
  variables = model.init(jax.random.key(0), x[:, :PROMPT], places(0, PROMPT), "prefill")
  assert set(variables) == {"params", "cache"}
  params = {"params": variables["params"]}
  names = linen.get_partition_spec(params)["params"]["self_attention"]["query"]["kernel"]
  assert tuple(names) == ("embed", "q_heads", "kv")
  whole = train.apply(params, x, places(0, LENGTH))
  out, held = model.apply(variables, x[:, :PROMPT], places(0, PROMPT), "prefill", mutable=["cache"])
  outs = [out]
  for i in range(PROMPT, LENGTH):
    at = places(i, i + 1)
    out, held = model.apply(params | held, x[:, i : i + 1], at, "autoregressive", mutable=["cache"])
    outs.append(out)
  assert_close(jnp.concatenate(outs, 1), whole)


def test_the_norm_without_parameters_has_both_styles():
  x = inputs()
  truth = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-3)
  assert_close(L2Norm(1e-3)(x), truth)
  module = attentions.l2_norm_as_linen(1e-3)
  assert_close(module.apply(module.init(jax.random.key(0), x), x), truth)


# -- what the layers share ------------------------------------------------------------------------


def test_a_fused_kernel_means_what_three_mean():
  x, at = inputs(), Mask.of(places(0, LENGTH))
  apart, fused = make(), make(config=FUSED)
  q, k, v = (getattr(apart, name).kernel[...] for name in ("query", "key", "value"))
  together = jnp.concatenate([q.reshape(WIDTH, 2, 2, 8), k[:, :, None], v[:, :, None]], axis=2)
  fused.qkv_proj.kernel.set_value(together)
  fused.out.kernel.set_value(apart.out.kernel[...])
  assert_close(
    GroupedAttention.__call__(fused, x, at)[0], GroupedAttention.__call__(apart, x, at)[0]
  )


def test_shared_values_are_the_keys_before_norm_and_rotation():
  x = inputs()
  shared, apart = make(share_kv_projections=True, use_qk_norm=True), make(use_qk_norm=True)
  apart.value.kernel.set_value(shared.key.kernel[...])
  for name in ("query", "key", "out"):
    getattr(apart, name).kernel.set_value(getattr(shared, name).kernel[...])
  assert shared.value is None
  assert_close(shared(x, x)[0], apart(x, x)[0])
