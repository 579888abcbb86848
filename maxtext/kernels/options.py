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
    plain = Blocks()
    blocks = {name: setting(key, getattr(plain, name)) for name, key in KEYS.items()}
    return cls(kernel, Blocks(**blocks), setting(CONTEXT, None))


CONTEXT = "context_parallel_strategy"
KEYS = {  # field of Blocks -> the key that sets it
  "q": "sa_block_q",
  "kv": "sa_block_kv",
  "kv_compute": "sa_block_kv_compute",
  "q_dkv": "sa_block_q_dkv",
  "kv_dkv": "sa_block_kv_dkv",
  "kv_dkv_compute": "sa_block_kv_dkv_compute",
  "q_dq": "sa_block_q_dq",
  "kv_dq": "sa_block_kv_dq",
  "fused_backward": "sa_use_fused_bwd_kernel",
  "q_layout": "sa_q_layout",
  "k_layout": "sa_k_layout",
  "v_layout": "sa_v_layout",
}
