"""Kernels are chosen by name: the names users may write, the choice, and the refusals."""

import dataclasses
import logging
import typing

import jax
import jax.numpy as jnp
import pytest

from maxtext import kernels, sharding
from maxtext.errors import ConfigError
from maxtext.kernels import options
from maxtext.layers import sections
from maxtext.masks import Mask


def call(name, length):
  """Trace, no more."""
  q, kv = (jax.ShapeDtypeStruct((1, length, heads, 4), jnp.float32) for heads in (2, 1))
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  scores = kernels.Scores(0.5)
  return jax.eval_shape(
    lambda q, k, v, mask: kernels.attend(name, q, k, v, mask, scores), q, kv, kv, Mask.of(tokens)
  )


def test_the_names_a_user_may_write_are_the_registered_ones():
  named = typing.get_args(typing.get_type_hints(sections.Kernel)["attention"])
  assert set(named) == {"autoselected", *kernels._kernels}


def test_an_unknown_kernel_is_refused_with_the_nearest_name():
  with pytest.raises(ConfigError, match="did you mean 'blockwise'"):
    call("blokwise", 4)


def test_a_named_kernel_that_cannot_serve_says_why(monkeypatch):
  kernel = kernels._kernels["dot_product"][0]
  monkeypatch.setitem(kernels._kernels, "dot_product", (kernel, lambda *_: "it is Sunday"))
  with pytest.raises(ConfigError, match="'dot_product' cannot serve this layer: it is Sunday"):
    call("dot_product", 4)


def test_autoselected_says_what_it_chose_and_why_not_the_other(monkeypatch, caplog):
  monkeypatch.setattr(kernels, "_announced", set())
  monkeypatch.setattr(kernels.log, "propagate", True)
  with caplog.at_level(logging.INFO, "maxtext"):
    for length in (127, 128, 128):
      call("autoselected", length)
    kernel = kernels._kernels["blockwise"][0]
    monkeypatch.setitem(kernels._kernels, "blockwise", (kernel, lambda *_: "it is Sunday"))
    kernels._announced.clear()
    call("autoselected", 128)
  assert caplog.messages == [
    "attention: dot_product for queries x keys = 127 x 127",
    "attention: blockwise for queries x keys = 128 x 128",
    "attention: dot_product for queries x keys = 128 x 128; not blockwise: it is Sunday",
  ]


def test_nothing_fit_is_an_error_with_every_reason(monkeypatch):
  for name, (kernel, _) in list(kernels._kernels.items()):
    why = f"{name} rests"
    monkeypatch.setitem(kernels._kernels, name, (kernel, lambda *_, why=why: why))
  with pytest.raises(ConfigError, match="not dot_product: dot_product rests; not blockwise"):
    call("autoselected", 4)


def test_one_query_over_a_long_cache_takes_the_plain_product():
  assert chosen_for(1, 10**6) == "dot_product"
  assert chosen_for(64, 1024) == "blockwise"


@pytest.mark.parametrize("platform, first", [("tpu", "flash"), ("gpu", "cudnn_flash")])
def test_the_hardwares_own_kernel_comes_first_where_it_is_fit(platform, first, monkeypatch, caplog):
  monkeypatch.setattr(kernels.cudnn, "planned", lambda: True)
  for module in (sharding, kernels.splash, kernels.cudnn):
    monkeypatch.setattr(module, "platform", lambda: platform)
  monkeypatch.setattr(kernels, "_announced", set())
  monkeypatch.setattr(kernels.log, "propagate", True)
  like = jax.ShapeDtypeStruct
  q, kv = (like((1, 2048, heads, 64), jnp.bfloat16) for heads in (2, 1))
  tokens = like((1, 2048), jnp.int32)
  fit = Mask.of(tokens, tokens, ordered=True)
  with caplog.at_level(logging.INFO, "maxtext"):
    assert kernels._choose(q, kv, kv, fit, kernels.Scores(0.5), None, None) == first
    seed = like((2,), jnp.uint32)
    assert kernels._choose(q, kv, kv, fit, kernels.Scores(0.5), None, seed) == "blockwise"
  shape = "for queries x keys = 2048 x 2048"
  passed, passed_over = caplog.messages
  assert passed == f"attention: {first} {shape}"
  assert passed_over.startswith(f"attention: blockwise {shape}; not {first}: it has no dropout")
  decoding = Mask(like((1, 1), jnp.int32), tokens)
  query = like((1, 1, 2, 64), jnp.bfloat16)
  chosen = kernels._choose(query, kv, kv, decoding, kernels.Scores(0.5), None, None)
  assert chosen == "dot_product"  # few queries


def chosen_for(queries, keys):
  like = jax.ShapeDtypeStruct
  q, kv = like((1, queries, 2, 4), jnp.float32), like((1, keys, 1, 4), jnp.float32)
  mask = Mask(like((1, queries), jnp.int32), like((1, keys), jnp.int32))
  return kernels._choose(q, kv, kv, mask, kernels.Scores(0.5))


def test_every_option_of_the_blocks_has_its_key():
  fields = {field.name for field in dataclasses.fields(kernels.Blocks)}
  assert set(options.KEYS) == fields
  given = {key: f"value of {key}" for key in [*options.KEYS.values(), options.CONTEXT]}
  made = kernels.Options.of("flash", lambda key, default: given[key])
  assert made.context == given[options.CONTEXT]
  assert all(getattr(made.blocks, name) == given[key] for name, key in options.KEYS.items())


@pytest.mark.parametrize("name", ["autoselected", "dot_product", "blockwise", "ragged"])
@pytest.mark.parametrize("rows, queries, keys", [(2, 0, 4), (2, 3, 0), (0, 3, 3)])
def test_nothing_sees_nothing_and_gets_zeros(name, rows, queries, keys):
  q, k = jnp.ones((rows, queries, 4, 8)), jnp.ones((rows, keys, 2, 8))
  mask = Mask(jnp.zeros((rows, queries), int), jnp.zeros((rows, keys), int))
  run = lambda q: kernels.attend(name, q, k, k, mask, kernels.Scores(1.0))
  assert run(q).shape == q.shape and not run(q).any()
