"""`python -m maxtext.evaluate RUN [key=value]`: the loss of a checkpoint on held-out text."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from maxtext import config as configs
from maxtext import hardware, hosts, resume
from maxtext import log as logs
from maxtext.checkpoints.lookup import locate_with_extra
from maxtext.checkpoints.manifest import Manifest
from maxtext.config import Config
from maxtext.errors import run_cli

USAGE = """usage: python -m maxtext.evaluate RUN_OR_CHECKPOINT [key=value ...]

Prints the loss on held-out text that training would print after the step of a checkpoint: the
newest of a run, or the one that is named. The run's folder is only read, and it may be training.
  python -m maxtext.evaluate runs/mine eval_steps=100
Ends with 0: evaluated; 2: configuration; 3: data; 4: checkpoint."""


def main(argv: list[str]) -> int:
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE, file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  path, *words = argv
  step, manifest, saved = locate_with_extra(path)
  if not any(word.startswith("eval_interval=") for word in words):
    words.append("eval_interval=1")  # now, however seldom training does
  own = step.parent.parent if step.parent.name == "checkpoints" else step
  if not (own / "config.yml").is_file():
    own = step  # which has it as the run had
  loaded = configs.load([str(own / "config.yml"), *words], purpose="read")
  resume.check_model(loaded, saved)
  hardware.prepare(loaded.run, several=False)
  logs.start(0, loaded.run.debug)
  print(evaluate(loaded, Path(path), step, manifest))
  return 0


def evaluate(config: Config, path: Path, step: Path, manifest: Manifest) -> str:
  """What is to be said of a step that `path` leads to. Raises CheckpointError, DataError."""
  # imports jax: not before the configuration is known to be right
  from maxtext import program, trainer
  from maxtext.checkpoints.manager import restore_newest
  from maxtext.data.pipeline import open_corpus, vocabulary
  from maxtext.training.hooks import average
  from maxtext.training.metrics import format_eval

  built = program.build(config, None, vocabulary(config.data))
  run = trainer.Run(config, hosts.Home(step.parent.parent), built, time.monotonic())
  run.corpus = open_corpus(config.data)
  manifest, params = restore_newest(path, step, manifest, built.state.params)
  return format_eval(manifest.step - 1, average(built.evaluate, params, run.held_out()))


if __name__ == "__main__":
  run_cli(main)
