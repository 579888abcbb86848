"""Rows -> batches: their six columns, and the state from which the next batch follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import numpy as np

from maxtext.data.ahead import Ahead
from maxtext.errors import DataError
from maxtext.log import log

AHEAD = 2  # batches made before they are asked for
COLUMNS = ("inputs", "targets", "segments", "positions")
Row = np.ndarray  # [4 length] int32: the columns
Batch = dict[str, np.ndarray]


class Stream(Protocol):
  """Rows in an order that depends on nothing but the documents, the section and the row length."""

  def take(self, count: int, kept: slice) -> list[Row]:
    """Those of the next `count` rows that are in `kept`; fewer at the end, then StopIteration."""

  def get_state(self) -> dict[str, Any]: ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises IndexError for a state beyond the last row."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """A global batch of `batch` rows of `length` tokens, of which this host has `rows`."""

  batch: int
  length: int
  rows: slice


class Batches(Iterator[Batch]):
  """Batches {column: [rows length] int32}, made ahead in a thread; padding is 0 in every column.

  The columns are inputs and targets, and _position and _segmentation of both. Not for several
  threads at once.
  """

  def __init__(self, stream: Stream, shape: Shape, identity: dict[str, Any]):
    self._identity, self._beginning = identity, stream.get_state()
    self._ahead = Ahead(_Reader(stream, shape), AHEAD)
    self._filled = self._places = 0

  def __next__(self) -> Batch:
    batch, filled = next(self._ahead)
    self._filled += filled
    self._places += batch["inputs"].size
    return batch

  def __str__(self) -> str:
    """How full the batches taken from here were, and what was passed over to make them."""
    padding = 1 - self._filled / max(1, self._places)
    skipped = self._ahead.get_state().get("skipped", 0)
    return f"data: {padding:.1%} padding" + (f", {skipped} documents passed over" * bool(skipped))

  def state(self) -> dict[str, Any]:
    """What `restore` needs to go on after the last batch returned: small, and plain JSON."""
    return {**self._identity, "place": self._ahead.get_state()}

  def restore(self, state: dict[str, Any], changes: Collection[str] = ()) -> None:
    """Go on where `state` was taken, whatever the batch size and the hosts.

    It must be of the same tokens, cut and ordered in the same way: raises DataError, or begins anew
    where `changes` names the setting that differs.
    """
    anew = False
    for key, now in self._identity.items():
      then = state.get(key)
      if then == now or (anew and key not in state):
        continue
      if not {key, *_SETTINGS.get(key, ())} & set(changes):
        raise DataError(_complaint(key, now, then))
      log.info("%s differs from the checkpoint's: the data begins anew", key)
      anew = True
    try:
      self._ahead.set_state(self._beginning if anew else state["place"])
    except IndexError:
      raise DataError("num_epoch: the checkpoint is beyond the last of these; raise it") from None

  def close(self) -> None:
    """End the thread."""
    self._ahead.close()


# The other settings that a part of the state depends on.
_SETTINGS = {
  "data_shuffle_seed": ("enable_data_shuffling",),
  "grain_packing_type": ("packing", "use_truncation"),
  "tokenizer": ("tokenizer_type", "tokenizer_path", "tokenizer_vocab_size"),
  "corpus": (
    "dataset_type dataset_path text_column grain_train_files grain_eval_files grain_file_type"
    " grain_train_mixture_config_path hf_path hf_name hf_train_files hf_eval_files train_split"
    " eval_split train_data_columns eval_data_columns tokenizer_type tokenizer_path"
    " tokenizer_vocab_size add_bos add_eos eval_fraction"
  ).split(),
}


def _complaint(key: str, now: Any, then: Any) -> str:
  if key == "tokenizer":
    return (
      "tokenizer_path: the tokenizer is not the checkpoint's, whose ids the model has learned; "
      "set tokenizer_path to the tokenizer.json in the run's folder (or its tokenizer.model or "
      "tokenizer.tiktoken), or start a new run"
    )
  if key != "corpus":
    return f"{key}={now}: the checkpoint has {then}; set it back, or start a new run"
  return (
    "dataset_path: the documents, their split or their tokens are not the checkpoint's "
    f"(sha256 {now:.12}, was {then or 'unknown':.12}); restore them, or start a new run"
  )


class _Reader:
  """Rows of a stream -> batches; the state is that after the last batch made."""

  def __init__(self, stream: Stream, shape: Shape):
    self._stream, self._shape = stream, shape
    self.get_state, self.set_state = stream.get_state, stream.set_state

  def __next__(self) -> tuple[Batch, int]:
    shape, rows = self._shape, self._stream.take(self._shape.batch, self._shape.rows)
    columns = np.zeros((len(COLUMNS), shape.rows.stop - shape.rows.start, shape.length), np.int32)
    for index, row in enumerate(rows):
      columns[:, index] = row
    inputs, targets, segments, positions = columns
    batch = {
      "inputs": inputs,
      "inputs_position": positions,
      "inputs_segmentation": segments,
      "targets": targets,
      "targets_position": positions,
      "targets_segmentation": segments,
    }
    return batch, int(np.count_nonzero(segments))
