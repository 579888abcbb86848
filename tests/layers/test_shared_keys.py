"""Layers that take the keys and values of an earlier one, and those that keep them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxtext import config
from maxtext.caches import Storage, empty, filled
from maxtext.errors import ConfigError
from maxtext.estimate.flops import parameter_count
from maxtext.layers.decoder import Decoder
from maxtext.layers.grouped import GroupedAttention
from maxtext.layers.merging import Plan
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.specs import (
  AttentionSpec,
  BlockSpec,
  DecoderSpec,
  MlpSpec,
  MtpSpec,
  NormSpec,
  QkNormSpec,
  RopeSpec,
  Stage,
)

LENGTH, VOCAB, WIDTH, ROWS = 12, 64, 32, 2
COMPUTE = Compute(kernel="dot_product")
NEAR = AttentionSpec(4, 2, 8, window=3, keeps="near", qk_norm=QkNormSpec(), v_norm=NormSpec("l2"))
FAR = AttentionSpec(4, 4, 8, RopeSpec(500.0), keeps="far", clip=0.7, bias=True)
MEMORIES = {
  "scanned": dataclasses.replace(config.load([], {}).memory, scan_layers=True, remat_policy="full"),
  "unrolled": dataclasses.replace(
    config.load([], {}).memory, scan_layers=False, remat_policy="none"
  ),
}


def taking(spec: AttentionSpec, **more) -> AttentionSpec:
  return dataclasses.replace(spec, keeps=None, takes=spec.keeps, v_norm=None, **more)


def decoder(*stages: tuple[AttentionSpec, ...], **more) -> DecoderSpec:
  """Each stage twice."""
  blocks = [tuple(BlockSpec(spec, MlpSpec(48)) for spec in stage) for stage in stages]
  return DecoderSpec(WIDTH, VOCAB, tuple(Stage(each, 2) for each in blocks), **more)


# The second time keys are kept counts; of two stages; and in one, each layer has its own source.
SPECS = {
  "two stages": decoder((NEAR, FAR), (taking(NEAR), taking(FAR, window=4))),
  "one stage": decoder(
    (NEAR, taking(NEAR, window=None)),
  ),
}


def plan(spec: DecoderSpec, memory=MEMORIES["scanned"]) -> tuple[Plan, dict]:
  """The model without its parameters, and parameters."""
  made = Plan.of(lambda rngs: Decoder(spec, COMPUTE, memory, rngs))
  draw = np.random.default_rng(0)
  values = {p: draw.normal(size=d.shape, scale=0.3) for p, d in made.declared.items()}
  return made, {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}


def tokens() -> tuple[jax.Array, Mask]:
  """Two rows, the second of two documents."""
  ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
  starts = np.array([[0] * LENGTH, [0] * 7 + [7] * 5])
  return jnp.asarray(ids), Mask.of(jnp.arange(LENGTH) - starts, jnp.asarray(1 + (starts > 0)))


def by_hand(model: Decoder, ids: jax.Array, mask: Mask) -> jax.Array:
  """Logits, where a layer makes keys and values from what went into the one that it takes them
  from, with that one's projections.
  """
  x, kept = model.embed(ids), {}
  for stage in model.stages:
    graph, weights = nnx.split(stage.blocks)
    for i in range(stage.repeat):
      for block in nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], weights)):
        own, normed = block.attention, block.attention_norm(x)
        kept |= {own.spec.keeps: (own, normed)} if own.spec.keeps else {}
        source, made_from = kept[own.spec.keeps or own.spec.takes]
        plain = dataclasses.replace(own.spec, keeps=None, takes=None, v_norm=source.spec.v_norm)
        layer = GroupedAttention(plain, WIDTH, COMPUTE, nnx.Rngs(0))
        layer.query, layer.query_norm, layer.out = own.query, own.query_norm, own.out
        layer.key, layer.value = source.key, source.value
        layer.key_norm, layer.value_norm = source.key_norm, source.value_norm
        x = x + layer(normed, mask, kv=made_from)[0]
        x = x + block.mlp(block.mlp_norm(x))
  return model.logits(model.norm(x))


@pytest.mark.parametrize(
  "name, memory",
  [
    ("two stages", "scanned"),
    *(pytest.param("one stage", memory, marks=pytest.mark.slow) for memory in MEMORIES),
    pytest.param("two stages", "unrolled", marks=pytest.mark.slow),
  ],
)
def test_a_layer_sees_the_keys_and_values_of_the_nearest_one_that_keeps_them(name, memory):
  """And gradients go back to what these are made from."""
  (made, params), (ids, mask) = plan(SPECS[name], MEMORIES[memory]), tokens()
  loss = lambda model: jnp.square(model(ids, mask)).mean()
  apart = lambda model: jnp.square(by_hand(model, ids, mask)).mean()
  both = [jax.jit(jax.value_and_grad(lambda p, f=f: f(made.merge(p)))) for f in (loss, apart)]
  (found, right) = (f(params) for f in both)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(right))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * scale), found, right)
  stages = SPECS[name].stages
  takers = [(i, k) for i, s in enumerate(stages) for k, b in enumerate(s.blocks) if b.shared[1]]
  theirs = {path for path in params for i, k in takers if f"stages.{i}.blocks.{k}.att" in path}
  assert {path.split(".", 5)[-1] for path in theirs} >= {"query.kernel", "out.kernel"}
  assert not any(".key" in path or ".value" in path for path in theirs)
  assert sum(x.size for x in params.values()) == parameter_count(SPECS[name])


@pytest.mark.parametrize("name", ["two stages", pytest.param("one stage", marks=pytest.mark.slow)])
def test_decoding_with_caches_equals_one_pass(name):
  (made, params), spec = plan(SPECS[name]), SPECS[name]
  model, (ids, _) = made.merge(params), tokens()
  positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
  whole = model(ids, Mask.of(positions))

  @jax.jit
  def more(caches, ids, positions):
    x, caches, _ = model.hidden(ids, Mask.of(positions), caches)
    return model.logits(x), caches

  logits, caches = more(
    empty(spec, ROWS, LENGTH, Storage(jnp.float32)), ids[:, :7], positions[:, :7]
  )
  found, caches = [logits], filled(caches)
  for i in range(7, LENGTH):
    logits, caches = more(caches, ids[:, i : i + 1], positions[:, i : i + 1])
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-4)


@pytest.mark.parametrize(
  "make, words",
  [
    (lambda: decoder((taking(NEAR), NEAR)), "takes: 'near': layer 0 takes what no layer before"),
    (lambda: decoder((NEAR, taking(FAR))), "takes: 'far': layer 1 takes what no layer before it"),
    (
      lambda: decoder((NEAR, taking(NEAR, kv_heads=4))),
      r"layer 1 has \(4, 8\) key heads .* \(2, 8\)",
    ),
    (
      lambda: decoder((NEAR,), (dataclasses.replace(NEAR, head_dim=16),)),
      r"keeps: 'near': layer 2 keeps \(2, 16\)",
    ),
    (
      lambda: taking(NEAR, share_kv=True),
      "share_kv: is for a layer with keys and values of its own",
    ),
    (lambda: dataclasses.replace(NEAR, takes="far"), "keeps: is for a layer with keys"),
    (
      lambda: decoder((NEAR,), mtp=MtpSpec(1, BlockSpec(NEAR, MlpSpec(48)))),
      "mtp: repeats the last layer, which keeps or takes",
    ),
  ],
)
def test_what_cannot_be_shared_is_refused(make, words):
  with pytest.raises(ConfigError, match=words):
    make()


def test_a_layer_that_takes_keys_and_values_makes_none():
  layer = GroupedAttention(taking(NEAR), WIDTH, COMPUTE, nnx.Rngs(0))
  with pytest.raises(ConfigError, match="takes: this layer's keys and values are those of an ear"):
    layer.kv_projection(jnp.zeros((1, 3, WIDTH)), "key")
