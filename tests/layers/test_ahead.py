"""Multi-token prediction: what it adds to the loss, and what it leaves as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext import config
from maxtext.caches import Storage, empty
from maxtext.errors import ConfigErrors
from maxtext.layers.blocks import Block
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Plan
from maxtext.layers.params import Compute
from maxtext.masks import Mask
from maxtext.objectives.next_token import NextToken
from maxtext.specs import AttentionSpec, BlockSpec, DecoderSpec, MlpSpec, MtpSpec, Stage

WIDTH, VOCAB, WEIGHT = 24, 40, 0.3
BLOCK = BlockSpec(AttentionSpec(4, 2, 8), MlpSpec(32))
PLAIN = DecoderSpec(WIDTH, VOCAB, (Stage((BLOCK,), 2),), final_soft_cap=4.0)
SPEC = dataclasses.replace(PLAIN, mtp=MtpSpec(2, BLOCK))
SEGMENTS = np.array([[1] * 7 + [2] * 2 + [3] * 4 + [0] * 3, [1] * 1 + [2] * 15])
UNSEEN = np.array([[0] * 3 + [1] * 13, [1] * 9 + [0] * 2 + [1] * 5])  # targets that do not count


def plan(spec):
  memory = dataclasses.replace(config.load([], {}).memory, scan_layers=True, remat_policy="full")
  return Plan.of(functools.partial(Decoder, spec, Compute(kernel="dot_product"), memory))


@functools.cache
def params():
  random = np.random.default_rng(0)
  draw = lambda path, p: random.normal(path.endswith("scale"), 0.3, p.shape).astype(np.float32)
  return {path: jnp.asarray(draw(path, p)) for path, p in plan(SPEC).declared.items()}


def batch():
  """Rows of documents, each of which has one token more than it has inputs."""
  ids = np.random.default_rng(1).integers(0, VOCAB, (2, 16))
  targets = np.roll(ids, -1, axis=1)
  for row, segments in enumerate(SEGMENTS):
    ends = np.flatnonzero(segments != np.roll(segments, -1))
    targets[row, ends] = np.random.default_rng(row).integers(0, VOCAB, len(ends))
  at = np.arange(16)
  starts = [[np.flatnonzero(row == segment)[0] for segment in row] for row in SEGMENTS]
  positions = at - np.array(starts)
  columns = {"inputs": ids, "inputs_position": positions, "inputs_segmentation": SEGMENTS}
  columns |= {"targets": targets, "targets_segmentation": SEGMENTS * UNSEEN}
  return {name: jnp.asarray(x, jnp.int32) for name, x in columns.items()}


def by_hand(params, columns):
  """The weighed loss of the further tokens, document by document, by the paper's equations."""
  model, total = plan(SPEC).merge(params), 0.0
  unit = lambda norm, y: y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * norm.scale[...]
  for row in range(2):
    for number in set(SEGMENTS[row].tolist()) - {0}:
      at = np.flatnonzero(SEGMENTS[row] == number)
      tokens = jnp.append(columns["inputs"][row, at], columns["targets"][row, at[-1]])
      counts = np.append(False, UNSEEN[row, at] != 0)  # whether a token is to be predicted
      mask = Mask.of(jnp.arange(len(at))[None])
      h = model.hidden(tokens[None, :-1], mask)[0]
      for k, layer in enumerate(model.mtp, 1):
        left = len(tokens) - 1 - k  # the token at i predicts that at i + k + 1
        if left < 1:
          break
        shown = model.embedding[...][tokens[k : k + left]][None]
        both = jnp.concatenate(
          [unit(layer.token_norm, shown), unit(layer.hidden_norm, h[:, :left])], -1
        )
        h = Block.__call__(layer, both @ layer.joint.kernel[...], Mask.of(jnp.arange(left)[None]))[
          0
        ]
        logits = 4.0 * jnp.tanh(unit(layer.head_norm, h) @ model.unembedding[...] / 4.0)
        entropy = -jax.nn.log_softmax(logits)[0, np.arange(left), tokens[k + 1 :]]
        total += (entropy * counts[k + 1 :]).sum()
  return WEIGHT / 2 * total


def test_the_loss_has_what_the_further_tokens_of_each_document_lose_and_so_have_its_gradients():
  columns = batch()

  def ours(params):
    sums = NextToken(z_loss=1e-2, mtp=WEIGHT)(plan(SPEC).merge(params), columns)
    return sums["mtp_loss"].total, sums

  def whole(params):
    return ours(params)[1]["loss"].total

  def main(params):
    return NextToken(z_loss=1e-2)(plan(PLAIN).merge(params), columns)["loss"].total

  everything = jax.jit(lambda p: (*ours(p), jax.grad(whole)(p)))
  found, sums, grads = everything(params())
  shared = {name: p for name, p in params().items() if not name.startswith("mtp.")}
  expected, further = jax.jit(jax.value_and_grad(lambda p: by_hand(p, columns)))(params())
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert sums["mtp_loss"].weight == sums["loss"].weight == (SEGMENTS * UNSEEN != 0).sum()
  parts = [sums[name].total for name in ("lm_loss", "z_loss", "mtp_loss")]
  np.testing.assert_allclose(sums["loss"].total, sum(parts), rtol=1e-6)
  own = jax.jit(jax.grad(main))(shared)
  for name, g in grads.items():
    want = further[name] + own.get(name, 0)
    np.testing.assert_allclose(g, want, atol=2e-5 * float(abs(want).max()), err_msg=name)
    assert float(abs(further[name]).max()) > 0, name


def test_logits_and_decoding_ask_nothing_of_the_further_blocks():
  broken = {n: p * jnp.nan if n.startswith("mtp.") else p for n, p in params().items()}
  shared = {n: p for n, p in params().items() if not n.startswith("mtp.")}
  columns = batch()
  mask = Mask.of(columns["inputs_position"], columns["inputs_segmentation"])
  logits = lambda spec, params: jax.jit(plan(spec).merge(params))(columns["inputs"], mask)
  np.testing.assert_array_equal(logits(SPEC, broken), logits(PLAIN, shared))
  caches = [jax.eval_shape(lambda s=s: empty(s, 2, 8, Storage(jnp.float32))) for s in (SPEC, PLAIN)]
  assert jax.tree.structure(caches[0]) == jax.tree.structure(caches[1])


def test_every_family_predicts_further_by_a_key():
  for family in ("llama2", "gemma3", "deepseek3", "qwen3_next"):
    spec = config.load([f"decoder_block={family}", "mtp_num_layers=2"], {}).decoder(64)
    assert spec.mtp == MtpSpec(2, spec.blocks[-1]) and len(spec.blocks) == 4
    assert config.load([f"decoder_block={family}"], {}).decoder(64).mtp is None
  with pytest.raises(ConfigErrors, match="has an effect only with mtp_num_layers above 0"):
    config.load(["mtp_loss_scaling_factor=0.3"], {})
