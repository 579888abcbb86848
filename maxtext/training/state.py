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
  """`step` counts finished steps [], `params` by dotted path, `opt_state` is the optimizer's own
  tree, `history` what a guard knows of the last steps.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  history: jax.Array | None = None


def tree(state: Any) -> dict[str, Any]:
  """A state as nested dicts with plain names, as a checkpoint holds it: 'params', 'norm.scale'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  nested: dict[str, Any] = {}
  for path, leaf in leaves:
    *parents, last = map(_name, path)
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return nested


def from_tree(like: Any, nested: dict[str, Any]) -> Any:
  """The state that is shaped like `like`, from the nested dicts of `tree`; a history that is not
  among them, or has another length, begins anew.
  """
  history = getattr(like, "history", None)
  if history is not None and "history" not in nested:
    unknown = np.full(history.shape, np.nan, history.dtype)
    nested = nested | {"history": jax.device_put(unknown, history.sharding)}
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)

  def find(path: tuple) -> Any:
    place = nested
    for key in path:
      place = place[_name(key)]
    return place

  return structure.unflatten([find(path) for path, _ in leaves])


def _name(key: Any) -> str:
  for attribute in ("name", "key", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  raise TypeError(f"no name for {key!r}")


def place_like(
  tree: Any, params: dict[str, jax.sharding.Sharding], rest: jax.sharding.Sharding
) -> Any:
  """Shardings for an abstract state: what is kept per parameter stands where the parameter stands.

  An array belongs to a parameter when its path ends in the parameter's name; all else stands at
  `rest`.
  """

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    last = _name(path[-1]) if path else ""
    return params[last] if last in params and np.ndim(leaf) else rest

  return jax.tree_util.tree_map_with_path(place, tree)
