"""What a checkpoint says of its arrays, and how that differs from what a run needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Array:
  """One array: its `path` ('params/norm.scale'), what it is, and the name it is `stored` under."""

  path: str
  shape: tuple[int, ...]
  dtype: str
  sharding: str
  stored: str

  def __str__(self) -> str:
    return f"{self.dtype} {shape_text(self.shape)}"


def shape_text(shape: Iterable[int]) -> str:
  """`[4 16]`, and `[]` for a scalar."""
  return f"[{' '.join(map(str, shape))}]"


def difference(there: Iterable[Array], here: Iterable[Array]) -> str | None:
  """In words how the arrays of a checkpoint (`there`) are not those asked for (`here`), or None.

  Names one array, one that both sides have if there is such a one, and says how many differ.
  """
  saved, asked = {a.path: a for a in there}, {a.path: a for a in here}
  both = sorted(saved.keys() & asked.keys())
  changed = [path for path in both if str(saved[path]) != str(asked[path])]
  missing, surplus = sorted(asked.keys() - saved.keys()), sorted(saved.keys() - asked.keys())
  count = len(changed) + len(missing) + len(surplus)
  if not count:
    return None
  total = f"{count} of {len(saved.keys() | asked.keys())} arrays differ"
  if changed:
    path = changed[0]
    return f"{path} is {saved[path]} in the checkpoint and {asked[path]} in this model; {total}"
  if missing:
    path = missing[0]
    return f"{path}, {asked[path]} in this model, is not in the checkpoint; {total}"
  path = surplus[0]
  return f"{path}, {saved[path]} in the checkpoint, is not in this model; {total}"
