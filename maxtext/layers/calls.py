"""What a call of the published attention layer is given: checked at its door, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxtext.caches import PromptCache
from maxtext.errors import ConfigError
from maxtext.masks import Mask


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Queries' tokens by their marks: positions [B, T] or [B, T, 3], segment ids and marks of both
  ways [B, T]; None where a caller gives none.
  """

  positions: jax.Array | None
  segments: jax.Array | None
  both_ways: jax.Array | None

  def check(self, rows: int, length: int, axes: bool) -> Tokens:
    """The same, positions being of all rows, and all numbers signed. `axes`: they may be on three.

    Raises ConfigError for other shapes, and for kinds of numbers that cannot be meant.
    """
    shape = (rows, length)
    positions, known = self.positions, [shape] + [(*shape, 3)] * axes
    if positions is not None and positions.shape[:1] == (1,):
      positions = jnp.broadcast_to(positions, (rows, *positions.shape[1:]))
    for name, marks, shapes, kind in (
      ("inputs_positions", positions, known, jnp.integer),
      ("decoder_segment_ids", self.segments, [shape], jnp.integer),
      ("bidirectional_mask", self.both_ways, [shape], jnp.bool_),
    ):
      if marks is not None and marks.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ConfigError(name, f"has shape {marks.shape}; these inputs need {wanted}")
      if marks is not None and not jnp.issubdtype(marks.dtype, kind):
        wanted = "booleans" if kind is jnp.bool_ else "whole numbers"
        raise ConfigError(name, f"is of {marks.dtype}; give {wanted}")
    signed = lambda x: None if x is None else x.astype(jnp.int32)
    return Tokens(signed(positions), signed(self.segments), self.both_ways)

  @property
  def several(self) -> jax.Array | None:
    """The positions, if they are on three axes."""
    return None if self.positions is None or self.positions.ndim == 2 else self.positions

  def mask(self, lengths: tuple[int, int], rows: int, start: jax.Array | int) -> Mask:
    """Who may see whom, of inputs of such lengths, the second that of what keys are made from.

    Positions that are not given count from `start`; of those on three axes, none is the order.
    """
    order = lambda length: start + jnp.broadcast_to(jnp.arange(length), (rows, length))
    plain = self.positions is None or self.positions.ndim == 3
    q_pos = order(lengths[0]) if plain else self.positions
    if lengths[0] == lengths[1]:
      return Mask.of(q_pos, self.segments, self._runs(start), ordered=self.positions is None)
    for name, marks in (
      ("decoder_segment_ids", self.segments),
      ("bidirectional_mask", self.both_ways),
      ("inputs_positions", self.several),
    ):
      if marks is not None:
        raise ConfigError(name, "is of one sequence; inputs_kv has another length")
    return Mask(q_pos, order(lengths[1]))

  def _runs(self, start: jax.Array | int) -> jax.Array | None:
    """[B, T]: a number of the run of True that a token is in, or 0.

    It is the place of the first one, so that runs of a prompt's parts have numbers of their own.
    """
    if (marked := self.both_ways) is None:
      return None
    begins = marked & ~jnp.pad(marked, [(0, 0), (1, 0)])[:, :-1]
    real = jnp.ones(marked.shape, bool) if self.segments is None else self.segments != 0
    place = start + jnp.cumsum(real, axis=1)
    return jnp.where(marked, lax.cummax(jnp.where(begins, place, 0), axis=1), 0)


def check_inputs(inputs: dict[str, jax.Array], widths: tuple[int, int]) -> None:
  """Raises ConfigError for inputs_q, inputs_kv that are not [B, T, E] of these widths, or that are
  not of as many rows.
  """
  for (name, x), width in zip(inputs.items(), widths):
    if x.ndim != 3 or x.shape[-1] != width:
      problem = f"has shape {x.shape}, but the layer was made for (batch, length, {width})"
      raise ConfigError(name, f"{problem}, as {name}_shape says")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ConfigError(name, f"is of {x.dtype}; give floating-point numbers")
  rows = [x.shape[0] for x in inputs.values()]
  if rows[0] != rows[1]:
    raise ConfigError("inputs_kv", f"has {rows[1]} rows, but inputs_q has {rows[0]}")


def check_cached(mode: str, cached: dict[str, Any], serving: bool, pages: dict[str, Any]) -> None:
  """Raises ConfigError for what a call in this mode would ignore.

  `cached` are previous_chunk and slot, `pages` kv_cache and attention_metadata of one `serving`.
  """
  without = {"train": ("previous_chunk", "slot"), "autoregressive": ("previous_chunk",)}
  for name in without.get(mode, ()):
    if cached[name] is not None:
      raise ConfigError(name, f"means nothing in model_mode={mode!r}; leave it out")
  for name, given in pages.items():
    if given is not None and (not serving or mode == "train"):
      wanted = "a layer with attention_kernel='vllm_rpa', in a mode with a cache"
      raise ConfigError(name, f"is for {wanted}; this one keeps its own")


def check_slot(slot: Any, rows: int) -> None:
  """Raises ConfigError for a number, known while tracing, that no row has."""
  known = slot is None or isinstance(slot, jax.core.Tracer)
  if not known and not 0 <= int(slot) < rows:
    raise ConfigError("slot", f"{slot} is none of the rows 0 to {rows - 1} of the cache")


def written(cache: Any) -> jax.Array | int:
  """How many tokens a layer's cache has been given: of each row [B 1], or of all."""
  if isinstance(cache, PromptCache):
    return cache.prompt.written[0] + cache.generated.written[0]
  return cache.written[0][:, None]


def rows(cache: Any) -> int:
  """For how many rows a layer's cache is."""
  return cache.prompt.store.rows if isinstance(cache, PromptCache) else cache.written.shape[1]


def held_all(cache: Any, out: jax.Array) -> jax.Array:
  """out [B, ...], if the cache has had a slot for every token; numbers that are none otherwise.

  Raises ConfigError where that can be known: outside of compiled programs.
  """
  over = cache.over[0]
  if not isinstance(over, jax.core.Tracer):
    if over.any():
      raise ConfigError(
        "max_target_length",
        "the cache has no slot left for a token; raise it, or for the prompt's part "
        "max_prefill_predict_length",
      )
    return out
  return jnp.where(over.reshape(-1, *[1] * (out.ndim - 1)), jnp.nan, out)
