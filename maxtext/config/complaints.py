"""What is wrong with a configuration: one line each, in the words of the person who wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

ENVIRONMENT, COMMAND_LINE = "environment", "command line"
LONGEST = 300  # characters of a line


@dataclasses.dataclass(frozen=True)
class Complaint:
  """Where a setting stands, its key as typed there, and what is wrong and would be right."""

  where: str
  key: str
  problem: str


class Lost(Complaint):
  """A whole file cannot be read: what depends on the values in it is not known."""


Complain = Callable[[Complaint], None]


def lines(complaints: Iterable[Complaint]) -> list[str]:
  """The complaints, each once, in the order of their places, which have their own column."""
  unique = sorted(dict.fromkeys(complaints), key=_order)
  width = max((len(c.where) for c in unique if len(c.where) <= 40), default=0)
  return [_line(complaint, width) for complaint in unique]


def _order(complaint: Complaint) -> tuple[int, str, int]:
  """Files first, by line, then the environment, then the command line."""
  last = (ENVIRONMENT, COMMAND_LINE)
  if complaint.where in last:
    return (1 + last.index(complaint.where), "", 0)
  path, _, line = complaint.where.rpartition(":")
  return (0, path, int(line)) if line.isdigit() else (0, complaint.where, 0)


def _line(complaint: Complaint, width: int) -> str:
  key = f"{complaint.key}: " if complaint.key else ""
  text = f"{complaint.where:<{width}}  {key}{complaint.problem}"
  return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
