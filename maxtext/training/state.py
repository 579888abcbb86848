"""All that a checkpoint holds of a run, and its names."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """`step` counts finished steps [], `params` by dotted path, `opt_state` is the optimizer's own tree."""

  step: jax.Array
  params: Params
  opt_state: Any


def flatten(state: Any) -> dict[str, Any]:
  """Every array of a state (or of a tree like it) by name, e.g. 'params/norm.scale'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {"/".join(map(_name, path)): leaf for path, leaf in leaves}


def unflatten(like: Any, arrays: dict[str, Any]) -> Any:
  """The tree that is shaped like `like`, with these arrays by name."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  return structure.unflatten([arrays["/".join(map(_name, path))] for path, _ in leaves])


def _name(key: Any) -> str:
  for attribute in ("name", "key", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  raise TypeError(f"no name for {key!r}")


def place_like(tree: Any, params: dict[str, jax.sharding.Sharding], rest: jax.sharding.Sharding) -> Any:
  """Shardings for an abstract state: what is kept per parameter stands where the parameter stands.

  An array belongs to a parameter when its path ends in the parameter's name; all else stands at `rest`.
  """

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    last = _name(path[-1]) if path else ""
    return params[last] if last in params and np.ndim(leaf) else rest

  return jax.tree_util.tree_map_with_path(place, tree)
