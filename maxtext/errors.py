"""Errors that a user can act on, each with the exit code of the process that it ends."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class Restart(UserError):
  """Nothing is wrong with the run itself: start it again, and it continues."""

  exit_code = 75


def closest(name: str, known: Iterable[str]) -> str:
  """`, did you mean 'x'?` when one of `known` is like `name`, else the empty string."""
  match = difflib.get_close_matches(name, [str(k) for k in known], n=1)
  return f", did you mean '{match[0]}'?" if match else ""
