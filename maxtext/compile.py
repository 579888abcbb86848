"""`python -m maxtext.compile config.yml compile_topology=v5p-128`: see a step before renting it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from maxtext import config, hardware, topology
from maxtext.config import loading
from maxtext.config.config import Config
from maxtext.config.places import unwritable
from maxtext.config.values import shown
from maxtext.errors import ConfigError, run_cli

USAGE = """\
usage: python -m maxtext.compile CONFIG.yml compile_topology=NAME [key=value ...]

Compiles the step that training would run on these devices, none of which is needed, and says what
it takes of their memory, what it sends, and how long it should take:
  python -m maxtext.compile configs/quickstart.yml compile_topology=cpu-8
  python -m maxtext.compile run.yml compile_topology=v5p-128 compile_topology_num_slices=2
report_file=FILE.json keeps the report, and its memory over time as FILE.html;
compiled_trainstep_file=FILE keeps the step, for training to load.
Ends with 0; 1 where the step does not fit into memory; 2: configuration."""


def main(argv: list[str]) -> int:
  """Compile and report; returns the exit code. Raises UserError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE, file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  loaded = load(argv)
  # imports jax: not before the environment is prepared
  from maxtext import compiled

  return compiled.compile_for(loaded)


def load(argv: list[str]) -> Config:
  """The configuration for the devices that it names, which the environment is prepared for."""
  _, history = loading.trace(argv, os.environ, lambda complaint: None)
  values, _ = loading.typed(history, lambda complaint: None)
  name = values["compile_topology"]
  if not name:
    raise ConfigError("compile_topology", "name the devices to compile for, as v5p-128 or cpu-8")
  own = topology.parse(name)
  words = ["hardware=auto", "devices=null"]
  slices = values["compile_topology_num_slices"] or values["num_slices"]
  if own.hardware == "cpu":
    words = ["hardware=cpu", f"devices={own.devices * slices}"]
  environ = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  own_words = tuple(f"{word.partition('=')[0]}=" for word in (*words, "num_slices="))
  rest = [word for word in argv if not word.startswith(own_words)]
  loaded = config.load([*rest, *words, f"num_slices={slices}"], environ)
  if (path := loaded.compile.compiled_trainstep_file) and (problem := unwritable(path)):
    raise ConfigError("compiled_trainstep_file", f"{shown(path)}: {problem}")
  topology.prepare(own, os.environ)
  hardware.prepare(loaded.run)
  return loaded


def cli() -> NoReturn:
  """Run as a program."""
  run_cli(main)


if __name__ == "__main__":
  cli()
