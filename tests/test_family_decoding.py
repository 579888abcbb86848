"""Decoding with a cache gives, token by token, what transformers generates greedily."""

from __future__ import annotations

import numpy as np
import pytest

from maxtext import config
from maxtext.serve.engine import Engine
from maxtext.serve.sample import Sampler
from tests import twins
from tests.test_families import CASES
from tests.twins import VOCAB, torch

NEW, PROMPTS = 30, (11, 4)
GROWN = "phi3, longrope"
FAST = ("gemma2", "deepseek_v3, yarn, low rank, biases")


def generated(model, prompt: list[int], new: int) -> list[int]:
  settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
  with torch.no_grad():
    ids = model.generate(torch.tensor([prompt]), **settings)
  return ids[0, len(prompt) :].tolist()


def check(case: str, lengths: tuple[int, ...] = PROMPTS, new: int = NEW, **keys) -> None:
  """Prompts of other lengths, side by side."""
  model = twins.twin(*CASES[case])
  model.generation_config.eos_token_id = None
  mine = twins.ours(twins.plain(model.config), twins.tensors_of(model), **keys)
  random = np.random.default_rng(1)
  prompts = [random.integers(3, VOCAB, length).tolist() for length in lengths]
  sampler = Sampler(config.load([], {}).decode, VOCAB)
  found = Engine(mine, sampler).generate(mine.params, prompts, new)
  assert found == [generated(model, prompt, new) for prompt in prompts]


@pytest.mark.parametrize("case", FAST)
def test_decoding_equals_generate(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in (*FAST, GROWN)])
def test_decoding_equals_generate_in_every_family(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize("length, new", [(4, 12), (20, NEW)])
def test_decoding_by_longrope_equals_generate_on_either_side_of_the_original_length(length, new):
  """A text that grows beyond it is computed anew by transformers, and goes on as it began here."""
  check(GROWN, (length,), new)


@pytest.mark.slow
def test_decoding_from_keys_and_values_equals_that_from_latents():
  check("deepseek_v3, yarn, low rank, biases", mla_naive_kvcache=True)
