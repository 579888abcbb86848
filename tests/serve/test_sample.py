"""What may be drawn, how often, and on what it depends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext.data.tokenizers import ByteTokenizer
from maxtext.serve import sample
from maxtext.serve.sample import Sampler

DRAWS = 4000
LOGITS = np.random.default_rng(0).normal(0, 1.5, 24).astype(np.float32)


def share(logits, temperature=1.0):
  """softmax, in float64."""
  x = np.exp(np.float64(logits - logits.max()) / temperature)
  return x / x.sum()


def draws(draw):
  """Many draws from LOGITS, one a row -> how often each id came, as a share."""
  keys = sample.keys(7, jnp.arange(DRAWS), jnp.zeros(DRAWS, jnp.int32))
  ids = np.asarray(jax.jit(draw)(jnp.broadcast_to(LOGITS, (DRAWS, LOGITS.size)), keys))
  return np.bincount(ids, minlength=LOGITS.size) / DRAWS


def assert_drawn_from(seen, want):
  """Total variation below 0.05: of 4000 draws of 24 ids its mean is 0.03, its deviation 0.005."""
  assert (seen[want == 0] == 0).all() and np.abs(seen - want).sum() / 2 < 0.05


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_weighted_draws_by_probability(temperature):
  seen = draws(lambda x, keys: sample.weighted(x, keys, temperature))
  assert_drawn_from(seen, share(LOGITS, temperature))


@pytest.mark.parametrize("k", [1, 5, 24, 1000])
def test_top_k_draws_among_the_k_likeliest(k):
  want = np.where(LOGITS >= np.sort(LOGITS)[-min(k, 24)], share(LOGITS), 0)
  assert_drawn_from(draws(lambda x, keys: sample.top_k(x, keys, k)), want / want.sum())


@pytest.mark.parametrize("p, temperature", [(1e-6, 1), (0.5, 1), (0.9, 1), (0.9, 0.5), (1, 1)])
def test_a_nucleus_is_the_fewest_tokens_that_have_the_probability(p, temperature):
  probability = share(LOGITS, temperature)
  order = np.argsort(-probability)
  count = next(n for n in range(1, 25) if probability[order[:n]].sum() >= p - 1e-12)
  want = np.where(np.isin(np.arange(24), order[:count]), probability, 0)
  seen = draws(lambda x, keys: sample.nucleus(x, keys, p, temperature))
  assert_drawn_from(seen, want / want.sum())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
@pytest.mark.parametrize("draw", [sample.weighted, lambda x, k, t: sample.top_k(x, k, 9, t)])
def test_temperature_towards_zero_is_greedy(draw, temperature):
  seen = draws(lambda x, keys: draw(x, keys, temperature))
  assert seen[LOGITS.argmax()] == 1


def test_of_equals_top_k_takes_no_more_than_k():
  keys = sample.keys(0, jnp.arange(500), jnp.zeros(500, jnp.int32))
  assert len(np.unique(sample.top_k(jnp.zeros((500, 24)), keys, 3))) == 3


@pytest.mark.parametrize("strategy", ["greedy", "weighted", "topk", "nucleus"])
def test_padding_and_what_no_text_has_is_never_chosen(decode, strategy):
  section = decode(decode_sampling_strategy=strategy, decode_sampling_temperature=5.0)
  sampler = Sampler.of(section, ByteTokenizer())
  logits = np.zeros((500, 320), np.float32)
  logits[:, [0, 1, 259, 300, 319]] = 9.0
  ids = np.asarray(sampler(jnp.asarray(logits), jnp.arange(500), jnp.full(500, 3)))
  assert not np.isin(ids, [0, 1]).any() and ids.max() < 259


def test_the_end_of_a_text_may_be_chosen_though_it_is_the_padding_too(decode):
  tokenizer = ByteTokenizer(pad=2, bos=2, eos=2)
  assert Sampler.of(decode(), tokenizer).never == ()


def test_a_draw_depends_on_seed_row_and_position_only(decode):
  logits = jnp.broadcast_to(LOGITS, (6, 24))

  def drawn(seed, rows, positions):
    sampler = Sampler(decode(decode_sampling_strategy="weighted", decode_seed=seed), 24)
    return np.asarray(sampler(logits[: len(rows)], jnp.array(rows), jnp.array(positions)))

  many = drawn(3, [0, 1, 2, 3, 4, 5], [9, 9, 9, 8, 7, 9])
  np.testing.assert_array_equal(drawn(3, [4, 2], [7, 9]), many[[4, 2]])
  cases = itertools.product((0, 1), (0, 1), (0, 100))
  assert len({tuple(drawn(s, [r] * 6, range(p, p + 6))) for s, r, p in cases}) == 8
