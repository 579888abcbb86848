"""Whether Kubernetes takes a manifest, by configs/launch/manifest.yml; and one laid over it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
WORD = r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?"
FORMS = {  # what is text of a form: its words, and the form
  "label": ("a name of a-z, 0-9 and -, at most 63", LABEL),
  "mark": ("a label of letters, digits, - _ and ., at most 63", rf"(?=.{{0,63}}$){WORD}"),
  "text": ("text", r"(?s).*"),
}
QUANTITY = r"\d+(\.\d+)?([numkMGTPE]|[KMGTPE]i)?"


def problems(value: Any, kind: Any, kinds: Mapping[str, Any], at: str = "") -> Iterator[str]:
  """What is wrong with `value` as a `kind`, a line each: `spec.replicas: 'x' is not a number`."""
  if isinstance(kind, str) and kind in kinds:
    kind = kinds[kind]
  if isinstance(kind, dict):
    yield from _fields(value, kind, kinds, at)
  elif isinstance(kind, list):
    if not isinstance(value, list):
      yield f"{at}: is not a list"
      return
    for i, item in enumerate(value):
      yield from problems(item, kind[0], kinds, f"{at}[{i}]")
  elif kind.startswith("{"):
    if not isinstance(value, dict):
      yield f"{at}: is not a mapping"
      return
    for name, item in value.items():
      yield from problems(item, kind[1:-1], kinds, f"{at}.{name}")
  elif problem := _unfit(value, kind):
    yield f"{at}: {_plain(value)[:70]!r} {problem}"


def _plain(value: Any) -> str:
  """A value as it may stand in YAML."""
  return str(value).lower() if isinstance(value, bool) else str(value)


def _fields(
  value: Any, fields: Mapping[str, Any], kinds: Mapping[str, Any], at: str
) -> Iterator[str]:
  if not isinstance(value, dict):
    yield f"{at}: is not a mapping"
    return
  known = {name.rstrip("!"): kind for name, kind in fields.items()}
  for name in fields:
    if name.endswith("!") and name[:-1] not in value:
      yield f"{at}: has no {name[:-1]}"
  for name, item in value.items():
    if name not in known:
      yield f"{at}.{name}: there is no such field"
    else:
      yield from problems(item, known[name], kinds, f"{at}.{name}".lstrip("."))


def _unfit(value: Any, kind: str) -> str:
  """Why a single value is none of its kind; empty if it is."""
  number = isinstance(value, int) and not isinstance(value, bool)
  if kind == "any":
    return ""
  if kind == "switch":
    return "" if isinstance(value, bool) else "is neither true nor false"
  if kind == "number":
    return "" if number and value >= 0 else "is not a whole number"
  if kind == "port":
    return "" if number and 0 < value < 65536 else "is not the number of a port"
  if kind == "quantity":
    good = number or (isinstance(value, str) and re.fullmatch(QUANTITY, value))
    return "" if good else "is not a quantity, as 4, 500m or 2Gi"
  if kind in FORMS:
    words, form = FORMS[kind]
    if isinstance(value, str):
      return "" if re.fullmatch(form, value) else f"is not {words}"
    single = not isinstance(value, dict | list)
    return f"is not {words}" + (f'; quote it, as "{_plain(value)}"' if single else "")
  allowed = [kind[1:]] if kind.startswith("=") else kind.split("|")
  return "" if value in allowed else f"is none of {', '.join(allowed)}"


def over(below: Any, above: Any) -> Any:
  """`above` laid over `below`: mappings merge, lists of what has names merge by these, null takes
  away, and all else replaces.
  """
  if isinstance(below, dict) and isinstance(above, dict):
    merged = {**below, **{k: over(below.get(k), v) for k, v in above.items()}}
    return {key: value for key, value in merged.items() if value is not None}
  if isinstance(below, list) and isinstance(above, list):
    if named(below + above):
      new = {item["name"]: item for item in above}
      kept = [over(item, new.pop(item["name"], {})) for item in below]
      return [*kept, *new.values()]
  return above


def named(items: Iterable[Any]) -> bool:
  """Whether all of them have names, by which they can be told apart."""
  return all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items)
