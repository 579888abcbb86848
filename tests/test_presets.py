"""Every preset builds: its graph, its parameters' shapes and its logits', without memory."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from maxtext import config, estimate
from maxtext.config import documents
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Plan
from maxtext.layers.params import Compute
from maxtext.masks import Mask

VOCABULARY = 128  # of a preset that takes its tokenizer's
FAST = ("gemma3-27b", "deepseek3-671b", "gpt-oss-120b", "llama4-17b-16e")


def check(name: str) -> None:
  loaded = config.load([f"model_name={name}"], {}, purpose="decode")
  spec = loaded.decoder(VOCABULARY)
  plan = Plan.of(functools.partial(Decoder, spec, Compute(kernel="dot_product"), loaded.memory))
  assert sum(math.prod(p.shape) for p in plan.declared.values()) == estimate.parameter_count(spec)
  params = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in plan.declared.items()}
  tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

  def logits(params, tokens):
    places = jnp.zeros_like(tokens)
    return plan.merge(params)(tokens, Mask.of(places, places + 1))

  assert jax.eval_shape(logits, params, tokens).shape == (1, 16, spec.vocab)


@pytest.mark.parametrize("name", FAST)
def test_a_preset_builds(name):
  check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in documents.names("models") if n not in FAST])
def test_every_preset_builds(name):
  check(name)
