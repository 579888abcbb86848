"""Tokens per second of the data layer, against Grain alone doing the same work with its own parts.

  python scripts/benchmark_input.py [rounds=5] [key=value ...]

For every packing, rounds of ours and of Grain's take turns, so that what else the machine does
falls on both. Grain is given the tokens as a list of arrays, and uses its own shuffle, packers,
batch and reading thread. Then the same with prepared files: ours by dataset_type=grain, Grain's by
its ArrayRecordDataSource. A ratio above 1 says that ours is faster: the median over the rounds.
"""

from __future__ import annotations

import glob
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain import experimental

from maxtext import config, prepare
from maxtext.data.corpus import Tokens
from maxtext.data.pipeline import open_corpus, train_batches
from maxtext.data.plans import BINS
from maxtext.data.sections import Data

PACKINGS = (
  ("grain_packing_type=concat_then_split",),
  ("grain_packing_type=first_fit",),
  ("grain_packing_type=best_fit",),
  ("packing=false",),
)
BATCHES = 100  # a round


def pieces(tokens: Tokens, longest: int) -> list[dict[str, np.ndarray]]:
  """The documents as arrays of inputs and targets, cut at `longest`."""
  found = []
  for start, stop in zip(tokens.starts, tokens.starts[1:] - 1):
    for low in range(start, stop, longest):
      high = min(low + longest, stop)
      found.append({"inputs": tokens.ids[low:high], "targets": tokens.ids[low + 1 : high + 1]})
  return found


def records(files: list[str]) -> Any:
  """The ids in prepared files, one document after the other."""
  read = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
  return read.map(lambda record: np.frombuffer(record, np.int32))


def alone(tokens: Tokens, data: Data, rows: int, length: int) -> Iterator[Any]:
  """Grain without us."""
  whole = data.packing and data.grain_packing_type == "concat_then_split"
  return batched(
    grain.MapDataset.source(pieces(tokens, sys.maxsize if whole else length)), data, rows, length
  )


def batched(source: Any, data: Data, rows: int, length: int) -> Iterator[Any]:
  """Documents in order -> batches, by Grain's own parts."""
  whole = data.packing and data.grain_packing_type == "concat_then_split"
  source = source.shuffle(seed=data.data_shuffle_seed).repeat()
  lengths = {"inputs": length, "targets": length}
  if not data.packing:
    source = source.map(lambda piece: padded(piece, length))
  read = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if whole:
    read = experimental.ConcatThenSplitIterDataset(read, length_struct=lengths)
  elif data.packing:
    fit = {
      "first_fit": experimental.FirstFitPackIterDataset,
      "best_fit": experimental.BestFitPackIterDataset,
    }[data.grain_packing_type]
    read = fit(read, length_struct=lengths, num_packing_bins=BINS, seed=data.data_shuffle_seed)
  return iter(experimental.ThreadPrefetchIterDataset(read.batch(rows), prefetch_buffer_size=2))


def padded(piece: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
  """One piece as a row, with segments and positions."""
  size = len(piece["inputs"])
  place = np.arange(length, dtype=np.int32)
  row = {name: np.pad(ids, (0, length - size)) for name, ids in piece.items()}
  return row | {"segments": (place < size).astype(np.int32), "positions": place * (place < size)}


def clock(batches: Iterator[Any]) -> tuple[float, float]:
  """Wall and CPU seconds of a round."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in itertools.islice(batches, BATCHES):
    pass
  return time.perf_counter() - wall, time.process_time() - cpu


def compare(arguments: list[str], rounds: int) -> str:
  """A line: tokens per second of both, and the ratios."""
  settings = config.load(arguments)
  data, length = settings.data, settings.training.max_target_length
  rows = int(settings.training.per_device_batch_size)
  corpus = open_corpus(data)
  assert isinstance(corpus.train, Tokens), "dataset_type=text is compared"
  theirs = alone(corpus.train, data, rows, length)
  return ratio("memory", train_batches(corpus, data, rows, length), theirs, rounds, settings)


def compare_prepared(arguments: list[str], folder: str, rounds: int) -> str:
  """The same of files that are read as they are needed; only whole documents, which Grain's
  ConcatThenSplit cuts as it goes.
  """
  files = ["dataset_type=grain", f"grain_train_files={folder}/train-*", "eval_fraction=0"]
  settings = config.load([*arguments, *files])
  data, length = settings.data, settings.training.max_target_length
  rows = int(settings.training.per_device_batch_size)
  read = records(sorted(glob.glob(f"{folder}/train-*.array_record")))
  theirs = batched(
    read.map(lambda ids: {"inputs": ids[:-1], "targets": ids[1:]}), data, rows, length
  )
  ours = train_batches(open_corpus(data), data, rows, length)
  return ratio("prepared", ours, theirs, rounds, settings)


def ratio(where: str, ours: Any, theirs: Any, rounds: int, settings: config.Config) -> str:
  data, length = settings.data, settings.training.max_target_length
  rows = int(settings.training.per_device_batch_size)
  clock(ours), clock(theirs)
  times = [(clock(ours), clock(theirs)) for _ in range(rounds)]
  wall, cpu = (statistics.median(b[i] / a[i] for a, b in times) for i in range(2))
  speeds = [BATCHES * rows * length / statistics.median(t[i][0] for t in times) for i in range(2)]
  kind = data.grain_packing_type if data.packing else "packing=false"
  return (
    f"{where:9}{data.tokenizer_type:5}{kind:20} ours {speeds[0] / 1e6:6.2f} M tokens/s, Grain "
    f"alone {speeds[1] / 1e6:6.2f}; ratio {wall:.2f} (of CPU time {cpu:.2f})"
  )


def main(arguments: list[str]) -> None:
  rounds = 5
  if arguments and arguments[0].startswith("rounds="):
    rounds = int(arguments.pop(0).removeprefix("rounds="))
  for packing in PACKINGS:
    print(compare([*arguments, *packing], rounds), flush=True)
  with tempfile.TemporaryDirectory() as place:
    words = [word for word in arguments if not word.startswith("tokenizer_")]
    prepare.main([f"{place}/prepared", *words, "tokenizer_type=byte"])
    words = [word for word in words if not word.startswith(("dataset_", "text_column"))]
    print(compare_prepared([*words, *PACKINGS[0]], f"{place}/prepared", rounds), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
