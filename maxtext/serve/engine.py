"""Tokens from a decoder: all prompts in one call, then one compiled step per token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maxtext import sharding
from maxtext.caches import Caches, Storage, empty, filled, placed
from maxtext.errors import ConfigError
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Params, Plan
from maxtext.masks import Mask
from maxtext.serve.sample import Sampler
from maxtext.specs import CacheQuantSpec, DecoderSpec

Hear = Callable[[int, int], None]
Columns = dict[str, Any]  # tokens [b t], lengths [b], rows [b]: arrays or their shapes
Held = tuple[Caches, Any, Any]  # caches, ids [b], positions [b]: arrays or their shapes

SLOTS = 64  # caches have a multiple of this many slots


class Parts(Protocol):
  """What is needed of a program to generate with it."""

  @property
  def plan(self) -> Plan: ...
  @property
  def layout(self) -> sharding.Layout: ...
  @property
  def spec(self) -> DecoderSpec: ...


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a program is compiled for: rows of `prompt` tokens, and caches of `slots` tokens."""

  rows: int
  prompt: int
  slots: int


class Engine:
  """Continues prompts of token ids, on whatever mesh the program has."""

  def __init__(
    self,
    parts: Parts,
    sampler: Sampler,
    stops: Collection[int] = (),
    quant: CacheQuantSpec | None = None,
  ):
    """A row ends with any of `stops`, which is not part of it (none: never before its length);
    `quant`: in how many bits keys and values are kept.
    """
    self.parts, self.sampler, self.stops, self.quant = parts, sampler, stops, quant
    self.layout = parts.layout.with_whole_lengths()
    self._compiled: dict[Sizes, tuple[Callable, ...]] = {}

  def generate(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    length: int,
    hear: Hear = lambda row, id: None,
    first_row: int = 0,
  ) -> list[list[int]]:
    """At most `length` new tokens for each prompt; `hear(row, id)` is told of each as it comes.

    What is drawn for a prompt depends on its row's number, which counts from `first_row`, and on no
    other prompt. Raises ConfigError for an empty prompt, and beyond the learned positions.
    """
    self.check(prompts, length)
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for ids in self._ahead(params, prompts, length, first_row):
      for row in sorted(open_rows):
        if (id := int(ids[row])) in self.stops:
          open_rows.discard(row)
        else:
          out[row].append(id)
          hear(first_row + row, id)
      if not open_rows:
        break
    return out

  def compile(self, params: Params, prompts: Sequence[Sequence[int]], length: int) -> Sizes:
    """Compile what such prompts need, once; of `params`, shapes and shardings are enough."""
    sizes = self._sizes(prompts, length)
    if sizes not in self._compiled:
      shapes = {name: _shape(p, p.sharding) for name, p in params.items()}
      batch = self._shapes(sizes)
      begin = jax.jit(self._begin, static_argnums=2)
      held = self._held(jax.eval_shape(lambda *args: begin(*args, sizes.slots), shapes, batch))
      places = jax.tree.map(lambda s: s.sharding, held)
      begin = jax.jit(self._begin, static_argnums=2, out_shardings=places)
      step = jax.jit(self._step, donate_argnums=1, out_shardings=places)
      if any(x.dtype == jnp.int4 for x in jax.tree.leaves(held)):
        # compiled ahead, JAX on CPU takes what it has made of these to be of another layout
        self._compiled[sizes] = (lambda *args: begin(*args, sizes.slots)), step
        return sizes
      lowered = [
        begin.lower(shapes, batch, sizes.slots),
        step.lower(shapes, *held, batch["rows"]),
      ]
      with ThreadPoolExecutor(2) as threads:
        self._compiled[sizes] = tuple(threads.map(lambda low: low.compile(), lowered))
    return sizes

  def _held(self, shapes: Held) -> Held:
    """What goes from step to step, with its places: the ids whole on every device, since every
    process looks at all of them.
    """
    layout, (caches, ids, positions) = self.layout, shapes
    place = lambda x, *axes: _shape(x, layout.sharding(axes, x.shape))
    return placed(caches, layout), place(ids, None), place(positions, "activation_batch")

  def _ahead(self, params: Params, prompts: Sequence[Sequence[int]], length: int, first_row: int):
    """The ids [b] at each new position; the device is a token ahead of whoever looks at them."""
    sizes = self.compile(params, prompts, length)
    begin, step = self._compiled[sizes]
    batch = self._batch(sizes, prompts, first_row)
    caches, ids, positions = begin(params, batch)
    for left in range(length - 1, -1, -1):
      current = ids
      if left:
        caches, ids, positions = step(params, caches, ids, positions, batch["rows"])
      yield jax.device_get(current)

  def check(
    self, prompts: Sequence[Sequence[int]], length: int, where: str = "decode_length"
  ) -> int:
    """The most tokens that a row will have.

    Raises ConfigError, at the key `where` that `length` comes from, for what generate could not do.
    """
    limit = self.parts.spec.positions
    for row, prompt in enumerate(prompts):
      if not prompt:
        raise ConfigError("prompt", f"number {row + 1} has no tokens; give at least one")
      if limit and len(prompt) + length > limit:
        raise ConfigError(where, _too_long(len(prompt), length, limit))
    return max(map(len, prompts)) + length

  def _sizes(self, prompts: Sequence[Sequence[int]], length: int) -> Sizes:
    ways = self.layout.batch_ways
    prompt = bucket(max(map(len, prompts)))
    unit = math.lcm(SLOTS, self.layout.ways(sharding.SLOTS))
    rows, slots = -(-len(prompts) // ways) * ways, -(-(prompt + length - 1) // unit) * unit
    return Sizes(rows, prompt, slots)

  def _shapes(self, sizes: Sizes) -> Columns:
    shapes = {"tokens": (sizes.rows, sizes.prompt), "lengths": (sizes.rows,), "rows": (sizes.rows,)}
    axes = ("activation_batch", None)
    place = lambda shape: self.layout.sharding(axes[: len(shape)], shape, "the prompts")
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place(shape))
    return {name: struct(shape) for name, shape in shapes.items()}

  def _batch(self, sizes: Sizes, prompts: Sequence[Sequence[int]], first_row: int) -> Columns:
    """The prompts, padded on the left to one length, and below to rows that the mesh divides."""
    tokens, lengths = np.zeros((sizes.rows, sizes.prompt), np.int32), np.zeros(sizes.rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, sizes.prompt - len(prompt) :] = prompt
      lengths[row] = len(prompt)
    rows = first_row + np.arange(sizes.rows, dtype=np.int32)
    arrays = {"tokens": tokens, "lengths": lengths, "rows": rows}
    shapes = self._shapes(sizes)
    place = lambda x, shape: jax.make_array_from_callback(x.shape, shape.sharding, x.__getitem__)
    return {name: place(x, shapes[name]) for name, x in arrays.items()}

  def _begin(self, params: Params, batch: Columns, slots: int) -> Held:
    """The prompts [b t] -> caches, the first new ids [b], their positions [b]."""
    with sharding.use(self.layout):
      model = self.parts.plan.merge(params)
      rows, length = batch["tokens"].shape
      positions = jnp.arange(length) - (length - batch["lengths"][:, None])
      mask = Mask.of(jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32))
      storage = Storage(model.compute.dtype, self.quant)
      caches = empty(self.parts.spec, rows, slots, storage)
      x, caches, _ = model.hidden(batch["tokens"], mask, caches)
      return filled(caches), *self._choose(model, x[:, -1:], batch["rows"], batch["lengths"])

  def _step(
    self, params: Params, caches: Caches, ids: jax.Array, positions: jax.Array, rows: jax.Array
  ) -> Held:
    """The ids [b] at positions [b] -> caches with them, the next ids, their positions."""
    with sharding.use(self.layout):
      model = self.parts.plan.merge(params)
      mask = Mask.of(positions[:, None], jnp.ones_like(positions[:, None]))
      x, caches, _ = model.hidden(ids[:, None], mask, caches)
      return caches, *self._choose(model, x, rows, positions + 1)

  def _choose(
    self, model: Decoder, x: jax.Array, rows: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The last layer of one token a row [b 1 d] -> the ids that follow [b], at `positions` [b]."""
    logits = sharding.constrain(model.logits(x)[:, 0], "activation_batch", None)
    return self.sampler(logits, rows, positions), positions


def _shape(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def bucket(length: int) -> int:
  """The next of a few lengths, four in each octave from 64 on: so few programs are compiled."""
  step = max(16, 1 << max((length - 1).bit_length() - 3, 0))
  return -(-length // step) * step


def _too_long(prompt: int, length: int, limit: int) -> str:
  left = limit - prompt
  advice = f"use at most {left}" if left > 0 else f"use a prompt of fewer than {limit} tokens"
  whole = f"{prompt} tokens of prompt and {length} new ones"
  return f"{whole} are more than the {limit} learned positions; {advice}"
