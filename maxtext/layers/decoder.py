"""The decoder: embed, run the stages, normalise, unembed. The only model class there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtext.layers.ahead import Ahead
from maxtext.layers.blocks import drop
from maxtext.layers.norms import make_norm
from maxtext.layers.params import Compute, dot, lookup, param
from maxtext.layers.routing import Routed
from maxtext.layers.sections import Memory, Pipeline
from maxtext.layers.stacking import Stack, remat
from maxtext.masks import Mask
from maxtext.sharding import STREAM, constrain, joined
from maxtext.specs import DecoderSpec


class Decoder(nnx.Module):
  """A decoder-only language model, built from its spec alone."""

  def __init__(
    self,
    spec: DecoderSpec,
    compute: Compute,
    memory: Memory,
    rngs: nnx.Rngs,
    pipeline: Pipeline | None = None,
  ):
    small, dtype = jax.nn.initializers.normal(0.02), compute.weight_dtype
    self.spec, self.compute, self.memory = spec, compute, memory
    self.embedding = param(rngs, small, dtype, vocab=spec.vocab, embed=spec.width)
    self.positions = (
      param(rngs, small, dtype, position=spec.positions, embed=spec.width)
      if spec.positions
      else None
    )
    own = (compute, memory, rngs)
    self.stages = nnx.List(
      Stack(s, spec.width, *own, pipeline)
      if i == spec.longest
      else Stack(s, spec.width, *own, layers="layers_outside_pipeline")
      for i, s in enumerate(spec.stages)
    )
    self.norm = make_norm(spec.norm, spec.width, compute, rngs)
    unembed = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    self.unembedding = (
      None if spec.tied else param(rngs, unembed, dtype, embed=spec.width, vocab=spec.vocab)
    )

    self.mtp = spec.mtp and nnx.List(
      Ahead(spec.mtp.block, spec.norm, spec.width, compute, rngs) for _ in range(spec.mtp.layers)
    )

  def __call__(self, tokens: jax.Array, mask: Mask) -> jax.Array:
    """tokens [b t] -> logits [b t v], float32."""
    return self.logits(self.hidden(tokens, mask)[0])

  def hidden(
    self, tokens: jax.Array, mask: Mask, caches: Any = None, key: jax.Array | None = None
  ) -> tuple[jax.Array, Any, dict[str, Routed]]:
    """tokens [b t] at mask.q_pos -> the normalised last layer [b t d], the caches with the new
    tokens, and what mixtures of experts say of their routing, by the path of the block, each over
    its layers [l e].

    `caches` holds one entry per stage; `key` draws dropout, without it there is none.
    """
    x = self.embed(tokens)
    if self.positions is not None:
      x = constrain(x + lookup(self.positions, mask.q_pos, self.compute.dtype), *STREAM)
    if key is not None:
      x = drop(x, self.spec.stages[0].blocks[0].dropout, jax.random.fold_in(key, len(self.stages)))
    out, routed, kept = [], {}, {}
    for i, stage in enumerate(self.stages):
      cache = None if caches is None else caches[i]
      key_here = None if key is None else jax.random.fold_in(key, i)
      x, cache, said, kept = stage(x, mask, cache, key_here, kept)
      out.append(cache)
      routed |= {f"stages.{i}.{path}": layers for path, layers in said.items()}
    return joined(self.norm(x)), None if caches is None else tuple(out), routed

  def ahead(
    self, x: jax.Array, later: Iterable[jax.Array], mask: Mask, key: jax.Array | None = None
  ) -> Iterator[tuple[jax.Array, dict[str, Routed]]]:
    """The normalised last layer [b t d] -> that of each block of multi-token prediction, and what
    its experts say, as `hidden`.

    `later` are the tokens [b t] that stand one, two ... after each token; block k predicts the one
    after the k-th. At a document's end they may be any.
    """
    for i, (block, tokens) in enumerate(zip(self.mtp or (), later)):
      graph, weights = nnx.split(block)

      def run(weights: Any, x: jax.Array, seen: jax.Array, key: Any, graph: Any = graph) -> Any:
        return nnx.merge(graph, weights).ahead(x, seen, mask, key)

      own = None if key is None else jax.random.fold_in(key, len(self.stages) + 1 + i)
      x, out, routed = remat(run, self.memory)(weights, x, self.embed(tokens), own)
      yield out, {} if routed is None else {f"mtp.{i}": jax.tree.map(lambda a: a[None], routed)}

  def embed(self, tokens: jax.Array) -> jax.Array:
    """tokens [b t] -> their scaled embeddings [b t d]."""
    x = lookup(self.embedding, tokens, self.compute.dtype)
    factor = self.spec.embed_scale * (self.spec.width**0.5 if self.spec.embed_sqrt_width else 1)
    x = x if factor == 1 else x * jnp.asarray(factor, x.dtype)
    return constrain(x, *STREAM)

  def head(self) -> tuple[str, nnx.Param]:
    """The einsum and the parameter that take [b t d] to logits [b t v]."""
    if self.unembedding is None:
      return "btd,vd->btv", self.embedding
    return "btd,dv->btv", self.unembedding

  def logits(self, x: jax.Array) -> jax.Array:
    """The normalised last layer [b t d] -> logits [b t v], float32."""
    equation, p = self.head()
    x = x.astype(jnp.float32) if self.compute.f32_logits else x
    logits = self.finish(dot(equation, x, p, self.compute).astype(jnp.float32))
    return constrain(logits, "activation_batch", "activation_length", "activation_vocab")

  def finish(self, logits: jax.Array) -> jax.Array:
    """Products with the unembedding -> logits, scaled and capped."""
    scale = self.spec.logit_scale
    return soft_cap(logits if scale == 1 else logits * scale, self.spec.final_soft_cap)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), or x where there is no cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)
