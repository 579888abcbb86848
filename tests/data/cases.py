"""Sections, documents and corpora for the tests of the data layer."""

import numpy as np

from maxtext.data.corpus import Corpus, Tokens
from maxtext.data.sections import Data
from maxtext.data.tokenizers import ByteTokenizer

PACKERS = ("concat_then_split", "first_fit", "best_fit", None)  # None: packing=false


def section(packer: str | None = "concat_then_split", **changes) -> Data:
  settings = {
    "dataset_type": "text",
    "dataset_path": "",
    "text_column": "text",
    "grain_train_files": "",
    "grain_eval_files": "",
    "grain_file_type": "auto",
    "grain_train_mixture_config_path": "",
    "grain_worker_count": 0,
    "hf_path": "",
    "hf_name": "",
    "hf_train_files": "",
    "hf_eval_files": "",
    "train_split": "train",
    "eval_split": "",
    "train_data_columns": ("text",),
    "eval_data_columns": ("text",),
    "dataset_cache_dir": "",
    "data_errors": "stop",
    "tokenizer_type": "byte",
    "tokenizer_path": "",
    "tokenizer_vocab_size": 300,
    "tokenizer_cache_dir": "",
    "add_bos": True,
    "add_eos": True,
    "packing": packer is not None,
    "grain_packing_type": packer or "first_fit",
    "max_segments_per_seq": -1,
    "use_truncation": False,
    "enable_data_shuffling": True,
    "data_shuffle_seed": 0,
    "num_epoch": 1,
    "eval_fraction": 0.25,
  }
  return Data(**settings | changes)


def numbered(lengths) -> Tokens:
  """Documents of these lengths in which every token occurs once: 1, 2, 3 ..."""
  starts = np.cumsum([0, *lengths])
  return Tokens(np.arange(1, starts[-1] + 1, dtype=np.int32), starts)


def corpus_of(train: Tokens, held: Tokens | None = None, fingerprint: str = "a" * 64) -> Corpus:
  return Corpus(ByteTokenizer(), train, held, fingerprint)
