"""Attention kernels: queries, keys, values and a mask in, values out. Chosen by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maxtext import sharding
from maxtext.errors import ConfigError, closest
from maxtext.kernels.context import attend_split
from maxtext.kernels.held import Held, dense
from maxtext.kernels.options import Blocks as Blocks
from maxtext.kernels.options import Options
from maxtext.kernels.split import Split, by_parts, is_split
from maxtext.log import log
from maxtext.masks import Mask


@dataclasses.dataclass(frozen=True)
class Scores:
  """What happens to q.k before the softmax: times `scale`, then `soft_cap * tanh(x / soft_cap)`.

  `f32_product` computes q.k itself in float32 whatever the inputs are; the softmax always is. A
  share `dropout` of the weights is zeroed, and the rest scaled up, where a kernel is given a seed.
  """

  scale: float
  soft_cap: float | None = None
  f32_product: bool = False
  dropout: float = 0.0


OUT = "attention_out"  # checkpoint_name of all that spares a backward pass the forward one


class Kernel(Protocol):
  """q [b t h k], k [b s g k], v [b s g k], mask over [b t s] -> [b t h k]; h is a multiple of g.

  `sink` [h] is one more score of each head, which takes part in the softmax and has no value;
  `seed` uint32 [2] draws dropout. A kernel tags its result, and what else its gradient needs of the
  forward pass, with the name OUT.
  """

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scores: Scores,
    sink: jax.Array | None = None,
    seed: jax.Array | None = None,
  ) -> jax.Array: ...


Unfit = Callable[..., str | None]

_kernels: dict[str, tuple[Kernel, Unfit]] = {}
_reads_held: set[str] = set()  # kernels that take keys and values as a cache holds them
_tuned: set[str] = set()  # kernels that take blocks
_announced: set[str] = set()


def register(
  name: str, unfit: Unfit = lambda *_: None, reads_held: bool = False, tuned: bool = False
) -> Callable[[Kernel], Kernel]:
  """Register a kernel; `unfit` of the same arguments says why it cannot serve, or None.

  One that `reads_held` is given keys and values of a cache as Held, not gathered from it. A `tuned`
  one is given the keyword `blocks` too.
  """

  def add(kernel: Kernel) -> Kernel:
    _kernels[name] = (kernel, unfit)
    if reads_held:
      _reads_held.add(name)
    if tuned:
      _tuned.add(name)
    return kernel

  return add


def attend(
  how: str | Options,
  q: jax.Array,
  k: jax.Array | Held,
  v: jax.Array | Held,
  mask: Mask,
  scores: Scores,
  sink: jax.Array | None = None,
  seed: jax.Array | None = None,
) -> jax.Array:
  """Run the kernel of that name; 'autoselected' chooses and says so, a named one is obeyed or
  refused. Where the layout in use splits the length, `how.context` says how.

  Raises ConfigError when there is no such kernel, or with the kernel's words why it cannot serve.
  """
  options = Options(how) if isinstance(how, str) else how
  if 0 in (*q.shape[:2], k.shape[1]):  # nobody sees anybody
    return jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype)
  name = options.kernel
  if name != "autoselected" and name not in _kernels:
    known = ", ".join(["autoselected", *_kernels])
    raise ConfigError("attention", f"{name!r} is not a kernel{closest(name, _kernels)} ({known})")
  apart = options.context is not None and is_split(sharding.LENGTH)
  in_parts = mask.cached and is_split(sharding.SLOTS)
  if apart or in_parts or by_parts() or name not in _reads_held:
    k, v = dense(k), dense(v)
  case: Any = (q, k, v, mask.marked(), scores, sink, seed if scores.dropout else None)
  if apart:
    return attend_split(options, functools.partial(attend, options), case)
  if in_parts:
    return cached.attend_cached(name, case)
  if name == "autoselected":
    name = _choose(*case)
  kernel, unfit = _kernels[name]
  if why := unfit(*case):
    raise ConfigError("attention", f"{name!r} cannot serve this layer: {why}; use 'autoselected'")
  tuning: dict[str, Any] = {"blocks": options.blocks} if name in _tuned else {}
  if not by_parts() or name in FAST.get(sharding.platform(), ()):  # which see to it themselves
    return kernel(*case, **tuning)
  split = Split.of(*case[:2])
  assert split is not None
  why = "dropout would be drawn for each part anew" if case[-1] is not None else split.crossed
  if why:
    raise ConfigError("shard_mode", f"'explicit' cannot serve this layer's attention: {why}")
  part = lambda q, k, v, mask, sink: kernel(q, k, v, mask, scores, sink)
  return split.run(part, q, dense(k), dense(v), case[3], sink)


def _choose(q: jax.Array, k: jax.Array, *rest: Any) -> str:
  """The first fit kernel in the order of preference for this shape, said once of each kernel."""
  tiles = q.shape[1] >= FEW and q.shape[1] * k.shape[1] >= LONG.get(
    sharding.platform(), LONG["elsewhere"]
  )
  order = ["blockwise", "dot_product"] if tiles else ["dot_product", "blockwise"]
  if q.shape[1] >= FEW:
    order = [*FAST.get(sharding.platform(), ()), *order]
  passed: list[str] = []
  for name in order:
    if (why := _kernels[name][1](q, k, *rest)) is None:
      if name not in _announced:
        _announced.add(name)
        shape = f"{q.shape[1]} x {k.shape[1]}"
        log.info(f"attention: {name} for queries x keys = {shape}" + "".join(passed))
      return name
    passed.append(f"; not {name}: {why}")
  raise ConfigError("attention", "no kernel can serve this layer" + "".join(passed))


# Queries x keys from which visiting tiles beats one plain product, unless there are few queries:
# on CPU as scripts/benchmark_attention.py measures, elsewhere where scores are worth their memory.
LONG = {"cpu": 128 * 128, "elsewhere": 1024 * 1024}
FEW = 32
FAST = {"tpu": ["flash"], "gpu": ["cudnn_flash"]}  # kernels of the hardware's own, tried first

from maxtext.kernels import (  # noqa: E402, F401  (they register themselves)
  all_gather,
  blockwise,
  cached,
  cudnn,
  dot_product,
  ragged,
  ring,
  splash,
  ulysses,
)
