"""Properties of the decoder, on the smallest models that can show them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext import config
from maxtext.errors import ConfigError
from maxtext.layers.blocks import Block
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Plan, parameters
from maxtext.layers.params import Compute
from maxtext.layers.stacking import SAVED
from maxtext.masks import Mask
from maxtext.objectives.next_token import NextToken
from maxtext.specs import (
  AttentionSpec,
  BlockSpec,
  DecoderSpec,
  DeltaSpec,
  MlpSpec,
  NormSpec,
  QkNormSpec,
  RopeSpec,
  Stage,
)

LENGTH, VOCAB, WIDTH = 12, 64, 32
MEMORY = dataclasses.replace(config.load([], {}).memory, scan_layers=True, remat_policy="none")
COMPUTE = Compute(kernel="dot_product")


def gated(window=None, **more):
  attention = AttentionSpec(4, 2, 8, window=window, **more)
  block = BlockSpec(attention, MlpSpec(64))
  return DecoderSpec(WIDTH, VOCAB, (Stage((block,), 2),))


def ungated():
  norm = NormSpec("layer", 1e-5)
  attention = AttentionSpec(4, 4, 8, rope=None, bias=True)
  block = BlockSpec(attention, MlpSpec(64, ("gelu",), bias=True), norm=norm)
  return DecoderSpec(WIDTH, VOCAB, (Stage((block,), 2),), norm, tied=True, positions=LENGTH)


def mixed():
  """Two kinds of blocks, in two stages."""
  near, far = gated(window=3).stages[0].blocks[0], gated(qk_norm=QkNormSpec()).stages[0].blocks[0]
  return DecoderSpec(WIDTH, VOCAB, (Stage((near, far), 2), Stage((near,))), final_soft_cap=5.0)


def linear():
  """A delta net, then attention."""
  near = BlockSpec(mlp=MlpSpec(64), delta=DeltaSpec(2, 4, 8, 8, conv=3))
  return DecoderSpec(WIDTH, VOCAB, (Stage((near, gated().stages[0].blocks[0]), 2),))


SPECS = {"gated": gated(), "windowed": gated(window=4), "ungated": ungated(), "mixed": mixed()}
SPECS["linear"] = linear()
NAMES = [n if n != "linear" else pytest.param(n, marks=pytest.mark.slow) for n in SPECS]


def make(spec, memory=MEMORY, compute=COMPUTE):
  return Decoder(spec, compute, memory, nnx.Rngs(0))


def assert_close(a, b):
  """Trees equal to float32's noise in sums as large as the largest number in them."""
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale), a, b)


def tokens(rows=1, length=LENGTH):
  ids = np.random.default_rng(0).integers(0, VOCAB, (rows, length))
  return jnp.asarray(ids), jnp.broadcast_to(jnp.arange(length), (rows, length))


def reach(spec):
  """How many tokens back any output can see, the token itself included."""
  windows = [b.attention and b.attention.window for b in spec.blocks]
  return LENGTH if None in windows else 1 + sum(w - 1 for w in windows)


@pytest.mark.parametrize("name", SPECS)
def test_a_token_sees_only_its_past(name):
  spec = dataclasses.replace(SPECS[name], vocab=LENGTH)  # token i stands at position i alone
  plan = Plan.of(lambda rngs: Decoder(spec, COMPUTE, MEMORY, rngs))
  params, positions = parameters(make(spec)), jnp.arange(LENGTH)[None]

  def outputs(embedding):
    model = plan.merge(params | {"embedding": embedding})
    return model.hidden(positions, Mask.of(positions))[0][0] @ jnp.arange(1.0, WIDTH + 1)

  seen = np.abs(jax.jit(jax.jacobian(outputs))(params["embedding"])).sum(-1) > 1e-7
  i, j = np.indices((LENGTH, LENGTH))
  np.testing.assert_array_equal(seen, (i >= j) & (i - j < reach(SPECS[name])))


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_document_is_computed_as_if_alone(name):
  model, (ids, _) = make(SPECS[name]), tokens()
  positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
  segments = jnp.concatenate([jnp.full(5, 1), jnp.full(7, 2)])[None]
  together = model(ids, Mask.of(positions, segments))
  apart = [model(ids[:, a:b], Mask.of(positions[:, a:b])) for a, b in ((0, 5), (5, 12))]
  np.testing.assert_allclose(together, jnp.concatenate(apart, 1), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_unrolled_layers_compute_what_scanned_ones_do(name):
  (ids, positions), plan = (
    tokens(),
    Plan.of(lambda rngs: Decoder(SPECS[name], COMPUTE, MEMORY, rngs)),
  )
  unrolled = dataclasses.replace(MEMORY, scan_layers=False)
  other = Plan.of(lambda rngs: Decoder(SPECS[name], COMPUTE, unrolled, rngs))
  assert plan.declared == other.declared
  params = parameters(make(SPECS[name]))

  def loss(plan):
    return lambda params: jnp.sin(plan.merge(params)(ids, Mask.of(positions))).sum()

  assert_close(*(jax.jit(jax.grad(loss(p)))(params) for p in (plan, other)))


FAST = ("full", "minimal_with_context")


@pytest.mark.parametrize(
  "policy", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in SAVED]
)
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(policy):
  (ids, positions), params = tokens(), parameters(make(SPECS["gated"]))

  def grads(policy):
    memory = dataclasses.replace(MEMORY, remat_policy=policy)
    plan = Plan.of(lambda rngs: Decoder(SPECS["gated"], COMPUTE, memory, rngs))
    return jax.jit(jax.grad(lambda p: jnp.sin(plan.merge(p)(ids, Mask.of(positions))).sum()))(
      params
    )

  assert_close(grads(policy), grads("none"))


def test_policies_keep_what_their_names_say():
  """The tags that a policy saves are the only block activations among the residuals of a scan."""
  (ids, positions), params = tokens(), parameters(make(SPECS["gated"]))

  def size(policy):
    memory = dataclasses.replace(MEMORY, remat_policy=policy)
    plan = Plan.of(lambda rngs: Decoder(SPECS["gated"], COMPUTE, memory, rngs))
    pull = jax.eval_shape(
      lambda p: jax.vjp(lambda p: plan.merge(p)(ids, Mask.of(positions)), p)[1], params
    )
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  names = ("full", "save_out_proj", "save_qkv_proj", "minimal", "minimal_with_context", "none")
  sizes = {name: size(name) for name in names}
  per_token = 2 * LENGTH  # layers x tokens
  assert sizes["save_out_proj"] - sizes["full"] == per_token * WIDTH
  assert sizes["save_qkv_proj"] - sizes["full"] == per_token * (4 + 2 + 2) * 8
  # mlpwo is saved by no scan: what comes after it is the next layer's input, which is kept anyway
  assert sizes["minimal"] - sizes["full"] == per_token * ((4 + 2 + 2) * 8 + WIDTH + 2 * 64)
  assert sizes["minimal_with_context"] - sizes["minimal"] == per_token * 4 * 8
  assert sizes["none"] > sizes["minimal_with_context"]


def test_dropout_is_the_same_for_the_same_key_and_absent_without_one():
  spec = gated()
  block = dataclasses.replace(spec.stages[0].blocks[0], dropout=0.5)
  spec = dataclasses.replace(spec, stages=(Stage((block,), 2),))
  model, (ids, positions) = make(spec), tokens()
  run = lambda key: model.hidden(ids, Mask.of(positions), key=key)[0]
  one, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
  np.testing.assert_array_equal(one, again)
  assert float(jnp.abs(one - other).max()) > 0.1
  np.testing.assert_array_equal(run(None), make(gated()).hidden(ids, Mask.of(positions))[0])


def test_layers_are_drawn_differently():
  kernel = parameters(make(gated()))["stages.0.blocks.0.mlp.up.kernel"]
  assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.1


def test_parameters_are_drawn_with_variance_one_over_fan_in():
  params = parameters(
    make(DecoderSpec(256, VOCAB, (Stage((BlockSpec(AttentionSpec(8, 8, 32), MlpSpec(512)),)),)))
  )
  fan_in = {"query": 256, "out": 256, "up": 256, "down": 512}
  for name, value in params.items():
    for layer, fan in fan_in.items():
      if f".{layer}.kernel" in name:  # 65,536 draws at least: the variance is off by 3 % at most
        np.testing.assert_allclose(float(value.var()) * fan, 1.0, atol=0.03)


def test_bfloat16_layers_keep_their_parameters_in_float32():
  compute = dataclasses.replace(COMPUTE, dtype=jnp.dtype("bfloat16"))
  model, (ids, positions) = make(gated(), compute=compute), tokens()
  assert {p.dtype for p in parameters(model).values()} == {jnp.dtype("float32")}
  assert model.hidden(ids, Mask.of(positions))[0].dtype == jnp.bfloat16
  assert model(ids, Mask.of(positions)).dtype == jnp.float32
  exact = make(gated())(ids, Mask.of(positions))
  np.testing.assert_allclose(
    model(ids, Mask.of(positions)), exact, atol=0.1
  )  # 8 bits of mantissa, 2 layers


def test_rotary_attention_depends_on_distances_alone():
  model, (ids, positions) = make(gated()), tokens()
  np.testing.assert_allclose(
    model(ids, Mask.of(positions)), model(ids, Mask.of(positions + 1000)), atol=2e-3
  )  # angles near 1000 are exact to 6e-5 in float32


def test_rope_turns_channel_pairs_by_position_over_timescale():
  from maxtext.layers.rope import rotate

  spec = RopeSpec(max_timescale=500.0, min_timescale=2.0, factor=3.0)
  x = np.random.default_rng(0).normal(size=(1, 5, 1, 6)).astype(np.float32)
  got = rotate(jnp.asarray(x), jnp.arange(5)[None], spec)
  for t in range(5):
    for i in range(3):
      angle = t / (2.0 * 250.0 ** (2 * i / 6) * 3.0)
      turned = (x[0, t, 0, i] + 1j * x[0, t, 0, i + 3]) * np.exp(1j * angle)
      np.testing.assert_allclose(
        [got[0, t, 0, i], got[0, t, 0, i + 3]], [turned.real, turned.imag], atol=1e-5
      )


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: AttentionSpec(6, 4, 8), "kv_heads: 4 does not divide 6 query heads"),
    (lambda: AttentionSpec(4, 2, 7), "head_dim: 7 is odd"),
    (lambda: AttentionSpec(4, 2, 8, window=0), "window: 0"),
    (lambda: MlpSpec(8, ("silu", "linear", "linear")), "activations"),
    (lambda: BlockSpec(AttentionSpec(4, 2, 8), MlpSpec(8), dropout=1.0), "dropout: 1.0"),
    (lambda: BlockSpec(mlp=MlpSpec(8)), "attention: a block has either attention or delta"),
    (lambda: DeltaSpec(3, 4, 8, 8), "value_heads: 4 is not a multiple of 3 key heads"),
    (lambda: DeltaSpec(2, 4, 8, 8, conv=0), "conv: 0 is not at least 1"),
    (lambda: Stage(()), "blocks"),
    (lambda: DecoderSpec(0, 8, ()), "width: 0"),
    (lambda: RopeSpec(max_timescale=0.5), "max_timescale: 0.5"),
  ],
)
def test_a_wrong_spec_is_refused_by_name(make, says):
  with pytest.raises(ConfigError, match=says):
    make()


WIRINGS = {
  "post norms": {"post_attention_norm": True, "post_mlp_norm": True},
  "only post norms": {"pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True},
  "parallel": {"parallel": True},
  "scaled": {"residual_scale": 0.3, "post_mlp_norm": True},
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_block_adds_what_its_spec_says(wiring):
  """Against the published formulae, with the block's own two layers in them."""
  own = WIRINGS[wiring]
  spec = BlockSpec(AttentionSpec(4, 2, 8), MlpSpec(64), **own)
  block = Block(spec, WIDTH, COMPUTE, nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for norm in [p for path, p in nnx.to_flat_state(nnx.state(block)) if path[-1] == "scale"]:
    norm.set_value(jnp.asarray(rng.normal(size=norm.shape), jnp.float32))
  x = jnp.asarray(rng.normal(size=(2, LENGTH, WIDTH)), jnp.float32)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
  mask = Mask.of(positions, jnp.ones_like(positions))

  def unit(scale, y):
    y = np.asarray(y, np.float64)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)

  before = lambda norm, y: unit(norm.scale[...], y).astype(np.float32) if spec.pre_norm else y
  after = lambda norm, y: unit(norm.scale[...], y) if norm is not None else np.asarray(y)
  attended = block.attention(jnp.asarray(before(block.attention_norm, x)), mask)[0]
  between = x + spec.residual_scale * after(block.post_attention_norm, attended)
  fed = block.mlp(jnp.asarray(before(block.mlp_norm, x if spec.parallel else between)))
  expected = between + spec.residual_scale * after(block.post_mlp_norm, fed)
  assert_close(block(x, mask)[0], expected)


def test_embeddings_and_logits_are_scaled_and_the_loss_knows():
  spec = dataclasses.replace(SPECS["ungated"], positions=0)
  scaled = dataclasses.replace(spec, embed_scale=3.0, embed_sqrt_width=True, logit_scale=0.25)
  tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB
  plain, model = make(spec), make(scaled)
  assert_close(model.embed(tokens), plain.embed(tokens) * (3 * WIDTH**0.5))
  x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
  assert_close(model.logits(x), plain.logits(x) / 4)
  ones = jnp.ones((2, LENGTH), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
  batch = {"inputs": tokens, "inputs_position": positions, "inputs_segmentation": ones}
  batch |= {"targets": tokens[:, ::-1], "targets_segmentation": ones}
  graph, params = nnx.split(model)

  def by_hand(params):
    logits = nnx.merge(graph, params)(tokens, Mask.of(positions, ones))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1).sum()

  ours = lambda params: NextToken()(nnx.merge(graph, params), batch)["loss"].total
  (a, da), (b, db) = (jax.value_and_grad(f)(params) for f in (ours, by_hand))
  assert_close(a, b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), da, db)
