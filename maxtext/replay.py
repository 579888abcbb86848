"""`python -m maxtext.replay INCIDENT [key=value]`: a step that was not applied, once more."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxtext import config as configs
from maxtext import hardware, hosts
from maxtext.config import Config
from maxtext.errors import ConfigError, run_cli

USAGE = """usage: python -m maxtext.replay RUN/incidents/INCIDENT.json [key=value ...]

Trains RUN again from its last checkpoint before the incident up to it, writes nothing, and says
whether every loss and gradient norm on the way is the recorded one, bit by bit, and which layers'
gradients are the largest. Ends with 0 where they are, with 1 where they are not.
"""
SHOWN = 10  # norms
RECENT = ("step", "loss", "raw_grad_norm")  # of the steps before it
PAST = ("checkpoint", "passed", "count")  # of the run before it: how it had gone back


def main(argv: list[str]) -> int:
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  path, *words = argv
  incident, folder = _read(Path(path)), Path(path).absolute().parents[1]
  loaded = configs.load([str(folder / "config.yml"), *words], purpose="read")
  # the norms are reported where the guard would go back
  training = dataclasses.replace(loaded.training, rollback_limit=1)
  loaded = dataclasses.replace(loaded, training=training)
  hardware.prepare(loaded.run, several=False)
  lines, same = replay(loaded, folder, incident)
  print("\n".join(lines))
  return 0 if same else 1


def _read(path: Path) -> dict[str, Any]:
  """An incident. Raises ConfigError for what is none."""
  try:
    incident = json.loads(path.read_text())
    batch, recent = incident["batch"], incident["recent"]
    places = [incident["step"], batch["number"], *(batch[name] for name in PAST)]
    lists = [recent[name] for name in RECENT]
    if (
      not all(type(place) is int for place in places)
      or batch["number"] != incident["step"] + batch["passed"]
      or not all(type(numbers) is list and len(numbers) == len(lists[0]) for numbers in lists)
      or not isinstance(batch["sha256"], str)
    ):
      raise ValueError
    return incident
  except OSError as error:
    raise ConfigError("command line", f"{path}: {error.strerror}; name an incident") from None
  except (ValueError, KeyError, TypeError, RecursionError):
    raise ConfigError("command line", f"{path} is not an incident of a run; name one") from None


def replay(config: Config, folder: Path, incident: dict[str, Any]) -> tuple[list[str], bool]:
  """What is to be said of it, and whether all is as it was. Raises CheckpointError, DataError."""
  # imports jax: not before the configuration is known to be right
  import jax

  from maxtext import program, trainer
  from maxtext.data.pipeline import open_corpus, train_batches, vocabulary
  from maxtext.training.metrics_file import number

  corpus = open_corpus(config.data)
  built = program.build(config, None, vocabulary(config.data))
  run = trainer.Run(config, hosts.Home(folder), built, time.monotonic())
  run.corpus, run.batches = corpus, run.open_batches(train_batches, corpus, run.rows)
  begun, passed = run.incidents.before(incident)
  state, last = run.begin(begun, resumed=False), incident["step"]
  first = int(state.step)
  columns = run.placed(run.incidents.seeing(run.batches, first), run.rows)
  recorded = {
    step: numbers for step, *numbers in zip(*(incident["recent"][name] for name in RECENT))
  }
  lines, wrong = [f"step {last} of {folder}, from the state after {first} steps"], []
  for step in range(first, last + 1):
    for _ in range(passed.passed if step == passed.checkpoint else 0):
      next(run.batches)
    state, metrics = built.step(state, next(columns))
    found = [number(float(metrics[name])) for name in ("loss", "raw_grad_norm")]
    if (there := recorded.get(step, found)) != found:
      wrong.append(
        f"step {step}: loss {found[0]}, norm {found[1]}; recorded {there[0]}, {there[1]}"
      )
  if run.incidents.digest(last) != incident["batch"]["sha256"]:
    wrong.append(f"batch {incident['batch']['number']} has other tokens than recorded")
  same = f"loss {found[0]}, gradient norm {found[1]}: every step as recorded, bit by bit"
  assert built.guard is not None
  norms = built.guard.named(jax.device_get(metrics["norms"]), built.state.params)
  return [*lines, *(wrong[:3] or [same]), *_largest(norms)], not wrong


def _largest(norms: Mapping[str, Any]) -> list[str]:
  """A line for each of the largest norms, what is not finite first."""
  each = [
    (norm, f"{name} of layer {index}" if isinstance(found, list) else name)
    for name, found in norms.items()
    for index, norm in enumerate(found if isinstance(found, list) else [found])
  ]
  size = lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf
  return [f"{norm:12g}  {name}" for norm, name in sorted(each, key=size, reverse=True)[:SHOWN]]


if __name__ == "__main__":
  run_cli(main)
