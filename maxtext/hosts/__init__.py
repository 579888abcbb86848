"""Several processes that train as one; imports no jax until they join."""

from maxtext.hosts.group import agree, before_end, first, is_first, joined, say_end, stop_at, tell
from maxtext.hosts.places import Place, find
from maxtext.hosts.sections import Hosts

__all__ = [
  "Hosts",
  "Place",
  "agree",
  "before_end",
  "find",
  "first",
  "is_first",
  "joined",
  "say_end",
  "stop_at",
  "tell",
]
