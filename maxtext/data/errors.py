"""Documents that cannot be used: what is wrong with which, and how many a run may pass over."""

from __future__ import annotations

import math

from maxtext.errors import DataError
from maxtext.log import log

SHOWN = 20  # lines of the log; the rest are counted


class Damaged(Exception):
  """A document cannot be used: `where` says file and place in it."""

  def __init__(self, where: str, problem: str):
    super().__init__(where, problem)  # so that it survives pickling
    self.where, self.problem = where, problem


class Budget:
  """How many documents may be passed over: a number of them, or a share of those read."""

  def __init__(self, setting: str = "stop", documents: int = 0):
    """`setting` is data_errors; a share is of `documents`, a pass, until more than one is read."""
    self._setting, self.documents = setting, documents
    self.skipped = 0  # alike on all hosts, since it changes what follows
    self._blanked = 0
    self._last = ""

  def skip(self, error: Damaged, read: int, blanked: bool = False) -> None:
    """Pass over one document after `read`. Raises DataError where that is one too many.

    One that is `blanked` keeps its place in a row of this host's, as padding.
    """
    if blanked and error.where == self._last:  # in the next row again
      return
    self._last = error.where
    what = f"{error.where}: {error.problem}"
    if self._setting == "stop":
      raise DataError(f"{what}; mend it, or let a run pass over some by data_errors=NUMBER")
    limit = float(self._setting)
    allowed = limit if limit >= 1 else math.ceil(limit * max(read, self.documents))
    self.skipped += not blanked
    self._blanked += blanked
    count = self.skipped + self._blanked
    if count > allowed:
      raise DataError(f"{what}; with it {count} are damaged, data_errors={self._setting}")
    if count <= SHOWN or not count & (count - 1):
      log.warning("%s; passed over, %d of %d allowed", what, count, allowed)


def brief(error: BaseException) -> str:
  """What a library says of a file, in a line."""
  text = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
  return text if len(text) <= 160 else f"{text[:157]}..."
