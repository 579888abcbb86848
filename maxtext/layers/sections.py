"""Settings of the layers: number formats, what the backward pass keeps, the attention kernel."""

from __future__ import annotations

import dataclasses
from typing import Literal

from maxtext.bounds import Whole

Float = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Precision:
  dtype: Float
  weight_dtype: Float
  grad_dtype: Float
  matmul_precision: Literal["default", "high", "highest"]
  float32_qk_product: bool
  logits_dot_in_fp32: bool


@dataclasses.dataclass(frozen=True)
class Memory:
  scan_layers: bool
  remat_policy: Literal[
    "none",
    "full",
    "minimal",
    "minimal_with_context",
    "save_dot_with_context_except_mlp",
    "save_dot_except_mlpwi",
    "save_dot_except_mlp",
    "save_qkv_proj",
    "save_out_proj",
  ]
  num_vocab_tiling: Whole


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Stands here, and not in kernels/, because importing that package imports jax."""

  attention: Literal["autoselected", "dot_product", "blockwise", "ragged"]
