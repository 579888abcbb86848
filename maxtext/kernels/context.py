"""Attention where the length is split over devices: a kernel around a kernel, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from maxtext.errors import ConfigError, closest
from maxtext.kernels.options import Options
from maxtext.kernels.split import Split
from maxtext.masks import Mask

Inner = Callable[..., jax.Array]
Unfit = Callable[..., str | None]


class Strategy(Protocol):
  """As a kernel, on one device's part: q [b t h k], k, v [b s g k], mask over them -> [b t h k].

  `axes` are the mesh axes that split t and s; `inner` is the kernel for what one device attends.
  """

  def __call__(
    self,
    inner: Inner,
    axes: tuple[str, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scores: Any,
    sink: jax.Array | None,
    /,
  ) -> jax.Array: ...


_strategies: dict[str, tuple[Strategy, Unfit]] = {}


def strategy(name: str, unfit: Unfit = lambda *_: None) -> Callable[[Strategy], Strategy]:
  """Register a strategy; unfit(options, split, q, k) of whole arrays says why it cannot serve."""

  def add(run: Strategy) -> Strategy:
    _strategies[name] = (run, unfit)
    return run

  return add


def balanced_order(length: int, parts: int) -> np.ndarray:
  """The tokens of a row in the order in which part i of `parts` has the chunks i and
  2 parts - 1 - i of it: of a causal row, all parts see as many keys.

  The length is a multiple of 2 parts.
  """
  chunks = np.arange(length).reshape(2 * parts, -1)
  return np.concatenate([np.r_[chunks[i], chunks[-1 - i]] for i in range(parts)])


def attend_split(options: Options, inner: Inner, case: tuple) -> jax.Array:
  """The case (q, k, v, mask, scores, sink, seed) of a split length, by the strategy of `options`.

  Raises ConfigError when there is none of that name, or with its words why it cannot serve.
  """
  name = options.context or ""
  if name not in _strategies:
    problem = f"{name!r} is not a strategy{closest(name, _strategies)} ({', '.join(_strategies)})"
    raise ConfigError("context_parallel_strategy", problem)
  q, k, v, mask, scores, sink, seed = case
  run, unfit = _strategies[name]
  split = Split.of(q, k)
  assert split is not None
  why = split.crossed or unfit(options, split, q, k)
  if seed is not None:
    why = "dropout of attention weights would be drawn anew on each part of the length"
  if why:
    raise ConfigError("context_parallel_strategy", f"{name!r} cannot serve this layer: {why}")

  def part(q, k, v, mask, sink):
    return run(inner, split.length, q, k, v, mask, scores, sink)

  return split.run(part, q, k, v, mask, sink)
