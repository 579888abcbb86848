"""Settings of the documents, the tokenizer and the packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from maxtext.bounds import Bound, CountOrOff, Whole

# What `tokenizer_path` names for the kinds of tokenizers that need one.
FILES = {
  "huggingface": "a tokenizer.json, or a folder that holds one",
  "sentencepiece": "a .model file",
  "tiktoken": "a .tiktoken file",
}


@dataclasses.dataclass(frozen=True)
class Data:
  dataset_type: Literal["text", "synthetic"]
  dataset_path: str
  text_column: str
  tokenizer_type: Literal["byte", "bpe", "huggingface", "sentencepiece", "tiktoken"]
  tokenizer_path: str
  tokenizer_vocab_size: Annotated[int, Bound(260, 2**20)]
  tokenizer_cache_dir: str
  add_bos: bool
  add_eos: bool
  packing: bool
  grain_packing_type: Literal["first_fit", "best_fit", "concat_then_split"]
  max_segments_per_seq: CountOrOff
  enable_data_shuffling: bool
  data_shuffle_seed: Whole
  num_epoch: CountOrOff
  eval_fraction: Annotated[float, Bound(0, 0.5)]

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.tokenizer_path and self.tokenizer_type == "byte":
      yield (
        "tokenizer_path",
        f"the byte tokenizer reads no file; set tokenizer_type={_likely(self.tokenizer_path)}, "
        "or leave tokenizer_path empty",
        "tokenizer_type",
      )
    if not self.tokenizer_path and self.tokenizer_type in FILES:
      yield (
        "tokenizer_type",
        f"{self.tokenizer_type} reads a file; set tokenizer_path={FILES[self.tokenizer_type]}",
        "tokenizer_path",
      )
    if self.dataset_path and self.dataset_type == "synthetic":
      yield (
        "dataset_path",
        "synthetic data reads no files; set dataset_type=text, or leave dataset_path empty",
        "dataset_type",
      )
    if self.num_epoch != -1 and self.dataset_type == "synthetic":
      yield (
        "num_epoch",
        "synthetic data has no end; set dataset_type=text, or num_epoch=-1 and the steps you want",
        "dataset_type",
      )
    if (
      self.max_segments_per_seq != -1
      and self.packing
      and self.grain_packing_type == "concat_then_split"
    ):
      yield (
        "max_segments_per_seq",
        "concat_then_split fills rows whatever the number of documents; "
        "set grain_packing_type=first_fit or best_fit, or max_segments_per_seq=-1",
        "grain_packing_type",
      )


def _likely(path: str) -> str:
  """The kind of tokenizer that a file of this name holds."""
  endings = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
  return next((kind for end, kind in endings.items() if path.endswith(end)), "huggingface")
