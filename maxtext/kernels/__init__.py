"""Attention kernels: queries, keys, values and a mask in, values out. Chosen by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from maxtext.errors import ConfigError, closest
from maxtext.log import log
from maxtext.masks import Mask


@dataclasses.dataclass(frozen=True)
class Scores:
  """What happens to q.k before the softmax: times `scale`, then `soft_cap * tanh(x / soft_cap)`.

  `f32_product` computes q.k itself in float32 whatever the inputs are; the softmax always is float32.
  """

  scale: float
  soft_cap: float | None = None
  f32_product: bool = False


class Kernel(Protocol):
  """q [b t h k], k [b s g k], v [b s g k], mask over [b t s] -> [b t h k]; h is a multiple of g."""

  def __call__(
    self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scores: Scores
  ) -> jax.Array: ...


Unfit = Callable[[jax.Array, jax.Array, jax.Array, Mask, Scores], str | None]

_kernels: dict[str, tuple[Kernel, Unfit]] = {}
_order: list[Callable[[jax.Array, jax.Array], tuple[str, ...]]] = []


def register(name: str, unfit: Unfit = lambda *_: None) -> Callable[[Kernel], Kernel]:
  """Register a kernel; `unfit(q, k, v, mask, scores)` says in words why it cannot serve, or None."""

  def add(kernel: Kernel) -> Kernel:
    _kernels[name] = (kernel, unfit)
    return kernel

  return add
