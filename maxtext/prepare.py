"""`python -m maxtext.prepare OUT config.yml key=value`: tokenise once what many runs read."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxtext import config
from maxtext.errors import ConfigError, DataError, run_cli

USAGE = """\
usage: python -m maxtext.prepare OUT CONFIG.yml [key=value ...] [documents_per_file=100000]

Tokenises the documents that CONFIG.yml describes and writes them to the folder OUT: ArrayRecord
files of token ids, train-* and eval-* (what is held out), with an index beside each, the tokenizer,
and manifest.json with the checksums of all. A run reads them without tokenising anything:
  dataset_type=grain grain_train_files=OUT/train-* grain_eval_files=OUT/eval-*
OUT appears when all is written; grain_worker_count processes tokenise.
Ends with 0: written; 2: configuration; 3: data."""

PER_FILE = "documents_per_file="


def main(argv: list[str]) -> int:
  """Prepare as the arguments say; returns the exit code of the process. Raises UserError."""
  if len(argv) < 2 or {"-h", "--help"} & set(argv):
    print(USAGE)
    return 0 if {"-h", "--help"} & set(argv) else 2
  most = [word.removeprefix(PER_FILE) for word in argv if word.startswith(PER_FILE)] or ["100000"]
  if not (len(most) == 1 and most[0].isdecimal() and int(most[0])):
    raise ConfigError("documents_per_file", f"{' '.join(most)!r} is no whole number from 1")
  out = Path(argv[0]).expanduser()
  loaded = config.load([word for word in argv[1:] if not word.startswith(PER_FILE)])
  if loaded.data.dataset_type == "synthetic":
    raise ConfigError("dataset_type", "synthetic tokens need no preparation; name another")
  if out.exists():
    raise ConfigError("OUT", f"{out} is there already; name a folder that is not")
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".preparing-") as scratch:
      said = _write(Path(scratch, "made"), loaded.data, int(most[0]))
      os.replace(Path(scratch, "made"), out)
  except OSError as error:
    raise DataError(f"{out}: cannot be written: {error.strerror}") from None
  print(f"{out}: {said}")
  return 0


def _write(folder: Path, data: Any, most: int) -> str:
  """Files, tokenizer and manifest; how much there is."""
  from maxtext.data import prepared
  from maxtext.data.packing import every_document
  from maxtext.data.pipeline import open_corpus

  folder.mkdir()
  corpus = open_corpus(data)
  files: dict[str, Any] = {}
  for split, source in (("train", corpus.train), ("eval", corpus.eval)):
    if source is None:
      continue
    documents = every_document(source, data)
    made = list(_files(folder, split, documents, most))
    for number, (path, said) in enumerate(made):
      final = f"{split}-{number:05}-of-{len(made):05}.array_record"
      for name, what in said.items():
        os.rename(folder / name, folder / name.replace(path.name, final))
        files[name.replace(path.name, final)] = what
  corpus.tokenizer.save(folder)
  manifest = {
    "format": prepared.FORMAT,
    "tokenizer": corpus.tokenizer.digest,
    "vocab_size": corpus.vocab_size,
    "add_bos": data.add_bos,
    "add_eos": data.add_eos,
    "files": files,
  }
  (folder / prepared.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
  count = sum(said.get("documents", 0) for said in files.values())
  tokens = sum(said.get("tokens", 0) for said in files.values())
  return f"{count} documents, {tokens} tokens in {len(files) // 2} files"


def _files(
  folder: Path, split: str, documents: Iterator[Any], most: int
) -> Iterator[tuple[Path, dict[str, Any]]]:
  """Files of at most so many documents, and what the manifest says of each."""
  from maxtext.data import prepared

  number = 0
  while (first := next(documents, None)) is not None:
    path = folder / f"{split}.{number}"
    yield (
      path,
      prepared.write(path, itertools.chain([first], itertools.islice(documents, most - 1))),
    )
    number += 1


if __name__ == "__main__":
  run_cli(main)
