"""Rotary position embedding (Su et al. 2021), from true positions.

Frequencies are computed from the spec in float64 while tracing; angles, sines and the rotation are
float32 always, whatever the activations are.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from maxtext.specs import (
  GridRopeSpec,
  LongScaling,
  NtkScaling,
  RopeSpec,
  SectionsSpec,
  WavelengthScaling,
  YarnScaling,
)


def rotate(x: jax.Array, positions: jax.Array, spec: RopeSpec) -> jax.Array:
  """x [b t h k], positions [b t] or [b t 3] -> [b t h k]: the channels that turn, turned by their
  angles; those beyond pass unchanged.
  """
  angle = angles(positions, x.shape[-1], spec)
  return _turned(x, angle[:, :, None], spec.interleave, attention_factor(spec))


def rotate_grid(x: jax.Array, spec: GridRopeSpec) -> jax.Array:
  """x [b t h k] -> [b t h k]: patches of an image, t = height x width (+ 1), turned by column and
  row.
  """
  tokens = spec.height * spec.width + spec.class_token
  if x.shape[1] != tokens or x.shape[-1] % 4:
    raise ValueError(f"{x.shape} is not [b {tokens} h k] with k a multiple of 4")
  angle = jnp.asarray(_grid_angles(x.shape[-1], spec), jnp.float32)
  return _turned(x, angle[:, None], spec.interleave, 1.0)


def angles(positions: jax.Array, head_dim: int, spec: RopeSpec) -> jax.Array:
  """positions [b t] or [b t 3] -> [b t i] float32: how far each pair turns, in radians.

  Where the spec has sections, [b t] stands for the same position on every axis, as text has it.
  """
  if positions.ndim == 3 and spec.sections is None:
    raise ValueError("positions on three axes need sections, which say what turns by which axis")
  by_pair = positions[..., None]
  if positions.ndim == 3 and spec.sections is not None:
    by_pair = positions[..., _axes(spec.sections)]
  return by_pair.astype(jnp.float32) * _turns(positions, head_dim, spec)


def _turns(positions: jax.Array, head_dim: int, spec: RopeSpec) -> jax.Array:
  """positions [b t] -> [i] or, where lengths of documents count, [b t i] float32: frequencies."""
  scaling, plain = spec.scaling, jnp.asarray(frequencies(head_dim, spec), jnp.float32)
  if not isinstance(scaling, NtkScaling | LongScaling) or scaling.length is not None:
    return plain
  lengths = _lengths(positions)[..., None]
  if isinstance(scaling, LongScaling):
    beyond = dataclasses.replace(scaling, length=scaling.original_length + 1)
    slowed = frequencies(head_dim, dataclasses.replace(spec, scaling=beyond))
    return jnp.where(lengths > scaling.original_length, jnp.asarray(slowed, jnp.float32), plain)
  over = jnp.maximum(lengths.astype(jnp.float32) / scaling.original_length, 1)
  pair = np.arange(len(plain), dtype=np.float32)
  return plain * (scaling.factor * over - (scaling.factor - 1)) ** (-pair / (len(plain) - 1))


def _lengths(positions: jax.Array) -> jax.Array:
  """positions [b t] -> [b t]: the tokens of each token's document, up to the last one here.

  A document ends where the next token's position is not one more.
  """
  last = positions.shape[1] - 1
  goes_on = positions[:, 1:] == positions[:, :-1] + 1
  ends = jnp.where(jnp.pad(goes_on, ((0, 0), (0, 1))), last, jnp.arange(last + 1))
  ends = jax.lax.cummin(ends, axis=1, reverse=True)
  return jnp.take_along_axis(positions, ends, axis=1) + 1


def frequencies(head_dim: int, spec: RopeSpec) -> np.ndarray:
  """-> [i] float64: the radians by which each pair turns from a token to the next.

  A scaling that goes by documents has those of a short one.
  """
  pairs = spec.turning(head_dim) // 2
  plain = _plain(pairs, spec.min_timescale, spec.max_timescale)
  match spec.scaling:
    case WavelengthScaling() as scaling:
      return _by_wavelength(plain, scaling)
    case YarnScaling() as scaling:
      return _by_ramp(plain, spec, scaling)
    case NtkScaling() as scaling:
      length = scaling.length or scaling.original_length
      stretch = scaling.factor * max(length / scaling.original_length, 1)
      slowest = (stretch - scaling.factor + 1) ** (pairs / (pairs - 1)) * spec.max_timescale
      return _plain(pairs, spec.min_timescale, slowest)
    case LongScaling() as scaling:
      beyond = (scaling.length or 0) > scaling.original_length
      return plain / np.asarray(scaling.long if beyond else scaling.short)
  if spec.proportional:
    plain[int(spec.fraction * head_dim // 2) :] = 0
  return plain / spec.factor


def attention_factor(spec: RopeSpec) -> float:
  """What multiplies cos and sin, and so the length of every query and key that turns."""
  if isinstance(spec.scaling, YarnScaling) and spec.scaling.attention_factor is None:
    return mscale(spec.scaling.factor)
  if isinstance(spec.scaling, YarnScaling | LongScaling):
    return spec.scaling.attention_factor
  return 1.0


def mscale(factor: float, weight: float = 1.0) -> float:
  """0.1 * weight * ln(factor) + 1: YaRN's sharpening of attention in a stretched context.

  It multiplies cos and sin, or its square the scale of the scores: the two differ where a part of
  the channels does not turn.
  """
  return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _plain(pairs: int, fastest: float, slowest: float) -> np.ndarray:
  return 1 / (fastest * (slowest / fastest) ** (np.arange(pairs) / pairs))


def _by_wavelength(plain: np.ndarray, scaling: WavelengthScaling) -> np.ndarray:
  turns = scaling.original_length * plain / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
  return plain * (kept + (1 - kept) / scaling.factor)


def _by_ramp(plain: np.ndarray, spec: RopeSpec, scaling: YarnScaling) -> np.ndarray:
  pairs, spread = len(plain), math.log(spec.max_timescale / spec.min_timescale)

  def pair(turns: float) -> float:
    """The pair, a broken number, that turns so often in the original length."""
    timescale = scaling.original_length / (turns * 2 * math.pi)
    return pairs * math.log(timescale / spec.min_timescale) / spread

  low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * pairs - 1)
  slowed = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)
  return plain * (1 - slowed) + plain / scaling.factor * slowed


def _axes(sections: SectionsSpec) -> np.ndarray:
  """-> [i]: the axis that each pair turns by."""
  if not sections.interleaved:
    return np.repeat(np.arange(3), sections.sizes)
  axes = np.zeros(sum(sections.sizes), int)
  for axis in (1, 2):
    axes[axis : 3 * sections.sizes[axis] : 3] = axis
  return axes


def _grid_angles(head_dim: int, spec: GridRopeSpec) -> np.ndarray:
  """-> [t i] float64."""
  rows, columns = np.indices((spec.height, spec.width)) + int(spec.class_token)
  places = [rows, columns] if spec.rows_first else [columns, rows]
  turns = _plain(head_dim // 4, 1.0, spec.max_timescale)
  angle = np.concatenate([np.outer(place, turns) for place in places], axis=-1)
  return np.pad(angle, ((0, int(spec.class_token)), (0, 0)))


def _turned(x: jax.Array, angle: jax.Array, interleave: bool, factor: float) -> jax.Array:
  """x [b t h k], angle [... t 1 i] -> [b t h k]: the first 2 i channels turn, in float32."""
  dim = 2 * angle.shape[-1]
  cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
  turning, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
  if interleave:
    a, b = turning[..., 0::2], turning[..., 1::2]
  else:
    a, b = jnp.split(turning, 2, axis=-1)
  pair = (a * cos - b * sin, b * cos + a * sin)
  if interleave:
    turned = jnp.stack(pair, axis=-1).reshape(turning.shape)
  else:
    turned = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
