"""Settings of the layers: number formats, what the backward pass keeps, the attention kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from maxtext.bounds import LARGEST, Bound, Whole
from maxtext.layers.schedule import Schedule

Float = Literal["float32", "bfloat16"]
Side = Annotated[int, Bound(128, LARGEST)]
Layers = Annotated[int, Bound(1, LARGEST, special=-1)]
Keep = Literal["remat", "device", "offload"]
TensorLayout = Literal["HEAD_DIM_MINOR", "SEQ_MINOR"]


@dataclasses.dataclass(frozen=True)
class Precision:
  dtype: Float
  weight_dtype: Float
  grad_dtype: Float
  matmul_precision: Literal["default", "high", "highest"]
  float32_qk_product: bool
  logits_dot_in_fp32: bool
  float32_gate_logits: bool


@dataclasses.dataclass(frozen=True)
class Memory:
  scan_layers: bool
  remat_policy: Literal[
    "none",
    "full",
    "minimal",
    "minimal_with_context",
    "minimal_flash",
    "save_dot_with_context_except_mlp",
    "save_dot_except_mlpwi",
    "save_dot_except_mlp",
    "save_qkv_proj",
    "save_out_proj",
    "qkv_proj_offloaded",
    "minimal_offloaded",
    "custom",
  ]
  decoder_layer_input: Literal["device", "offload"]
  query_proj: Keep
  key_proj: Keep
  value_proj: Keep
  context: Keep
  out_proj: Keep
  mlpwi_0: Keep
  mlpwi_1: Keep
  mlpwo: Keep
  num_vocab_tiling: Whole

  @property
  def offloads(self) -> bool:
    """Whether activations are kept in the hosts' memory."""
    if self.remat_policy == "custom":
      return "offload" in vars(self).values()
    return self.remat_policy.endswith("_offloaded")


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How the layers of a decoder go through the stages that a mesh may have."""

  num_layers_per_pipeline_stage: Layers
  num_pipeline_repeats: Layers
  num_pipeline_microbatches: Layers
  pipeline_parallel_layers: Layers
  pipeline_delay_activation_forwarding: bool

  def schedule(self, stages: int, copies: int, cycle: int) -> Schedule:
    """For a stack of so many copies of a cycle of layers."""
    hop = 2 if self.pipeline_delay_activation_forwarding else 1
    microbatches, repeats = self.num_pipeline_microbatches, self.repeats(stages, copies * cycle)
    return Schedule(
      stages=stages,
      repeats=repeats,
      layers=copies // (stages * repeats),
      microbatches=stages * hop if microbatches == -1 else microbatches,
      hop=hop,
    )

  def repeats(self, stages: int, layers: int) -> int:
    """How often rows go round through the stages."""
    if self.num_pipeline_repeats != -1:
      return self.num_pipeline_repeats
    each = self.num_layers_per_pipeline_stage
    return 1 if each == -1 else max(layers // (stages * each), 1)


@dataclasses.dataclass(frozen=True)
class Experts:
  """How experts are computed: each for the tokens that chose it (`sparse_matmul`), for so many of
  each row (`capacity_factor` above 0), or for all.
  """

  sparse_matmul: bool
  megablox: bool
  capacity_factor: Annotated[float, Bound(0, above=True, special=-1)]
  use_random_routing: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Stands here, and not in kernels/, because importing that package imports jax."""

  attention: Literal["autoselected", "dot_product", "blockwise", "ragged", "flash", "cudnn_flash"]
  context_parallel_strategy: Literal["all_gather", "ring", "ulysses"]
  context_parallel_load_balance: bool
  sa_block_q: Side
  sa_block_kv: Side
  sa_block_kv_compute: Side
  sa_block_q_dkv: Side
  sa_block_kv_dkv: Side
  sa_block_kv_dkv_compute: Side
  sa_block_q_dq: Side
  sa_block_kv_dq: Side
  sa_use_fused_bwd_kernel: bool
  sa_q_layout: TensorLayout
  sa_k_layout: TensorLayout
  sa_v_layout: TensorLayout

  @property
  def balances(self) -> bool:
    """Whether the tokens of a length that is split are to be spread."""
    return self.context_parallel_load_balance and self.context_parallel_strategy != "ulysses"

  def complaints(self) -> Iterator[tuple[str, ...]]:
    for key in (field.name for field in dataclasses.fields(self)):
      side = getattr(self, key)
      if key.startswith("sa_block_") and side % 128:
        near = max(1, round(side / 128)) * 128
        yield key, f"{side} is not a multiple of 128, the width of a TPU's registers; use {near}"
    for key in ("sa_block_kv", "sa_block_kv_dkv"):
      side, part = getattr(self, key), getattr(self, f"{key}_compute")
      if side % part:
        yield (
          f"{key}_compute",
          f"{key}_compute={part} does not divide {key}={side}; use a divisor of it",
          key,
        )
