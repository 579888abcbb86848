"""A step that is compiled and not run: what it takes, what it sends, how long it should take."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax

from maxtext import log as logs
from maxtext import program, topology
from maxtext.compiled import executable, report, words
from maxtext.compiled.origins import Noting
from maxtext.compiled.report import Report
from maxtext.config import Config, check_devices
from maxtext.data.pipeline import vocabulary
from maxtext.errors import ConfigError
from maxtext.program import Program

__all__ = ["Report", "compile_for", "publish"]


def compile_for(config: Config) -> int:
  """Compile the step for the topology that the configuration names, and report; returns the exit
  code. Raises UserError.
  """
  logs.start(0, config.run.debug)
  size = 0 if config.architecture.vocab_size else vocabulary(config.data)
  place = topology.parse(config.compile.compile_topology)
  devices = topology.devices(place, config.mesh.num_slices)
  check_devices(config, len(devices))
  jax.config.update("jax_enable_compilation_cache", False)  # which keeps no text of programs
  built, keep = noting(program.build(config, devices, size)), config.compile.compiled_trainstep_file
  if keep:
    executable.check(built)
  start, lowered = time.process_time(), built.traced.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    made = report.exhausted(built, error, time.process_time() - start)
  else:
    made = report.of(built, compiled, time.process_time() - start)
    if keep:
      executable.save(keep, built, lowered, compiled)
  publish(made, config.compile.report_file)
  return 0 if made.fits else 1


def noting(built: Program) -> Program:
  """The same program; the axes of what it places are noted, for the report."""
  layout = Noting(built.layout.mesh, built.layout.rules, built.layout.idle)
  return dataclasses.replace(built, layout=layout)


def publish(made: Report, path: str) -> None:
  """Print a report, and keep it at `path` if that is one. Raises ConfigError."""
  print("\n".join(words.lines(made)), flush=True)
  if path:
    try:
      Path(path).expanduser().write_text(json.dumps(made.json(), indent=2) + "\n")
    except OSError as error:
      problem = f"{path} cannot be written ({error.strerror}); name a file that can"
      raise ConfigError("report_file", problem) from None
