"""A compiled step in a file: `compile` keeps it, and `train` takes it instead of compiling anew."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from maxtext import __version__
from maxtext.config.config import SHAPING
from maxtext.config.sections import SECTION_OF
from maxtext.config.values import brief
from maxtext.errors import ConfigError
from maxtext.program import Program

KEY = "compiled_trainstep_file"
DIGEST = "sha256 of the step"
PACKAGES = ("jax", "jaxlib", "libtpu")
STEPS = (*SHAPING, "kernel", "mesh")
AGAIN = "compile it anew by python -m maxtext.compile, or leave the key away"


def compile_step(built: Program, lowered: Any) -> Any:
  """The step, compiled; raises ConfigError for an option that its compiler does not take."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    word = str(error).splitlines()[0]
    for name, value in built.config.compile.options().items():
      if word.startswith("INVALID_ARGUMENT") and re.search(rf"\b{name}\b", word):
        problem = "this compiler has no such option; leave it away, or name another"
        if "No such" not in word:
          problem = "this option cannot take the value; write one that it can"
        where = f"--{name}={brief(value, 60)}"
        raise ConfigError("compile_xla_flags", f"{where}: {problem}") from None
    raise


def save(path: str, built: Program, lowered: Any, compiled: Any) -> None:
  """Write a step, to be loaded for the same program, devices and versions. Raises ConfigError."""
  check(built)
  payload, _, _ = serialize_executable.serialize(compiled)
  head = {"config": built.config.resolved(), DIGEST: hashlib.sha256(payload).hexdigest()}
  head |= facts(built, lowered)
  try:
    Path(path).expanduser().write_bytes(json.dumps(head).encode() + b"\n" + payload)
  except OSError as error:
    problem = f"{path} cannot be written ({error.strerror}); name a file that can"
    raise ConfigError(KEY, problem) from None


def load(path: str, built: Program, lowered: Any) -> Any:
  """The step that stands there, if it is this one. Raises ConfigError, saying what is another."""
  check(built)
  try:
    head, _, payload = Path(path).expanduser().read_bytes().partition(b"\n")
    kept = json.loads(head)
    known, digest = kept["config"], kept[DIGEST]
  except (OSError, ValueError, KeyError, TypeError) as error:
    what = error.strerror if isinstance(error, OSError) else "is no compiled step, or is damaged"
    raise ConfigError(KEY, f"{path}: {what}; {AGAIN}") from None
  if hashlib.sha256(payload).hexdigest() != digest:
    raise ConfigError(KEY, f"{path}: the file is damaged; {AGAIN}")
  for name, value in facts(built, lowered).items():
    if (was := kept.get(name)) != value:
      differs = f"{was}, here {value}" if name != "program" else _changes(built, known)
      raise ConfigError(KEY, f"{path} was compiled for another {name} ({differs}); {AGAIN}")
  devices = list(built.layout.mesh.devices.flat)
  return serialize_executable.deserialize_and_load(
    payload, lowered.in_tree, lowered.out_tree, execution_devices=devices
  )


def _changes(built: Program, known: str) -> str:
  """What the configuration had otherwise, in sections that shape a step."""
  changes = [change for change in built.config.changes(known) if SECTION_OF[change[0]] in STEPS]
  said = [f"{key}={old}, here {new}" for key, old, new in changes]
  return "; ".join(said[:3]) or "the same configuration, by other code"


def facts(built: Program, lowered: Any) -> dict[str, str]:
  """What a compiled step is good for."""
  mesh = built.layout.mesh
  first = mesh.devices.flat[0]
  versions = {n: _version(n) for n in PACKAGES if n != "libtpu" or first.platform == "tpu"}
  options = built.config.compile.options(first.device_kind)
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  return {
    "version of maxtext": __version__,
    **{f"version of {name}": version for name, version in versions.items()},
    "kind of devices": first.device_kind,
    "number of devices": str(mesh.size),
    "mesh": sizes,
    "compile_xla_flags": " ".join(f"--{name}={value}" for name, value in options.items()),
    "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
  }


def check(built: Program) -> None:
  """Refuse what cannot be kept: XLA's CPU backend loses the order of a kept program's collectives,
  whose devices then wait for each other.
  """
  mesh = built.layout.mesh
  if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
    raise ConfigError(KEY, "a step for several CPU devices cannot be kept; leave the key away")


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return "none"
