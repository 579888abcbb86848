"""Several processes that train as one; imports no jax until they join."""

from maxtext.hosts.group import (
  agree,
  alone,
  before_end,
  board,
  each,
  end,
  first,
  is_first,
  joined,
  named,
  number,
  say_end,
  stop_at,
  tell,
)
from maxtext.hosts.mirror import Home, Mirror, at_home
from maxtext.hosts.places import Place, find
from maxtext.hosts.sections import Hosts

__all__ = [
  "Home",
  "Hosts",
  "Mirror",
  "Place",
  "agree",
  "alone",
  "at_home",
  "before_end",
  "board",
  "each",
  "end",
  "find",
  "first",
  "is_first",
  "joined",
  "named",
  "number",
  "say_end",
  "stop_at",
  "tell",
]
