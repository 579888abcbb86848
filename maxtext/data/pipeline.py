"""Corpus -> batches, by the settings of section `data`."""

from __future__ import annotations

from typing import Any

from maxtext.data import packing
from maxtext.data.batches import Batches, Shape
from maxtext.data.corpus import Corpus, held_out, open_corpus
from maxtext.data.kinds import vocabulary
from maxtext.data.sections import Data
from maxtext.data.synthetic import Noise

__all__ = ["Batches", "Corpus", "eval_batches", "open_corpus", "train_batches", "vocabulary"]


def train_batches(
  corpus: Corpus, data: Data, batch: int, length: int, *, rows: slice | None = None
) -> Batches:
  """Batches of `batch` rows of `length` tokens, or of this host's `rows` of each.

  Batch n is a pure function of corpus, section, `batch`, `length` and n. When `num_epoch` is not -1
  the last one is filled up with empty rows.
  """
  stream = packing.training_rows(corpus.train, data, length, batch)
  shape = Shape(batch, length, rows or slice(0, batch))
  return Batches(stream, shape, _identity(corpus, data, length))


def eval_batches(
  corpus: Corpus, data: Data, batch: int, length: int, *, rows: slice | None = None
) -> Batches:
  """All held-out documents once, in an order that no seed changes. Raises DataError without any."""
  stream = packing.evaluation_rows(held_out(corpus), data, length)
  shape = Shape(batch, length, rows or slice(0, batch))
  return Batches(stream, shape, _identity(corpus, data, length))


def _identity(corpus: Corpus, data: Data, length: int) -> dict[str, Any]:
  """What a state belongs to, by the names of the settings."""
  identity: dict[str, Any] = {
    "tokenizer": corpus.tokenizer.digest,
    "corpus": corpus.fingerprint,
    "max_target_length": length,
  }
  if isinstance(corpus.train, Noise):
    return identity | {"data_shuffle_seed": data.data_shuffle_seed}
  seed = data.data_shuffle_seed if data.enable_data_shuffling else "none"
  packer = data.grain_packing_type if data.packing else "none"
  cut = " use_truncation=true" * data.use_truncation
  identity |= {"data_shuffle_seed": seed, "grain_packing_type": packer + cut}
  if packer.endswith("_fit"):  # how the last rows are filled depends on what follows them
    identity |= {"max_segments_per_seq": data.max_segments_per_seq, "num_epoch": data.num_epoch}
  return identity
