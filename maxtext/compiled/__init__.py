"""A step that is compiled and not run: what it takes, what it sends, how long it should take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from maxtext import log as logs
from maxtext import program, topology
from maxtext.compiled import executable, plot, report, words
from maxtext.compiled.origins import Noting
from maxtext.compiled.report import Report
from maxtext.config import Config, check_devices
from maxtext.data.pipeline import vocabulary
from maxtext.errors import ConfigError
from maxtext.program import Program

__all__ = ["Report", "compile_for", "keep", "publish", "report", "reported"]


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
  built, path = noting(program.build(config, devices, size)), config.compile.compiled_trainstep_file
  if path:
    executable.check(built)
  start, lowered = time.process_time(), built.traced.lower()
  try:
    compiled = executable.compile_step(built, lowered)
  except jax.errors.JaxRuntimeError as error:
    made = report.exhausted(built, error, time.process_time() - start)
  else:
    made = report.of(built, compiled, time.process_time() - start)
    if path:
      executable.save(path, built, lowered, compiled)
  publish(made, config.compile.report_file)
  return 0 if made.fits else 1


def noting(built: Program) -> Program:
  """The same program; the axes of what it places are noted, for the report."""
  layout = Noting(built.layout.mesh, built.layout.rules, built.layout.idle)
  return dataclasses.replace(built, layout=layout)


@contextlib.contextmanager
def reported(built: Program, step: Callable[[], Any | None]) -> Iterator[None]:
  """While inside, what does not fit into memory ends in the report, as far as `step` is compiled,
  and in a ConfigError.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    made = report.exhausted(built, error, 0.0)
    if (compiled := step()) is not None:
      known = report.of(built, compiled, 0.0)
      made = dataclasses.replace(known, advice=made.advice, problem=made.problem)
    if jax.process_index() == 0:
      publish(made, built.config.compile.report_file)
    raise ConfigError(
      "per_device_batch_size",
      f"the run needs more memory than a device has ({made.problem[:120]}); lower it or "
      "max_target_length, take remat_policy=full, or split the model",
    ) from error


def publish(made: Report, path: str) -> None:
  """Print a report, and keep it at `path` if that is one. Raises ConfigError."""
  print("\n".join(words.lines(made)), flush=True)
  keep(made, path)


def keep(made: Report, path: str) -> None:
  """Write a report as JSON to `path`, if that is one, and beside it what is drawn of it."""
  if not path:
    return
  place = Path(path).expanduser()
  try:
    place.write_text(json.dumps(made.json(), indent=2) + "\n")
    place.with_suffix(".html").write_text(plot.page(made, list(words.lines(made))))
  except OSError as error:
    problem = f"{path} cannot be written ({error.strerror}); name a file that can"
    raise ConfigError("report_file", problem) from None
