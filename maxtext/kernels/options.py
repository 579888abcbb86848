"""How attention is run, as opposed to what it computes: which kernel, in which blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens in a block of the TPU kernel's loops, multiples of 128, and its arrays' layouts.

  `q` and `kv` are those of the forward pass, `_dkv` of the gradient by keys and values, `_dq` of
  that by queries; of a block of keys in memory `compute` are worked on at once, and divide it. A
  `fused_backward` finds all gradients in the loop of `_dkv`.
  """

  q: int = 512
  kv: int = 512
  kv_compute: int = 512
  q_dkv: int = 512
  kv_dkv: int = 512
  kv_dkv_compute: int = 512
  q_dq: int = 512
  kv_dq: int = 512
  fused_backward: bool = False
  q_layout: str = "HEAD_DIM_MINOR"
  k_layout: str = "HEAD_DIM_MINOR"
  v_layout: str = "HEAD_DIM_MINOR"

  def fitted(self, length: int) -> tuple[int, Blocks]:
    """The length to pad `length` tokens to, and blocks that divide it and are no larger."""
    names = [field.name for field in dataclasses.fields(self) if field.type == "int"]
    sides = {name: getattr(self, name) for name in names}
    whole = _up(length, 128)
    padded = _up(length, math.lcm(128, *(side for side in sides.values() if side <= whole)))
    sides = {n: padded if side >= padded else math.gcd(side, padded) for n, side in sides.items()}
    for name in ("kv", "kv_dkv"):
      sides[f"{name}_compute"] = math.gcd(sides[f"{name}_compute"], sides[name])
    return padded, dataclasses.replace(self, **sides)


def _up(length: int, step: int) -> int:
  return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class Options:
  """A kernel's name, the blocks of one that has them, and how a length that is split is attended.

  Without a `context` strategy the compiler moves what a split length needs.
  """

  kernel: str = "autoselected"
  blocks: Blocks = Blocks()
  context: str | None = None

  @classmethod
  def of(cls, kernel: str, setting: Callable[[str, Any], Any]) -> Options:
    """The options that a configuration gives, where `setting(key, default)` looks a key up."""
    blocks = {}
    for field in dataclasses.fields(Blocks):
      block, own = f"sa_block_{field.name}", f"sa_{field.name}"
      key = _KEYS.get(field.name) or (own if field.name.endswith("layout") else block)
      blocks[field.name] = setting(key, field.default)
    return cls(kernel, Blocks(**blocks), setting("context_parallel_strategy", None))


_KEYS = {"fused_backward": "sa_use_fused_bwd_kernel"}
