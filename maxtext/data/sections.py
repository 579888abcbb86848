"""Settings of the documents, the tokenizer and the packing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from maxtext.bounds import Bound, CountOrOff, Whole

# What `tokenizer_path` names for the kinds of tokenizers that need one.
FILES = {
  "huggingface": "a tokenizer.json, or a folder that holds one",
  "sentencepiece": "a .model file",
  "tiktoken": "a .tiktoken file",
}
# What `hf_path` calls the files of hf_train_files -> grain_file_type.
FORMATS = {"": "auto", "arrow": "arrow", "json": "jsonl", "parquet": "parquet", "text": "text"}


@dataclasses.dataclass(frozen=True)
class Data:
  dataset_type: Literal["text", "grain", "hf", "synthetic"]
  dataset_path: str
  text_column: str
  grain_train_files: str
  grain_eval_files: str
  grain_file_type: Literal["auto", "arrayrecord", "parquet", "arrow", "jsonl", "text"]
  grain_train_mixture_config_path: str
  grain_worker_count: Whole
  hf_path: str
  hf_name: str
  hf_train_files: str
  hf_eval_files: str
  train_split: str
  eval_split: str
  train_data_columns: tuple[str, ...]
  eval_data_columns: tuple[str, ...]
  dataset_cache_dir: str
  data_errors: str
  tokenizer_type: Literal["byte", "bpe", "huggingface", "sentencepiece", "tiktoken"]
  tokenizer_path: str
  tokenizer_vocab_size: Annotated[int, Bound(260, 2**20)]
  tokenizer_cache_dir: str
  add_bos: bool
  add_eos: bool
  packing: bool
  grain_packing_type: Literal["first_fit", "best_fit", "concat_then_split"]
  max_segments_per_seq: CountOrOff
  use_truncation: bool
  enable_data_shuffling: bool
  data_shuffle_seed: Whole
  num_epoch: CountOrOff
  eval_fraction: Annotated[float, Bound(0, 0.5)]

  @property
  def evaluated(self) -> str:
    """What names the documents to evaluate on; '' = they are held out."""
    return self.grain_eval_files or self.hf_eval_files or self.eval_split

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
    if self.dataset_path and self.dataset_type != "text":
      reads = {"grain": "grain_train_files", "hf": "hf_path"}.get(self.dataset_type, "no files")
      yield (
        "dataset_path",
        f"{self.dataset_type} data reads {reads}; set dataset_type=text, or leave it empty",
        "dataset_type",
      )
    yield from self._streamed()
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

  def _streamed(self) -> Iterator[tuple[str, ...]]:
    """What is wrong with documents that are read as they are needed."""
    if not re.fullmatch(r"stop|\d{1,12}|0?\.\d{1,12}", self.data_errors):
      problem = f"{self.data_errors!r} is neither stop, nor a number, as 100, nor a share, as 0.001"
      yield "data_errors", problem
    if self.dataset_type not in ("grain", "hf"):
      return
    if self.dataset_type == "hf" and not (self.hf_path or self.hf_train_files):
      yield "dataset_type", "hf reads a saved dataset; set hf_path=FOLDER", "hf_path"
    if self.hf_train_files and self.hf_path not in FORMATS:
      problem = f"with hf_train_files it is the kind of the files: {', '.join(sorted(FORMATS)[1:])}"
      yield "hf_path", f"{problem}, or leave it empty", "hf_train_files"
    if self.dataset_type == "grain" and self.grain_train_mixture_config_path:
      if self.grain_train_files:
        problem = "give it, or grain_train_mixture_config_path, not both"
        yield "grain_train_files", problem, "grain_train_mixture_config_path"
    elif self.dataset_type == "grain" and not self.grain_train_files:
      problem = "grain reads files; set grain_train_files='FOLDER/*.array_record'"
      yield "dataset_type", problem, "grain_train_files"
    if self.tokenizer_type == "bpe" and not self.tokenizer_path:
      problem = "a bpe is trained on a corpus in memory; name its tokenizer.json by tokenizer_path"
      yield "tokenizer_type", f"{problem}, or set tokenizer_type=byte", "dataset_type"
    for key in ("train_data_columns", "eval_data_columns"):
      if not getattr(self, key):
        yield key, "a document is made of one column at least; write [text]"


def _likely(path: str) -> str:
  """The kind of tokenizer that a file of this name holds."""
  endings = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
  return next((kind for end, kind in endings.items() if path.endswith(end)), "huggingface")
