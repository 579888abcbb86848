"""`python -m maxtext.convert from_hf HF_DIR OUT`: models of the Hugging Face hub, in and out."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import NoReturn

from maxtext import inspect
from maxtext import log as logs
from maxtext.checkpoints.aside import abandon
from maxtext.errors import ConfigError, closest, run_cli

USAGE = """\
usage: python -m maxtext.convert from_hf HF_DIR OUT [key=value ...]
       python -m maxtext.convert to_hf RUN_OR_CHECKPOINT OUT [dtype=DTYPE] [max_shard_size=5GB]
       python -m maxtext.convert inspect RUN_OR_CHECKPOINT [hash=true]

from_hf makes a run's folder OUT of a model of the Hugging Face hub: a folder with config.json and
safetensors. `python -m decode OUT` continues texts with it, and load_parameters_path=OUT trains it
further (as load_parameters_path=HF_DIR does). key=value are keys of its configuration, such as
weight_dtype=float32; the architecture is the model's.
to_hf makes such a folder OUT of the newest checkpoint of a run, or of one checkpoint, in dtype
(float32, bfloat16 or float16; as it is, if you do not say).
Neither writes to an OUT that has something in it, and what fails leaves nothing behind.
Ends with 0: written; 2: configuration; 4: model or checkpoint."""


def main(argv: list[str]) -> int:
  """Convert as the arguments say; returns the exit code of the process. Raises UserError."""
  helped = {"-h", "--help"} & set(argv)
  if not argv or (helped and argv[0] != "inspect"):
    print(USAGE)
    return 0 if argv else 2
  commands: dict[str, Callable[[list[str]], int]] = {
    "from_hf": _from_hf,
    "to_hf": _to_hf,
    "inspect": inspect.main,
  }
  if argv[0] not in commands:
    offer = closest(argv[0], commands) or f"; there are {', '.join(commands)}"
    raise ConfigError("command line", f"{argv[0]!r}: no such command{offer}")
  return commands[argv[0]](argv[1:])


def cli() -> NoReturn:
  """Run as a program; asked to stop, it leaves nothing half written."""
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _stop)
  run_cli(main)


def _from_hf(argv: list[str]) -> int:
  source, out, words = _split(argv, "HF_DIR")
  conversion = _conversion("debug=true" in words)
  conversion.from_hf(source, out, words)
  return 0


def _to_hf(argv: list[str]) -> int:
  source, out, words = _split(argv, "RUN_OR_CHECKPOINT")
  options = dict(word.split("=", 1) for word in words)
  if len(options) < len(words):
    raise ConfigError("command line", f"{' '.join(words)}: give each option once")
  if unknown := sorted(options.keys() - {"dtype", "max_shard_size", "debug"}):
    known = ("dtype", "max_shard_size", "debug")
    near = closest(unknown[0], known)
    problem = f"{unknown[0]!r} is no option{near} ({', '.join(known)})"
    raise ConfigError("command line", problem)
  dtype = options.get("dtype")
  if dtype not in (None, "float32", "bfloat16", "float16"):
    raise ConfigError("dtype", f"{dtype!r} is none of float32, bfloat16, float16")
  if (debug := options.get("debug", "false")) not in ("true", "false"):
    raise ConfigError("debug", f"{debug!r} is not true or false")
  shard = _bytes(options.get("max_shard_size", "5GB"))
  conversion = _conversion(debug == "true")
  conversion.to_hf(source, out, dtype, shard)
  return 0


def _split(argv: list[str], source: str) -> tuple[str, str, list[str]]:
  """The two folders and what is key=value."""
  words = [word for word in argv if re.match(r"\w+=", word) and not os.path.exists(word)]
  folders = [word for word in argv if word not in words]
  if len(folders) != 2:
    given = " ".join(folders) or "nothing"
    raise ConfigError("command line", f"give {source} and OUT, and key=value; there is {given}")
  return folders[0], folders[1], words


def _bytes(text: str) -> int:
  """`500MB` -> 500000000."""
  found = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
  if found is None or int(found[1]) == 0:
    raise ConfigError("max_shard_size", f"{text!r} is no size; write 5GB, or 500MB")
  return int(found[1]) * 10 ** {"KB": 3, "MB": 6, "GB": 9}[found[2]]


def _conversion(debug: bool) -> ModuleType:
  """The module, which imports jax: after the arguments are known to be right, and for a CPU."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  from maxtext import conversion

  logs.start(debug=debug)
  return conversion


def _stop(number: int, _frame: FrameType | None) -> None:
  """End here: an exception would be lost where a callback of jax's is what runs."""
  abandon()
  os._exit(128 + number)


if __name__ == "__main__":
  cli()
