"""`python faults.py FAULT ENTRY ARGUMENTS`: an entry point, train or replay, with something broken.

FAULT is nan or spike, which about one batch in thirty does to the loss; or data, step or save, of
which one takes a minute; or unread, where process 1 can read no state.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from typing import Any

BATCHES, LONG = 31, 60.0
BEFORE = {"data": 20, "step": 20, "save": 2}  # how many are as ever before a slow one


def poisoned(factor: float) -> None:
  """Have the loss of some batches multiplied by a factor; which, their tokens alone decide."""
  import jax.numpy as jnp

  from maxtext import program
  from maxtext.objectives.mean import Mean

  class Poisoned(program.NextToken):
    def __call__(self, model: Any, batch: Any, key: Any = None) -> Any:
      sums = super().__call__(model, batch, key)
      by = jnp.where(batch["inputs"].sum() % BATCHES == 7, factor, 1.0)
      return sums | {"loss": Mean(sums["loss"].total * by, sums["loss"].weight)}

  program.NextToken = Poisoned  # type: ignore[misc]


def slow(owner: Any, name: str, before: int) -> None:
  """Have one call of a function, after some, take long."""
  act, calls = getattr(owner, name), itertools.count()

  def slowly(*arguments: Any, **named: Any) -> Any:
    if next(calls) == before:
      time.sleep(LONG)
    return act(*arguments, **named)

  setattr(owner, name, slowly)


def unread() -> None:
  """Have process 1 fail where it reads arrays of a checkpoint."""
  from maxtext.checkpoints import storage
  from maxtext.checkpoints.stores import Store

  def refuse(*_: Any) -> None:
    raise AssertionError("process 1 reads a state")

  if os.environ["JAX_PROCESS_ID"] == "1":
    storage.read = Store.read = refuse  # type: ignore[assignment,method-assign]


def main() -> None:
  fault, entry, *sys.argv[1:] = sys.argv[1:]
  from maxtext import trainer
  from maxtext.checkpoints.folder import Folder
  from maxtext.errors import run_cli

  if fault in ("nan", "spike"):
    poisoned(float("nan") if fault == "nan" else 30.0)
  elif fault == "unread":
    unread()
  elif fault == "data":
    slow(trainer, "place", BEFORE[fault])
  elif fault == "save":
    slow(Folder, "publish", BEFORE[fault])
  else:
    slow(importlib.import_module("maxtext.training.loop").jax, "device_get", BEFORE[fault])
  run_cli(importlib.import_module(f"maxtext.{entry}").main)


if __name__ == "__main__":
  main()
