"""What is wrong with a configuration: one line each, in the words of the person who wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

LONGEST = 300  # characters of a line


@dataclasses.dataclass(frozen=True)
class Complaint:
  """Where a setting stands, its key as typed there, and what is wrong and would be right."""

  where: str
  key: str
  problem: str


Complain = Callable[[Complaint], None]


def lines(complaints: Iterable[Complaint]) -> list[str]:
  """The complaints, each once, with the places in a column of their own."""
  unique = list(dict.fromkeys(complaints))
  width = max((len(c.where) for c in unique if len(c.where) <= 40), default=0)
  return [_line(complaint, width) for complaint in unique]


def _line(complaint: Complaint, width: int) -> str:
  key = f"{complaint.key}: " if complaint.key else ""
  text = f"{complaint.where:<{width}}  {key}{complaint.problem}"
  return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
