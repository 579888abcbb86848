"""Whether two specs are of one model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def difference(here: Any, there: Any, path: str = "") -> str | None:
  """Where two specs differ, in words, or None; numbers may differ by rounding."""
  if dataclasses.is_dataclass(here) and type(here) is type(there):
    pairs = [(f.name, getattr(here, f.name), getattr(there, f.name)) for f in _fields(here)]
  elif isinstance(here, tuple) and isinstance(there, tuple) and len(here) == len(there):
    pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(here, there))]
  elif isinstance(here, float | int) and isinstance(there, float | int):
    return None if math.isclose(here, there, rel_tol=1e-12) else _said(here, there, path)
  else:
    return None if here == there else _said(here, there, path)
  parts = (difference(a, b, f"{path}.{name}".strip(".")) for name, a, b in pairs)
  return next((part for part in parts if part), None)


def _fields(value: Any) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(value)


def _said(here: Any, there: Any, path: str) -> str:
  return f"{path or 'it'} is {_brief(here)} here and {_brief(there)} there"


def _brief(value: Any) -> str:
  return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)[:60]
