"""Tokens from a decoder: all prompts in one call, then one compiled step per token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maxtext import sharding
from maxtext.errors import ConfigError
from maxtext.layers.decoder import Decoder
from maxtext.layers.merging import Params, Plan
from maxtext.masks import Mask
from maxtext.serve.caches import Caches, empty, filled
from maxtext.serve.sample import Sampler
from maxtext.specs import DecoderSpec

Hear = Callable[[int, int], None]

SLOTS = 64  # caches have a multiple of this many slots


class Parts(Protocol):
  """What is needed of a program to generate with it."""

  @property
  def plan(self) -> Plan: ...
  @property
  def layout(self) -> sharding.Layout: ...
  @property
  def spec(self) -> DecoderSpec: ...


class Engine:
  """Continues prompts of token ids, on whatever mesh the program has. Compiled once per bucket of sizes."""

  def __init__(self, parts: Parts, sampler: Sampler, eos: int | None = None):
    """A row ends with `eos`, which is not part of it (None: never before its length)."""
    self.parts, self.sampler, self.eos = parts, sampler, eos

  def generate(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    length: int,
    hear: Hear = lambda row, id: None,
    first_row: int = 0,
  ) -> list[list[int]]:
    """At most `length` new tokens for each prompt; `hear(row, id)` is told of each as it comes.

    What is drawn for a prompt depends on its row's number, which counts from `first_row`, and on no other
    prompt. Raises ConfigError for an empty prompt, and beyond the learned positions.
    """
    self.check(prompts, length)
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for ids in self._ahead(params, self._batch(prompts, first_row), length):
      for row in sorted(open_rows):
        if (id := int(ids[row])) == self.eos:
          open_rows.discard(row)
        else:
          out[row].append(id)
          hear(first_row + row, id)
      if not open_rows:
        break
    return out

  def _ahead(self, params: Params, batch: dict[str, np.ndarray], length: int):
    """The ids [b] of each new position; the device computes the next ones while these are looked at."""
    prompt = batch["tokens"].shape[1]
    slots = -(-(prompt + length - 1) // SLOTS) * SLOTS
    batch = self._place(batch)
    caches, ids, positions = self._begin(params, batch, slots)
    for left in range(length - 1, -1, -1):
      current = ids
      if left:
        caches, ids, positions = self._step(params, caches, ids, positions, batch["rows"])
      yield jax.device_get(current)

  def check(self, prompts: Sequence[Sequence[int]], length: int, where: str = "decode_length") -> None:
    """Raises ConfigError, at the key `where` that `length` comes from, for what generate could not do."""
    limit = self.parts.spec.positions
    for row, prompt in enumerate(prompts):
      if not prompt:
        raise ConfigError("prompt", f"number {row + 1} has no tokens; give at least one")
      if limit and len(prompt) + length > limit:
        raise ConfigError(where, _too_long(len(prompt), length, limit))

  def _batch(self, prompts: Sequence[Sequence[int]], first_row: int) -> dict[str, np.ndarray]:
    """The prompts, padded on the left to a common length and below to rows that the mesh divides."""
    ways = self.parts.layout.batch_ways
    rows = -(-len(prompts) // ways) * ways
    length = bucket(max(map(len, prompts)))
    tokens = np.zeros((rows, length), np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, length - len(prompt) :] = prompt
    lengths = np.array([*map(len, prompts), *[0] * (rows - len(prompts))], np.int32)
    return {"tokens": tokens, "lengths": lengths, "rows": first_row + np.arange(rows, dtype=np.int32)}

  def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    layout = self.parts.layout
    axes = lambda x: ("activation_batch", None)[: x.ndim]
    return {name: jax.device_put(x, layout.sharding(axes(x), x.shape)) for name, x in batch.items()}

  @functools.cached_property
  def _begin(self) -> Callable[..., tuple[Caches, jax.Array, jax.Array]]:
    return jax.jit(self._read, static_argnums=2)

  @functools.cached_property
  def _step(self) -> Callable[..., tuple[Caches, jax.Array, jax.Array]]:
    return jax.jit(self._write, donate_argnums=1)

  def _read(self, params: Params, batch: dict[str, jax.Array], slots: int):
    """The prompts [b t] -> caches, the first new ids [b], their positions [b]."""
    with sharding.use(self.parts.layout):
      model = self.parts.plan.merge(params)
      rows, length = batch["tokens"].shape
      positions = jnp.arange(length) - (length - batch["lengths"][:, None])
      mask = Mask.of(jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32))
      caches = empty(self.parts.spec, rows, slots, model.compute.dtype)
      x, caches = model.hidden(batch["tokens"], mask, caches)
      ids = self._choose(model, x[:, -1:], batch["rows"], batch["lengths"])
      return filled(caches), ids, batch["lengths"]

  def _write(self, params: Params, caches: Caches, ids: jax.Array, positions: jax.Array, rows: jax.Array):
    """The ids [b] at positions [b] -> caches with them, the next ids, their positions."""
    with sharding.use(self.parts.layout):
      model = self.parts.plan.merge(params)
      mask = Mask.of(positions[:, None], jnp.ones_like(positions[:, None]))
      x, caches = model.hidden(ids[:, None], mask, caches)
      return caches, self._choose(model, x, rows, positions + 1), positions + 1

  def _choose(self, model: Decoder, x: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """The last layer of one token a row [b 1 d] -> the ids that follow [b], whole on every device."""
    logits = sharding.constrain(model.logits(x)[:, 0], "activation_batch", None)
    return sharding.constrain(self.sampler(logits, rows, positions), None)


def bucket(length: int) -> int:
  """A length at most a third above `length` (or 16), of which there are few: so few programs are compiled."""
  step = max(16, 1 << max((length - 1).bit_length() - 2, 0))
  return -(-length // step) * step


def _too_long(prompt: int, length: int, limit: int) -> str:
  left = limit - prompt
  advice = f"use at most {left}" if left > 0 else f"use a prompt of fewer than {limit} tokens"
  return f"{prompt} tokens of prompt and {length} new ones are more than the {limit} learned positions; {advice}"
