"""A decoder apart: its graph, and its parameters as one flat dict by dotted path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from maxtext.layers.decoder import Decoder
from maxtext.sharding import Declared

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A model without its parameters: `build` draws them, `merge` puts any such arrays in."""

  build: Callable[[nnx.Rngs], Decoder]
  graph: Any
  variables: dict[tuple, nnx.Variable]

  @classmethod
  def of(cls, build: Callable[[nnx.Rngs], Decoder]) -> Plan:
    """The plan of what `build` makes; nothing is computed and no memory is used."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return cls(build, graph, dict(nnx.to_flat_state(state)))

  @property
  def declared(self) -> dict[str, Declared]:
    """Every parameter's shape, dtype and axis names, by dotted path."""
    return {
      _dotted(path): Declared(v.shape, v.dtype, v.get_metadata()["axes"])
      for path, v in self.variables.items()
    }

  def merge(self, params: Params) -> Decoder:
    """The model with these parameters."""
    flat = [(path, v.replace(params[_dotted(path)])) for path, v in self.variables.items()]
    return nnx.merge(self.graph, nnx.from_flat_state(flat))


def parameters(model: Decoder) -> Params:
  """A model's parameters by dotted path."""
  return {_dotted(path): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}


def _dotted(path: tuple) -> str:
  return ".".join(map(str, path))
