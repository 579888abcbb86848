"""Every kind of rotary position against transformers, and what holds of all of them."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtext.errors import ConfigError
from maxtext.layers import rope
from maxtext.specs import (
  AttentionSpec,
  GridRopeSpec,
  LongScaling,
  NtkScaling,
  RopeSpec,
  SectionsSpec,
  WavelengthScaling,
  YarnScaling,
)

FAR = 200_000
# Each of the two roundings of an angle, of the frequency and of the product, is half a unit in the
# last place of 2^-23.
ANGLE = 2.0**-23

WAVELENGTH = WavelengthScaling(factor=8, original_length=8192)
YARN = YarnScaling(factor=40, original_length=4096)
LONG = LongScaling(
  short=tuple(1 + 0.1 * i for i in range(16)),
  long=tuple(1.0 + i for i in range(16)),
  original_length=64,
  length=FAR,
  attention_factor=math.sqrt(1 + math.log(32) / math.log(64)),
)
KINDS = {  # for a head of 32 channels
  "plain": RopeSpec(500_000.0),
  "timescales": RopeSpec(500.0, 2.0, factor=3.0),
  "partial": RopeSpec(fraction=0.76),
  "proportional": RopeSpec(1e6, fraction=0.4, proportional=True),
  "adjacent": RopeSpec(interleave=True),
  "adjacent_partial": RopeSpec(interleave=True, fraction=0.5),
  "sections": RopeSpec(1e6, sections=SectionsSpec((4, 6, 6))),
  "alternating": RopeSpec(5e6, sections=SectionsSpec((6, 5, 5), interleaved=True)),
  "wavelength": RopeSpec(500_000.0, scaling=WAVELENGTH),
  "yarn": RopeSpec(scaling=YARN),
  "yarn_adjacent": RopeSpec(
    interleave=True, scaling=dataclasses.replace(YARN, truncate=False, attention_factor=1.0)
  ),
  "ntk": RopeSpec(scaling=NtkScaling(factor=4, original_length=2048, length=10_000)),
  "long": RopeSpec(scaling=LONG),
}
kinds = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def truth(x, positions, frequencies, spec):
  """x [t k] turned in float64, by complex numbers."""
  n = len(frequencies)
  first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if spec.interleave else (
    slice(0, n), slice(n, 2 * n))  # fmt: skip
  turned = (x[:, first] + 1j * x[:, second].astype(np.float64)) * np.exp(
    1j * positions[:, None] * frequencies
  )
  y = x.astype(np.float64)
  y[:, first], y[:, second] = turned.real, turned.imag
  y[:, : 2 * n] *= rope.attention_factor(spec)
  return y


# What holds of every kind.


@kinds
def test_a_rotation_keeps_the_length_of_every_query_and_key(spec):
  x, positions = normal(2, 8, 3, 32), np.random.default_rng(1).integers(0, FAR, (2, 8))
  dim, factor = spec.turning(32), rope.attention_factor(spec)
  y = np.asarray(rope.rotate(jnp.asarray(x), jnp.asarray(positions), spec))
  lengths = lambda z: np.linalg.norm(z, axis=-1)
  np.testing.assert_allclose(lengths(y[..., :dim]), factor * lengths(x[..., :dim]), rtol=1e-6)
  np.testing.assert_array_equal(y[..., dim:], x[..., dim:])


@kinds
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_a_score_depends_on_the_distance_alone(spec, query, key, shift):
  q, k = jnp.asarray(normal(1, 1, 1, 32)), jnp.asarray(normal(1, 1, 1, 32, seed=1))

  def score(i, j):
    at = lambda p: jnp.full((1, 1), p)
    return float((rope.rotate(q, at(i), spec) * rope.rotate(k, at(j), spec)).sum())

  # 32 products, none above 10 in sum of magnitudes times the error of an angle of 4000
  assert score(query, key) == pytest.approx(
    score(query + shift, key + shift), abs=40 * 4000 * ANGLE
  )


@kinds
def test_bfloat16_is_rotated_in_float32(spec):
  x, positions = jnp.asarray(normal(1, 8, 2, 32), jnp.bfloat16), FAR - jnp.arange(8)[None]
  got = rope.rotate(x, positions, spec)
  assert got.dtype == jnp.bfloat16
  expected = rope.rotate(x.astype(jnp.float32), positions, spec).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))


@kinds
def test_far_positions_are_as_exact_as_float32_angles_can_be(spec):
  x, positions = normal(1, 64, 1, 32), np.linspace(0, FAR, 64, dtype=np.int32)
  got = rope.rotate(jnp.asarray(x), jnp.asarray(positions[None]), spec)[0, :, 0]
  frequencies = rope.frequencies(32, spec)
  expected = truth(x[0, :, 0], positions, frequencies, spec)
  error = np.abs(got - expected).max(-1)
  bound = ANGLE * positions * frequencies.max() + 1e-6
  assert (error <= 2 * np.abs(expected).max(-1) * bound).all()  # each channel of a pair adds one


@kinds
def test_nothing_longer_than_the_tokens_is_made(spec):
  """No table of angles for the whole context."""
  x, positions = jnp.zeros((1, 2, 1, 32)), jnp.full((1, 2), FAR)
  made = jax.make_jaxpr(lambda x, p: rope.rotate(x, p, spec))(x, positions)
  assert max(v.aval.size for e in made.jaxpr.eqns for v in e.outvars) <= x.size


@kinds
def test_position_0_turns_nothing(spec):
  x = jnp.asarray(normal(1, 1, 1, 32))
  y = rope.rotate(x, jnp.zeros((1, 1), int), spec)
  dim = spec.turning(32)
  np.testing.assert_allclose(y[..., :dim], rope.attention_factor(spec) * x[..., :dim], rtol=1e-6)


@pytest.mark.parametrize("name", ["sections", "alternating"])
def test_text_has_the_same_position_on_every_axis(name):
  spec, x = KINDS[name], jnp.asarray(normal(1, 6, 2, 32))
  positions = jnp.arange(6)[None]
  three = jnp.broadcast_to(positions[..., None], (1, 6, 3))
  plain = dataclasses.replace(spec, sections=None)
  for got in (rope.rotate(x, positions, spec), rope.rotate(x, three, spec)):
    np.testing.assert_array_equal(got, rope.rotate(x, positions, plain))


def test_positions_on_three_axes_need_sections():
  with pytest.raises(ValueError, match="three axes need sections"):
    rope.rotate(jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 2, 3), int), RopeSpec())


def test_partial_and_proportional_rotations_differ():
  """The one turns 8 channels as a whole head of 8, the other 4 of the 16 pairs of the head."""
  partial = rope.frequencies(32, RopeSpec(fraction=0.25))
  proportional = rope.frequencies(32, RopeSpec(fraction=0.25, proportional=True))
  np.testing.assert_allclose(partial, 10_000 ** -(np.arange(4) / 4))
  np.testing.assert_allclose(proportional[:4], 10_000 ** -(np.arange(4) / 16))
  assert len(proportional) == 16 and not proportional[4:].any()


def test_a_patch_of_a_grid_is_turned_by_its_column_and_its_row():
  spec, x = GridRopeSpec(2, 3, class_token=False), normal(1, 6, 1, 8)
  got = rope.rotate_grid(jnp.asarray(x), spec)[0, :, 0]
  for t in range(6):
    for i, place in enumerate([t % 3, t % 3, t // 3, t // 3]):
      turned = (x[0, t, 0, 2 * i] + 1j * x[0, t, 0, 2 * i + 1]) * np.exp(
        1j * place * (1, 0.01)[i % 2]
      )
      np.testing.assert_allclose(got[t, 2 * i : 2 * i + 2], [turned.real, turned.imag], atol=1e-5)


def test_a_grid_refuses_other_tokens_than_its_own():
  with pytest.raises(ValueError, match=r"not \[b 7 h k\]"):
    rope.rotate_grid(jnp.zeros((1, 6, 1, 8)), GridRopeSpec(2, 3))


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: RopeSpec(fraction=0), "fraction: 0 is not above 0"),
    (lambda: RopeSpec(fraction=1.5), "fraction: 1.5 is more than the whole head; use at most 1"),
    (lambda: RopeSpec(factor=0), "factor: 0 is not above 0"),
    (lambda: RopeSpec(factor=2, scaling=YARN), "factor: 2 and a scaling both stretch"),
    (lambda: RopeSpec(proportional=True, scaling=YARN), "proportional: has no scaling"),
    (lambda: WavelengthScaling(factor=0.5, original_length=8), "factor: 0.5 is not at least 1"),
    (lambda: YarnScaling(factor=4, original_length=0), "original_length: 0 is not at least 1"),
    (
      lambda: YarnScaling(factor=4, original_length=8, beta_fast=1, beta_slow=2),
      "beta_fast: 1 is not above beta_slow=2",
    ),
    (
      lambda: YarnScaling(factor=4, original_length=8, attention_factor=0.0),
      "attention_factor: 0 is not above 0",
    ),
    (
      lambda: WavelengthScaling(factor=4, original_length=8, low_freq_factor=5),
      "high_freq_factor: 4 is not above low_freq_factor=5",
    ),
    (lambda: NtkScaling(factor=0, original_length=8, length=8), "factor: 0 is not at least 1"),
    (lambda: dataclasses.replace(LONG, short=(0.0,) * 16), "short: must be above 0 for every"),
    (lambda: dataclasses.replace(LONG, short=(1.0,)), "long: 16 factors, but short has 1"),
    (lambda: SectionsSpec((4, 4)), r"sizes: \[4, 4\] are not the pairs of three axes"),
    (lambda: SectionsSpec((2, 7, 7), True), r"sizes: \[2, 7, 7\] cannot alternate; use at most 5"),
    (lambda: head(RopeSpec(fraction=0.1)), "rope.fraction: 0.1 of 32 channels is 3,"),
    (lambda: head(RopeSpec(fraction=0.01)), "rope.fraction: 0.01 of 32 channels is 0,"),
    (
      lambda: head(RopeSpec(fraction=0.01, proportional=True)),
      "rope.fraction: 0.01 of 32 channels is no pair",
    ),
    (
      lambda: head(RopeSpec(sections=SectionsSpec((4, 4, 4)))),
      r"rope.sections: \[4, 4, 4\] are 12 pairs, but 32 channels turn; use sizes whose sum is 16",
    ),
    (
      lambda: head(RopeSpec(fraction=0.5, scaling=LONG)),
      "rope.scaling: short and long have 16 factors; use 8",
    ),
    (
      lambda: head(RopeSpec(fraction=1 / 16, scaling=KINDS["ntk"].scaling)),
      "rope.scaling: ntk needs two pairs",
    ),
    (lambda: GridRopeSpec(0, 3), "height: 0 is not at least 1"),
    (lambda: GridRopeSpec(3, 3, max_timescale=1), "max_timescale: 1 is not above 1"),
  ],
)
def test_an_impossible_rotation_is_refused_with_what_would_be_right(make, says):
  with pytest.raises(ConfigError, match=says):
    make()


def head(spec):
  return AttentionSpec(4, 2, 32, rope=spec)


# Against transformers. It computes frequencies in float32, with an error of up to 1.1e-6 of them
# where it blends two.

NOISE = 2e-6


@pytest.fixture(scope="module")
def twins():
  """transformers' modules by family, imported once."""
  pytest.importorskip("transformers")
  pytest.importorskip("torch").set_num_threads(1)
  import importlib

  def of(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    return SimpleNamespace(**{**vars(configuration), **vars(module)})

  return of


SCALINGS = {
  "linear": (RopeSpec(factor=4.0), {"rope_type": "linear", "factor": 4.0}, None),
  "proportional": (
    RopeSpec(1e6, fraction=0.3, proportional=True, factor=2.0),
    {
      "rope_type": "proportional",
      "rope_theta": 1e6,
      "partial_rotary_factor": 0.3,
      "factor": 2.0,
    },
    None,
  ),
  "llama3": (
    RopeSpec(5e5, scaling=WAVELENGTH),
    {
      "rope_type": "llama3",
      "rope_theta": 5e5,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
    None,
  ),
  "llama3_early": (
    RopeSpec(
      scaling=WavelengthScaling(
        factor=32, original_length=128, low_freq_factor=2, high_freq_factor=3
      )
    ),
    {
      "rope_type": "llama3",
      "factor": 32.0,
      "low_freq_factor": 2.0,
      "high_freq_factor": 3.0,
      "original_max_position_embeddings": 128,
    },
    None,
  ),
  "yarn": (
    RopeSpec(scaling=YARN),
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    None,
  ),
  "yarn_untruncated": (
    RopeSpec(1.5e5, scaling=YarnScaling(factor=32, original_length=4096, truncate=False)),
    {
      "rope_type": "yarn",
      "rope_theta": 1.5e5,
      "factor": 32.0,
      "beta_fast": 32.0,
      "beta_slow": 1.0,
      "truncate": False,
      "original_max_position_embeddings": 4096,
    },
    None,
  ),
  "yarn_betas": (
    RopeSpec(
      scaling=YarnScaling(
        factor=4, original_length=256, beta_fast=8, beta_slow=2, attention_factor=0.7
      )
    ),
    {
      "rope_type": "yarn",
      "factor": 4.0,
      "beta_fast": 8,
      "beta_slow": 2,
      "attention_factor": 0.7,
      "original_max_position_embeddings": 256,
    },
    None,
  ),
  "yarn_mscales": (
    RopeSpec(
      scaling=dataclasses.replace(
        YARN, attention_factor=rope.mscale(40, 0.9) / rope.mscale(40, 0.7)
      )
    ),
    {
      "rope_type": "yarn",
      "factor": 40.0,
      "mscale": 0.9,
      "mscale_all_dim": 0.7,
      "original_max_position_embeddings": 4096,
    },
    None,
  ),
  "dynamic": (
    RopeSpec(scaling=NtkScaling(factor=4, original_length=2048, length=10_000)),
    {"rope_type": "dynamic", "factor": 4.0},
    10_000,
  ),
  "dynamic_within": (
    RopeSpec(scaling=NtkScaling(factor=4, original_length=2048, length=100)),
    {"rope_type": "dynamic", "factor": 4.0},
    100,
  ),
}


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.376])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(twins, name, head_dim, fraction):
  spec, parameters, length = SCALINGS[name]
  if name != "proportional":
    spec = dataclasses.replace(spec, fraction=fraction)
    parameters = {**parameters, "partial_rotary_factor": fraction}
  check_frequencies(twins, spec, parameters, head_dim, length)


@pytest.mark.parametrize("length", [64, 65])
def test_long_factors_count_beyond_the_original_length(twins, length):
  parameters = {
    "rope_type": "longrope",
    "factor": 32.0,
    "short_factor": list(LONG.short),
    "long_factor": list(LONG.long),
    "original_max_position_embeddings": 64,
  }
  spec = RopeSpec(scaling=dataclasses.replace(LONG, length=length))
  check_frequencies(twins, spec, parameters, 32, length)


@pytest.mark.parametrize(
  "scaling",
  [dataclasses.replace(LONG, length=None), NtkScaling(factor=4, original_length=64)],
  ids=["long", "ntk"],
)
def test_each_document_turns_as_its_own_length_says(scaling):
  """Packed rows, a row with padding on its left, and a single token, which ends its document."""
  documents = [(80, 50), (30, 100), (64, 66)]
  positions = np.stack([np.r_[np.arange(a), np.arange(b)] for a, b in documents])
  padded = np.r_[np.zeros(25, int), np.arange(105)]
  found = rope.angles(jnp.asarray(np.vstack([positions, padded])), 32, RopeSpec(scaling=scaling))
  for row, lengths in enumerate([*documents, (25, 105)]):
    start = 0
    for length in lengths:
      fixed = RopeSpec(scaling=dataclasses.replace(scaling, length=length))
      here = np.arange(start, start + length)
      if (row, start) != (3, 0):
        expected = rope.angles(jnp.arange(length)[None], 32, fixed)[0]
        np.testing.assert_allclose(found[row, here], expected, rtol=1e-5, atol=1e-5)
      start += length
  alone = rope.angles(jnp.asarray([[70]]), 32, RopeSpec(scaling=scaling))
  fixed = RopeSpec(scaling=dataclasses.replace(scaling, length=71))
  np.testing.assert_allclose(alone, rope.angles(jnp.asarray([[70]]), 32, fixed), rtol=1e-5)


def check_frequencies(twins, spec, parameters, head_dim, length):
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  config = twins("llama").LlamaConfig(
    head_dim=head_dim,
    max_position_embeddings=2048,
    rope_parameters={"rope_theta": 10_000.0, **parameters},
  )
  expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
  np.testing.assert_allclose(rope.frequencies(head_dim, spec), expected.numpy(), rtol=NOISE)
  assert rope.attention_factor(spec) == pytest.approx(factor, rel=1e-6)


def half_split(twin, module, x, positions):
  return twin.apply_rotary_pos_emb(x, x, *module(x, positions))[0]


def one_at_a_time(twin, module, x, positions):
  return twin.apply_rotary_pos_emb(x, *module(x, positions, "full_attention"))


def back_to_adjacent(twin, module, x, positions):
  """It leaves the first channels of all pairs before the second ones."""
  y = twin.apply_rotary_pos_emb_interleave(x, x, *module(x, positions))[0]
  return y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def by_complex_numbers(twin, module, x, positions):
  x = x.transpose(1, 2)
  return twin.apply_rotary_emb(x, x, module(x, positions))[0].transpose(1, 2)


YARN_OF_TWIN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
MODELS = {  # spec; family and its classes' prefix; rope_parameters; how it is applied
  "llama": (KINDS["plain"], "llama", "Llama", {"rope_theta": 5e5}, half_split),
  "llama4": (
    RopeSpec(5e5, interleave=True, scaling=dataclasses.replace(WAVELENGTH, original_length=64)),
    "llama4",
    "Llama4Text",
    {**SCALINGS["llama3"][1], "original_max_position_embeddings": 64},
    by_complex_numbers,
  ),
  "gpt_neox": (
    RopeSpec(fraction=0.25),
    "gpt_neox",
    "GPTNeoX",
    {"partial_rotary_factor": 0.25},
    half_split,
  ),
  "qwen3_next": (
    RopeSpec(1e7, fraction=0.38),
    "qwen3_next",
    "Qwen3Next",
    {"rope_theta": 1e7, "partial_rotary_factor": 0.38},
    half_split,
  ),
  "glm4": (
    KINDS["adjacent_partial"],
    "glm4",
    "Glm4",
    {"partial_rotary_factor": 0.5},
    half_split,
  ),
  "deepseek_v3": (
    RopeSpec(
      interleave=True,
      scaling=YarnScaling(factor=8, original_length=64, attention_factor=1.0),
    ),
    "deepseek_v3",
    "DeepseekV3",
    {**YARN_OF_TWIN, "mscale": 1.0, "mscale_all_dim": 1.0},
    back_to_adjacent,
  ),
  "gpt_oss": (
    RopeSpec(1.5e5, scaling=YarnScaling(factor=8, original_length=64, truncate=False)),
    "gpt_oss",
    "GptOss",
    {**YARN_OF_TWIN, "rope_theta": 1.5e5, "truncate": False},
    half_split,
  ),
  "phi3": (
    KINDS["long"],
    "phi3",
    "Phi3",
    {
      "rope_type": "longrope",
      "factor": 32.0,
      "short_factor": list(LONG.short),
      "long_factor": list(LONG.long),
      "original_max_position_embeddings": 64,
    },
    half_split,
  ),
  "gemma4": (
    RopeSpec(1e6, fraction=0.25, proportional=True),
    "gemma4",
    "Gemma4Text",
    {
      "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    one_at_a_time,
  ),
  "qwen2_vl": (
    KINDS["sections"],
    "qwen2_vl",
    "Qwen2VL",
    {"rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    half_split,
  ),
  "qwen3_vl": (
    KINDS["alternating"],
    "qwen3_vl",
    "Qwen3VLText",
    {"rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    half_split,
  ),
  "glm4v": (
    RopeSpec(interleave=True, fraction=0.5, sections=SectionsSpec((2, 3, 3))),
    "glm4v",
    "Glm4vText",
    {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
    half_split,
  ),
}


@pytest.mark.parametrize("farthest", [100, FAR])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_query_equals_that_of_transformers(twins, name, farthest):
  torch = pytest.importorskip("torch")
  spec, family, prefix, parameters, apply = MODELS[name]
  if "full_attention" not in parameters:
    parameters = {"rope_type": "default", "rope_theta": 1e4, **parameters}
  twin = twins(family)
  config = vars(twin).get(f"{prefix}TextConfig") or vars(twin)[f"{prefix}Config"]
  module = vars(twin)[f"{prefix}RotaryEmbedding"](config_of(config, parameters))
  axes = (3,) if spec.sections else ()
  positions = np.random.default_rng(0).integers(0, farthest, (2, 9, *axes))
  positions[0, 0] = farthest
  x = normal(2, 9, 3, 32)
  theirs = torch.tensor(positions)
  theirs = theirs.permute(2, 0, 1) if spec.sections else theirs
  expected = apply(twin, module, torch.tensor(x).transpose(1, 2), theirs).transpose(1, 2).numpy()
  got = rope.rotate(jnp.asarray(x), jnp.asarray(positions), spec)
  # each angle is rounded twice, and some of the twin's frequencies are a rounding off
  atol = ANGLE * farthest * np.abs(x).max() + 1e-5
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def config_of(cls, parameters):
  """A configuration of 4 heads of 32 channels."""
  heads = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
  if cls.__name__ == "DeepseekV3Config":
    heads["qk_rope_head_dim"] = 32
  if cls.__name__ == "Gemma4TextConfig":
    heads["global_head_dim"] = 32
  longest = {"max_position_embeddings": 2048, "original_max_position_embeddings": 64}
  if cls.__name__ != "Phi3Config":
    del longest["original_max_position_embeddings"]
  return cls(**heads, **longest, rope_parameters=parameters)


def test_the_scale_of_scores_is_that_of_transformers(twins):
  twin = twins("deepseek_v3")
  parameters = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.7}
  assert 0.125 * rope.mscale(40.0, 0.7) ** 2 == pytest.approx(
    twin.yarn_apply_mscale(parameters, 0.125)
  )
  assert rope.mscale(1.0, 0.7) == 1


@pytest.mark.parametrize("side", [1, 3, 7])
def test_patches_with_a_class_token_equal_those_of_transformers(twins, side):
  torch, twin = pytest.importorskip("torch"), twins("llama4")
  config = twin.Llama4VisionConfig(
    hidden_size=64,
    num_attention_heads=4,
    image_size=14 * side,
    patch_size=14,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
  )
  x = normal(2, side**2 + 1, 4, 16)
  module = twin.Llama4VisionRotaryEmbedding(config)
  theirs = torch.tensor(x)
  expected, _ = twin.vision_apply_rotary_emb(theirs, theirs, module(theirs))
  got = rope.rotate_grid(jnp.asarray(x), GridRopeSpec(side, side))
  np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_patches_by_row_and_column_equal_those_of_transformers(twins):
  torch, twin = pytest.importorskip("torch"), twins("qwen2_vl")
  config = twin.Qwen2VLVisionConfig(embed_dim=64, num_heads=4)
  config.num_attention_heads = 4
  x = normal(1, 15, 4, 16)
  places = torch.tensor(np.indices((3, 5)).reshape(2, 15).T)
  cos, sin = twin.Qwen2VLVisionRotaryEmbedding(config)(torch.tensor(x), places)
  expected, _ = twin.apply_rotary_pos_emb_vision(torch.tensor(x[0]), torch.tensor(x[0]), cos, sin)
  spec = GridRopeSpec(3, 5, interleave=False, rows_first=True, class_token=False)
  np.testing.assert_allclose(rope.rotate_grid(jnp.asarray(x), spec)[0], expected.numpy(), atol=1e-5)
