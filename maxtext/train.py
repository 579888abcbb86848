"""`python -m train config.yml key=value`: load the configuration, then train."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from maxtext import config, hardware, hosts, signals
from maxtext.errors import ConfigError, Restart, run_cli

USAGE = """\
usage: python -m train CONFIG.yml [key=value ...]

Trains the run that CONFIG.yml describes, or goes on with it if it has begun: runs of the same
run_name are one run.
  python -m train configs/quickstart.yml steps=20
  python -m maxtext.explain KEY CONFIG.yml ...     what a key means, its value and where it comes
  from
Ends with 0: finished, or saved on SIGTERM; 2: configuration; 3: data; 4: checkpoint; 5: diverged;
6: a device computes wrongly; 75: start again."""


def main(argv: list[str]) -> int:
  """Train as the arguments say; returns the exit code of the process. Raises UserError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE)
    return 0 if argv else 2
  again = f"exit_code_when_stopped={Restart.exit_code}" in argv  # known before all else is
  with signals.Early(Restart.exit_code if again else 0) as early:
    loaded, place = _load(argv)
    early.code = loaded.hosts.exit_code_when_stopped
    from maxtext import trainer  # imports jax: not before the configuration is known to be right

    return trainer.train(loaded, place)


def _load(argv: list[str]) -> tuple[config.Config, hosts.Place | None]:
  """The configuration, whose hardware is prepared, and this process's place among several, who are
  told of what is wrong here. Raises ConfigErrors.
  """
  section = None
  try:
    loaded = config.load(argv)
    section = loaded.hosts
    place = hosts.find(os.environ, section, loaded.run.hardware)
    hardware.prepare(loaded.run, several=place is not None)
  except ConfigError as error:
    section = section or config.load([], {}).hosts
    with contextlib.suppress(ConfigError):  # it is among the complaints
      if place := hosts.find(os.environ, section):
        print(error, file=sys.stderr, flush=True)  # before it waits for the others
        hosts.tell(place, section, error)
        raise SystemExit(error.exit_code) from None
    raise
  return loaded, place


def cli() -> NoReturn:
  """Run as a program."""
  run_cli(main)


if __name__ == "__main__":
  cli()
