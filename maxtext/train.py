"""`python -m train config.yml key=value`: load the configuration, then train."""

from __future__ import annotations

from typing import NoReturn

from maxtext import config, hardware, signals
from maxtext.errors import run_cli

USAGE = """\
usage: python -m train CONFIG.yml [key=value ...]

Trains the run that CONFIG.yml describes, or goes on with it if it has begun: runs of the same
run_name are one run.
  python -m train configs/quickstart.yml steps=20
  python -m maxtext.explain KEY CONFIG.yml ...     what a key means, its value and where it comes
  from
Ends with 0: finished, or saved on SIGTERM; 2: configuration; 3: data; 4: checkpoint; 5: diverged;
75: start again."""


def main(argv: list[str]) -> int:
  """Train as the arguments say; returns the exit code of the process. Raises UserError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE)
    return 0 if argv else 2
  with signals.Early():
    loaded = config.load(argv)
    hardware.prepare(loaded.run)
    from maxtext import trainer  # imports jax: not before the configuration is known to be right

    return trainer.train(loaded)


def cli() -> NoReturn:
  """Run as a program."""
  run_cli(main)


if __name__ == "__main__":
  cli()
