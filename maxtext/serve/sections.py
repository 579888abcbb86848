"""Settings of how text is generated from a trained decoder."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from maxtext.bounds import Bound, Count, Positive, Whole


@dataclasses.dataclass(frozen=True)
class Decode:
  prompt: str
  prompts_file: str
  decode_sampling_strategy: Literal["greedy", "weighted", "nucleus", "topk"]
  decode_sampling_nucleus_p: Annotated[float, Bound(0, 1, above=True)]
  decode_sampling_top_k: Count
  decode_sampling_temperature: Positive
  decode_length: Count
  decode_seed: Whole
