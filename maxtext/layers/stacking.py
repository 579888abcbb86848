"""`repeat` copies of a stage's blocks: stacked parameters, run by scan or unrolled, rematerialised
by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxtext import sharding
from maxtext.layers import pipeline
from maxtext.layers.blocks import Block
from maxtext.layers.grouped import Pair
from maxtext.layers.params import Compute
from maxtext.layers.routing import Routed
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.layers.sections import Memory, Pipeline
from maxtext.masks import Mask
from maxtext.specs import Stage

Kept = Mapping[str, Pair]  # keys and values by the names that layers keep them under

_QKV = ("query_proj", "key_proj", "value_proj")
SAVED = {  # remat policy -> the tagged activations that the backward pass does not compute again
  "full": (),
  "minimal": (*_QKV, "out_proj", "mlpwi_0", "mlpwi_1", "mlpwo"),
  "minimal_with_context": (*_QKV, "attention_out", "out_proj", "mlpwi_0", "mlpwi_1", "mlpwo"),
  "minimal_flash": (*_QKV, "attention_out", "out_proj", "mlpwi_0", "mlpwi_1", "mlpwo"),
  "save_dot_with_context_except_mlp": (*_QKV, "attention_out", "out_proj"),
  "save_dot_except_mlpwi": (*_QKV, "out_proj", "mlpwo"),
  "save_dot_except_mlp": (*_QKV, "out_proj"),
  "save_qkv_proj": _QKV,
  "save_out_proj": ("out_proj",),
  "qkv_proj_offloaded": _QKV,
  "minimal_offloaded": (*_QKV, "out_proj", "mlpwi_0", "mlpwi_1", "mlpwo"),
}
INPUT = "decoder_layer_input"  # what a layer takes in, tagged: it is always kept
TAGS = {"context": "attention_out"} | {name: name for name in SAVED["minimal"]}


def spared(memory: Memory, place: str | None = None) -> tuple[str, ...]:
  """The tagged activations of a layer that are not computed again: all, or those of a `place`,
  device or offload.
  """
  policy = memory.remat_policy
  if policy == "custom":
    chosen = (place,) if place else ("device", "offload")
    tags = (tag for key, tag in TAGS.items() if getattr(memory, key) in chosen)
    offloaded = memory.decoder_layer_input == "offload" and place != "device"
    return *tags, *([INPUT] if offloaded else [])
  there = "offload" if policy.endswith("_offloaded") else "device"
  return SAVED.get(policy, ()) if place in (None, there) else ()


class Stack(nnx.Module):
  """A stage's blocks with every parameter stacked over a leading axis `layers` of size `repeat`.

  The parameters are the same whether the repeats are scanned or unrolled.
  """

  def __init__(
    self,
    stage: Stage,
    width: int,
    compute: Compute,
    memory: Memory,
    rngs: nnx.Rngs,
    pipeline: Pipeline | None = None,
    layers: str = "layers",
  ):
    self.repeat, self.memory, self.pipeline = stage.repeat, memory, pipeline

    @nnx.split_rngs(splits=stage.repeat)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.List:
      return nnx.List([Block(spec, width, compute, rngs) for spec in stage.blocks])

    self.blocks = build(rngs)
    for _, p in nnx.to_flat_state(nnx.state(self.blocks)):
      p.set_metadata(axes=(layers, *p.get_metadata()["axes"]))

  def __call__(
    self,
    x: jax.Array,
    mask: Mask,
    caches: Any = None,
    key: jax.Array | None = None,
    kept: Kept = MappingProxyType({}),
  ) -> tuple[jax.Array, Any, dict[str, Routed], Kept]:
    """x [b t d] -> [b t d]; `caches` is a tuple with one cache per block, of all its layers, or
    None. What mixtures of experts say of their routing is by the path of the block [l e]. `kept`
    are the keys and values that layers before have kept, and comes back with those of these.

    Caches are carried from layer to layer, not cut and stacked again, so that they are written in
    place.
    """
    graph, weights = nnx.split(self.blocks)
    weights = jax.tree.map(_one_layer, weights, is_leaf=_is_variable)
    keys = None if key is None else jax.random.split(key, self.repeat)
    run, merge = self._run, functools.partial(nnx.merge, graph)
    schedule = self._schedule()
    if caches is None and schedule is not None:

      def layers(weights: Any, x: jax.Array, mask: Mask, keys: Any, pick: Callable) -> Any:
        x, _, said, _ = run(lambda part: merge(pick(part)), weights, x, mask, None, keys, {})
        return x, said

      x, said = pipeline.run(layers, weights, x, mask, keys, schedule)
      return x, None, said, kept
    return run(merge, weights, x, mask, caches, keys, kept)

  def _schedule(self) -> Schedule | None:
    """How the layers go through stages, if the mesh has several and these are to."""
    layout = sharding.active()
    stages = 1 if layout is None else layout.mesh.shape.get(STAGE, 1)
    if stages == 1 or self.pipeline is None:
      return None
    return self.pipeline.schedule(stages, self.repeat, len(self.blocks))

  def _run(
    self,
    merge: Callable,
    weights: Any,
    x: jax.Array,
    mask: Mask,
    caches: Any,
    keys: Any,
    kept: Kept,
  ) -> tuple[jax.Array, Any, dict[str, Routed], Kept]:
    """Layers whose weights and keys are stacked, one after the other; `merge` makes the blocks of
    one of a part of the weights.
    """
    repeat = jax.tree.leaves(weights)[0].shape[0]
    numbers = None if caches is None else jnp.arange(repeat)
    apart = weights if caches is not None and self._schedule() is not None else None

    def body(carry: tuple[jax.Array, Any, Kept], part: Any) -> tuple[Any, dict]:
      (x, caches, own), (weights, layer, key), said = carry, part, {}
      x = checkpoint_name(x, INPUT)
      if apart is not None:
        weights = jax.tree.map(lambda p: pipeline.layer(p, layer), apart, is_leaf=_is_variable)
      for i, block in enumerate(merge(weights)):
        keeps, takes = block.spec.shared
        own = own if keeps is None else {**own, keeps: block.keys_values(x, mask)}
        taken = {**kept, **own}.get(keeps or takes)
        cache = None if caches is None else caches[i].at(layer)
        key_here = None if key is None else jax.random.fold_in(key, i)
        x, cache, routed = block(x, mask, cache, key_here, taken)
        if routed is not None:
          said[f"blocks.{i}"] = routed
        if caches is not None:
          caches = (*caches[:i], cache.at(None), *caches[i + 1 :])
      return (x, caches, own), said

    body = remat(body, self.memory)
    carry, parts = (
      (x, caches, self._begun(x, kept)),
      (weights if apart is None else None, numbers, keys),
    )
    if self.memory.scan_layers:
      (x, caches, own), said = lax.scan(body, carry, parts)
      return x, caches, said, {**kept, **own}
    layers = []
    for part in _unstack(parts, repeat):
      carry, one = body(carry, part)
      layers.append(one)
    x, caches, own = carry
    said = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    return x, caches, said, {**kept, **own}

  def _begun(self, x: jax.Array, kept: Kept) -> Kept:
    """What these layers keep, before any of them has run."""
    own = {block.spec.shared[0]: block.attention for block in self.blocks}
    begun = lambda name: kept.get(name) or own[name].no_keys_values(x.shape[:2])
    return {name: begun(name) for name in own if name is not None}


def _is_variable(value: Any) -> bool:
  return isinstance(value, nnx.Variable)


def _one_layer(p: nnx.Param) -> nnx.Param:
  """The stacked parameter with the axis names that a single layer of it has."""
  p = p.copy()
  p.set_metadata(axes=p.get_metadata()["axes"][1:])
  return p


def remat(body: Callable, memory: Memory) -> Callable:
  """The same function, of which the backward pass computes again what the policy does not keep."""
  if memory.remat_policy == "none":
    return body
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=spared(memory, "device"),
    names_which_can_be_offloaded=spared(memory, "offload"),
    offload_src="device",
    offload_dst="pinned_host",
  )
  return jax.checkpoint(body, policy=policy, prevent_cse=not memory.scan_layers)


def _unstack(tree: Any, repeat: int) -> list[Any]:
  """The layers of a stacked tree; one split per leaf, so that the gradient is one concatenation."""
  leaves, structure = jax.tree.flatten(tree)
  pieces = [lax.split(leaf, (1,) * repeat) if leaf.ndim else None for leaf in leaves]
  return [structure.unflatten([piece[i][0] for piece in pieces]) for i in range(repeat)]
