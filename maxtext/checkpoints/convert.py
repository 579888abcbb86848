"""Models of the Hugging Face hub as functions in Python: `load_hf(path)(tokens)` are logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtext import config as configs
from maxtext import program, sharding
from maxtext.checkpoints.hub.loading import load
from maxtext.checkpoints.hub.model import open_model
from maxtext.config.values import render
from maxtext.layers.merging import Params
from maxtext.masks import Mask
from maxtext.program import Program
from maxtext.serve.engine import Engine
from maxtext.serve.sample import Sampler

Tokens = np.ndarray | jax.Array


class Loaded:
  """A model with its parameters, on the devices of its `program`."""

  def __init__(self, program: Program, params: Params):
    self.program, self.params = program, params

  def __call__(
    self, tokens: Tokens, positions: Tokens | None = None, segments: Tokens | None = None
  ) -> jax.Array:
    """tokens [b t] -> logits [b t v], float32.

    Tokens see those of their own segment, by default all of their row; `positions` count from 0 in
    each run of one segment by default.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
    positions = _counted(segments) if positions is None else jnp.asarray(positions, jnp.int32)
    return self._logits(self.params, tokens, positions, segments)

  def generate(self, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """`length` tokens after each prompt, the likeliest each time, with a cache of keys and values.

    Nothing ends a text before that.
    """
    return self._engine.generate(self.params, [list(map(int, row)) for row in prompts], length)

  @functools.cached_property
  def _logits(self) -> Any:
    def logits(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array):
      with sharding.use(self.program.layout):
        return self.program.plan.merge(params)(tokens, Mask.of(positions, segments))

    return jax.jit(logits)

  @functools.cached_property
  def _engine(self) -> Engine:
    return Engine(
      self.program, Sampler(self.program.config.decode, self.program.spec.vocab), stops=()
    )


def load_hf(path: str, **keys: Any) -> Loaded:
  """The model in a folder of the Hugging Face hub.

  `keys` are those of a configuration, as on the command line: dtype="bfloat16". Without them all is
  computed and kept in float32, on one device of a CPU or on all accelerators. Raises ConfigErrors,
  or CheckpointError for what cannot be read.
  """
  model = open_model(path)
  given = {"dtype": "float32", "weight_dtype": "float32", "dataset_type": "synthetic"} | keys
  positions = model.keys.get("trainable_position_size")
  if positions is not None:
    given = {"max_target_length": positions} | given
  text = lambda value: value if isinstance(value, str) else render(value)
  words = [f"{key}={text(value)}" for key, value in given.items()]
  config = configs.load(words, {}, purpose="decode", model=model.path)
  built = program.build_to_decode(config)
  return Loaded(built, load(model, built.state.params, built.stages))


@jax.jit
def _counted(segments: jax.Array) -> jax.Array:
  """segments [b t] -> positions [b t] that begin with 0 where a segment does."""
  place = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
