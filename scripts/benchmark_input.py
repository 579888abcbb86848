"""CPU time of the data layer, beside that of Grain alone doing the same work with its own parts.

  python scripts/benchmark_input.py [rounds=3] [batches=50] [only=WORD] [key=value ...]

For every case, rounds of ours and of Grain's take turns, so that what else the machine does falls
on both; processor seconds of the process and of its workers are counted. Grain reads the same
files with its own sources, tokenises with the same tokenizer, cuts, shuffles, packs, batches and
prefetches with its own transforms, without a thread more than it needs. A case has tokens in
memory, prepared files of tokens, or text in ArrayRecord or Parquet that is tokenised on the way, in
this process or in two workers; the documents are the scenes of the plays, or single speeches. Below
1.00 ours takes less.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from grain import experimental

from maxtext import config, prepare
from maxtext.data import plays
from maxtext.data.corpus import Tokens
from maxtext.data.kinds import given
from maxtext.data.pipeline import open_corpus, train_batches
from maxtext.data.plans import BINS
from maxtext.data.sections import Data

SPLIT, FIRST, BEST, ALONE = (
  ["grain_packing_type=concat_then_split"],
  ["grain_packing_type=first_fit"],
  ["grain_packing_type=best_fit"],
  ["packing=false"],
)
Pair = dict[str, np.ndarray]  # inputs and targets of a document [n] int32


def pairs(ids: np.ndarray) -> Pair:
  return {"inputs": ids[:-1], "targets": ids[1:]}


def padded(piece: Pair, length: int) -> Pair:
  """One piece as a row, with segments and positions."""
  size = len(piece["inputs"])
  place = np.arange(length, dtype=np.int32)
  row = {name: np.pad(ids, (0, length - size)) for name, ids in piece.items()}
  return row | {"segments": (place < size).astype(np.int32), "positions": place * (place < size)}


class Cut(experimental.FlatMapTransform):
  """Documents in pieces of at most `length`."""

  def __init__(self, length: int):
    self.max_fan_out, self._length = 10**6, length

  def flat_map(self, element: Pair) -> list[Pair]:
    size, length = len(element["inputs"]), self._length
    return [
      {name: ids[low : low + length] for name, ids in element.items()}
      for low in range(0, size, length)
    ]


class Encode(grain.transforms.Map):
  """A record of JSON, or a row of Parquet -> the pairs of its document."""

  def __init__(self, data: Data):
    self._data = data
    self._tokenizer: Any = None

  def map(self, element: Any) -> Pair:
    if self._tokenizer is None:
      self._tokenizer = given(self._data)
    record = element if isinstance(element, dict) else json.loads(element)
    ids, _ = self._tokenizer.encode_all([record["text"]])
    return pairs(np.r_[self._tokenizer.bos, ids, self._tokenizer.eos].astype(np.int32))

  def __getstate__(self) -> dict[str, Any]:
    return {"_data": self._data, "_tokenizer": None}  # each worker reads it for itself


class Decode(grain.transforms.Map):
  """A record of prepared tokens -> pairs."""

  def map(self, element: bytes) -> Pair:
    return pairs(np.frombuffer(element, np.int32))


def alone(source: Any, made: grain.transforms.Map | None, settings: config.Config) -> Iterator[Any]:
  """Grain without us: documents -> batches."""
  data, length = settings.data, settings.training.max_target_length
  if isinstance(source, grain.MapDataset):
    source = source.shuffle(seed=data.data_shuffle_seed).repeat()
    source = source.map(made) if made else source
    read = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  else:
    read = source.map(made)
  lengths = {"inputs": length, "targets": length}
  if data.packing and data.grain_packing_type == "concat_then_split":
    read = experimental.ConcatThenSplitIterDataset(read, length_struct=lengths)
  else:
    read = experimental.FlatMapIterDataset(read, Cut(length))
    if data.packing:
      best = data.grain_packing_type == "best_fit"
      fit = experimental.BestFitPackIterDataset if best else experimental.FirstFitPackIterDataset
      read = fit(read, length_struct=lengths, num_packing_bins=BINS, seed=data.data_shuffle_seed)
    else:
      read = read.map(functools.partial(padded, length=length))
  read = read.batch(int(settings.training.per_device_batch_size))
  if data.grain_worker_count:
    return iter(read.mp_prefetch(grain.MultiprocessingOptions(data.grain_worker_count)))
  return iter(experimental.ThreadPrefetchIterDataset(read, prefetch_buffer_size=2))


def children() -> set[str]:
  """The processes that this one has started."""
  found = set()
  for path in glob.glob("/proc/[0-9]*/stat"):
    try:
      if Path(path).read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
        found.add(path)
    except OSError:
      pass  # it has ended
  return found


def seconds(workers: set[str]) -> float:
  """CPU seconds of this process and of `workers` until now."""
  ticks = 0
  for path in workers:
    ticks += sum(map(int, Path(path).read_text().rpartition(")")[2].split()[11:13]))
  return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare(name: str, theirs: Iterator[Any], words: list[str], rounds: int, batches: int) -> None:
  """Print a line: CPU seconds of both for a million places in rows, and the ratio."""
  settings = config.load(words)
  rows, length = (
    int(settings.training.per_device_batch_size),
    settings.training.max_target_length,
  )
  ours = train_batches(open_corpus(settings.data), settings.data, rows, length)
  before, sides = children(), []
  for made in (ours, theirs):
    for _ in itertools.islice(made, batches):  # begin
      pass
    sides.append((made, children() - before))
    before = children()
  spent = [0.0, 0.0]
  for _ in range(rounds):
    for side, (made, workers) in enumerate(sides):
      begin = seconds(workers)
      for _ in itertools.islice(made, batches):
        pass
      spent[side] += seconds(workers) - begin
  ours.close()
  cost = [1e6 * each / (rounds * batches * rows * length) for each in spent]
  print(
    f"{name:55} ours {cost[0]:6.3f}  Grain {cost[1]:6.3f}  {cost[0] / cost[1]:5.2f}", flush=True
  )


def write_texts(folder: Path, documents: list[str]) -> None:
  """The same records as ArrayRecord and as Parquet."""
  import pyarrow
  from pyarrow import parquet

  writer = ArrayRecordWriter(str(folder / "text.array_record"), "group_size:1")
  for text in documents:
    writer.write(json.dumps({"text": text}).encode())
  writer.close()
  table = pyarrow.table({"text": documents})
  parquet.write_table(table, folder / "text.parquet", row_group_size=1000)


def cases(folder: Path, words: list[str]) -> Iterator[tuple[str, Any, list[str]]]:
  """(name, Grain's, our settings) of each."""
  scenes = [document.text for document in plays.read()]
  for kind, documents in (
    ("scenes", scenes),
    ("speeches", [speech for scene in scenes for speech in scene.split("\n\n") if speech.strip()]),
  ):
    place = folder / kind
    place.mkdir()
    write_texts(place, documents)
    files = {end: f"{place}/text.{end}" for end in ("array_record", "parquet")}
    reads = [*words, "dataset_type=grain", "eval_fraction=0", "dataset_cache_dir="]
    text = [*reads, f"grain_train_files={files['array_record']}"]
    prepare.main([f"{place}/prepared", *text])
    tokens = glob.glob(f"{place}/prepared/train-*.array_record")
    for packing in (SPLIT, FIRST, BEST, ALONE):
      said = [*reads, f"grain_train_files={tokens[0]}", *packing]
      source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(tokens))
      yield f"{kind} prepared {packing[0]}", alone(source, Decode(), config.load(said)), said
    for packing, workers in itertools.product((SPLIT, FIRST), (0, 2)):
      said = [*text, *packing, f"grain_worker_count={workers}"]
      settings = config.load(said)
      source = grain.MapDataset.source(grain.sources.ArrayRecordDataSource([files["array_record"]]))
      name = f"{kind} array_record {packing[0]} workers={workers}"
      yield name, alone(source, Encode(settings.data), settings), said
    said = [*reads, f"grain_train_files={files['parquet']}", *SPLIT, "enable_data_shuffling=false"]
    settings = config.load(said)
    source = experimental.ParquetIterDataset(files["parquet"])
    yield f"{kind} parquet in order", alone(source, Encode(settings.data), settings), said
    if kind == "speeches":
      continue
    for packing in (SPLIT, FIRST, BEST, ALONE):
      said = [*words, *packing]
      settings = config.load(said)
      train = open_corpus(settings.data).train
      assert isinstance(train, Tokens), "dataset_type=text is compared"
      ends = itertools.pairwise(train.starts.tolist())
      source = grain.MapDataset.source([pairs(train.ids[a:b]) for a, b in ends])
      yield f"{kind} memory {packing[0]}", alone(source, None, settings), said


def main(arguments: list[str]) -> None:
  options = {"rounds": "3", "batches": "50", "only": ""}
  words = [word for word in arguments if word.partition("=")[0] not in options]
  options |= dict(word.split("=", 1) for word in arguments if word not in words)
  flags.FLAGS([sys.argv[0]])  # which Grain's workers read
  print("CPU seconds for 1,000,000 places in rows, and ours over Grain's")
  with tempfile.TemporaryDirectory() as folder:
    for name, theirs, said in cases(Path(folder), words):
      if options["only"] in name:
        compare(name, theirs, said, int(options["rounds"]), int(options["batches"]))


if __name__ == "__main__":
  main(sys.argv[1:])
