"""python -m maxtext.explain KEY [config.yml] [key=value ...]

Prints what a key means, its type and value, and every place that sets it; without KEY, all keys.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from maxtext.config import documents, loading
from maxtext.config.complaints import Complaint, lines
from maxtext.config.sections import HINTS, SECTION_OF, hint_of
from maxtext.config.values import brief, render, words
from maxtext.errors import ConfigError, closest, run_cli


def main(argv: list[str]) -> int:
  """Print one key, or all of them; returns 2 where the configuration is wrong otherwise."""
  if not argv or {"-h", "--help"} & set(argv):
    print(__doc__)
    print(overview())
    return 0
  key, *rest = argv
  if key not in SECTION_OF:
    offer = closest(key, SECTION_OF) or "; `python -m maxtext.explain` lists all keys"
    raise ConfigError(f"command line  {brief(key)}", f"no such key{offer}")
  found: list[Complaint] = []
  print("\n".join(explain(key, rest, os.environ, found)))
  if found:
    print("\n".join(lines(found)), file=sys.stderr)
  return 2 if found else 0


def explain(
  key: str, argv: Sequence[str], environ: Mapping[str, str], found: list[Complaint]
) -> list[str]:
  """A key's meaning, type, value, and the places that set it, the one that counts first."""
  _, history = loading.trace(argv, environ, found.append)
  values, _ = loading.typed(history, found.append)
  places = [(s.where, f"{s.typed}: {s.text}") for s in reversed(history[key])]
  width = max(len(where) for where, _ in places)
  return [
    f"{key} ({SECTION_OF[key]})",
    f"  meaning  {meanings()[key]}",
    f"  type     {words(hint_of(key))}",
    f"  value    {render(values[key])}",
    *(
      f"  {'set by' if i == 0 else 'over':<7}  {where:<{width}}  {text}"
      for i, (where, text) in enumerate(places)
    ),
  ]


def overview() -> str:
  """All keys by section, each with its meaning."""
  known, width = meanings(), max(map(len, SECTION_OF))
  return "\n".join(
    f"{section}\n" + "\n".join(f"  {key:<{width}}  {known[key]}" for key in hints)
    for section, hints in HINTS.items()
  )


def meanings() -> dict[str, str]:
  """The comment that follows each key in base.yml."""
  text = (documents.PACKAGED / "base.yml").read_text(encoding="utf-8")
  return dict(re.findall(r"^ +(\w+):.*?\s# (.+)$", text, re.MULTILINE))


if __name__ == "__main__":
  run_cli(main)
