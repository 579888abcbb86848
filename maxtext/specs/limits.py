"""What a number in a spec must at least be."""

from __future__ import annotations

from maxtext.errors import ConfigError


def at_least(spec: object, low: int, *names: str) -> None:
  for name in names:
    if getattr(spec, name) < low:
      raise ConfigError(name, f"{getattr(spec, name):g} is not at least {low}")


def above(spec: object, low: float, *names: str, other: str = "") -> None:
  for name in names:
    if getattr(spec, name) <= low:
      least = f"{other}={low:g}" if other else f"{low:g}"
      raise ConfigError(name, f"{getattr(spec, name):g} is not above {least}")
