"""`python -m train config.yml key=value`: load the configuration, then train."""

from __future__ import annotations

import sys

from maxtext import config, errors

USAGE = """\
usage: python -m train CONFIG.yml [key=value ...]

Trains the run that CONFIG.yml describes, or goes on with it if it has begun: runs of the same run_name are one run.
  python -m train configs/quickstart.yml steps=20
  python -m maxtext.explain KEY CONFIG.yml ...     what a key means, its value and where it comes from
Ends with 0: finished, or saved on SIGTERM; 2: configuration; 3: data; 4: checkpoint; 5: diverged; 75: start again."""


def main(argv: list[str] | None = None) -> int:
  """Train as the arguments say; returns the exit code of the process."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help"):
    print(USAGE)
    return 0 if argv else 2
  return errors.exit_code(run, argv)


def run(argv: list[str]) -> int:
  """Train; raises UserError."""
  loaded = config.load(argv)
  from maxtext import hardware

  hardware.prepare(loaded.run)
  from maxtext import trainer  # imports jax: not before the configuration is known to be right

  return trainer.train(loaded)


if __name__ == "__main__":
  sys.exit(main())
