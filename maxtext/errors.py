"""Errors that a user can act on, each with the exit code of the process that it ends."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
  """The base of every error that ends a run with one line and `exit_code`, not with a traceback."""

  exit_code = 1


class ConfigError(UserError, ValueError):
  """A setting is wrong: `where` names it, `problem` says what it is and what would be right."""

  exit_code = 2

  def __init__(self, where: str, problem: str):
    super().__init__(f"{where}: {problem}")
    self.where, self.problem = where, problem


class ConfigErrors(ConfigError):
  """Every complaint of one configuration, one line each."""

  def __init__(self, lines: Iterable[str]):
    self.lines = tuple(lines)
    UserError.__init__(self, "\n".join(self.lines))
    self.where, self.problem = "configuration", str(self)


class DataError(UserError):
  """The data cannot be read, or not as it was before."""

  exit_code = 3


class CheckpointError(UserError):
  """A checkpoint cannot be written, or is not what the run needs."""

  exit_code = 4


class Diverged(UserError):
  """The loss or the gradients are not finite any more; the optimizer was not applied."""

  exit_code = 5


class Corrupt(UserError):
  """The same computation had two results: a machine that is not to be trusted."""

  exit_code = 6


class Restart(UserError):
  """Nothing is wrong with the run itself: start it again, and it continues."""

  exit_code = 75


def closest(name: str, known: Iterable[str]) -> str:
  """`, did you mean 'x'?` when one of `known` is like `name`, else the empty string."""
  match = difflib.get_close_matches(name, [str(k) for k in known], n=1)
  return f", did you mean '{match[0]}'?" if match else ""


def run_cli(main: Callable[[list[str]], int]) -> NoReturn:
  """Run an entry point and exit with its code or its error's; `debug=true` adds the traceback."""
  argv = sys.argv[1:]
  try:
    code = main(argv)
    sys.stdout.flush()
  except UserError as error:
    if _debugging(argv):
      traceback.print_exc()
    print(error, file=sys.stderr)
    code = error.exit_code
  except KeyboardInterrupt:
    code = 130
  except BrokenPipeError:  # the reader went away (`| head`): nothing is wrong, and nobody listens
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 141
  except Exception as error:  # a defect of ours, said as briefly as what a user may cause
    if _debugging(argv):
      traceback.print_exc()
    what = (str(error).strip().splitlines() or [""])[0][:200]
    print(f"unexpected {type(error).__name__}: {what} (debug=true shows where)", file=sys.stderr)
    code = 1
  sys.exit(code)


def _debugging(argv: list[str]) -> bool:
  return "debug=true" in argv or logging.getLogger("maxtext").isEnabledFor(logging.DEBUG)
