"""Layers of nnx as modules of Linen, with the names of their axes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flax import linen, nnx


def as_linen(layer: type[nnx.Module], options: Mapping[str, Any]) -> linen.Module:
  """`layer` with these keywords, `name` being the module's own.

  Raises TypeError for keywords that are missing or that the layer does not have.
  """
  keywords(layer).bind(**options)
  rest = {key: value for key, value in options.items() if key != "name"}
  return nnx.bridge.to_linen(layer, metadata_fn=_boxed, name=options.get("name"), **rest)


def keywords(layer: type[nnx.Module]) -> inspect.Signature:
  """What a layer is made from but `rngs`, which Linen brings, all by name."""
  given = inspect.signature(layer.__init__).parameters
  by_name = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in given.items()
    if name not in ("self", "rngs")
  ]
  return inspect.Signature(by_name, return_annotation=linen.Module)


def _boxed(variable: nnx.Variable) -> Any:
  """A variable's value as Linen keeps it: a parameter with the names of its axes."""
  axes, value = variable.get_metadata().get("axes"), variable.get_value()
  return value if axes is None else linen.LogicallyPartitioned(value, tuple(axes))
