"""Settings of how text is generated from a trained decoder."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from maxtext.bounds import Bound, Count, Positive, Whole
from maxtext.specs import CacheQuantSpec


@dataclasses.dataclass(frozen=True)
class Decode:
  prompt: str
  prompts_file: str
  use_chat_template: bool
  decode_sampling_strategy: Literal["greedy", "weighted", "nucleus", "topk"]
  decode_sampling_nucleus_p: Annotated[float, Bound(0, 1, above=True)]
  decode_sampling_top_k: Count
  decode_sampling_temperature: Positive
  decode_length: Count
  decode_seed: Whole
  quantize_kvcache: bool
  kv_quant_dtype: Literal["int8", "int4", "fp8"]
  kv_quant_axis: Literal["dkv", "heads_and_dkv"]

  @property
  def cache_quant(self) -> CacheQuantSpec | None:
    """In how many bits keys and values are kept; None: as they are computed."""
    if not self.quantize_kvcache:
      return None
    return CacheQuantSpec(self.kv_quant_dtype, self.kv_quant_axis)
