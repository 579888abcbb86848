"""A step made twice from the same state and batch: a chip that computes wrongly says nothing, but
rarely errs twice in the same way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxtext.errors import Corrupt
from maxtext.training.loop import Step
from maxtext.training.state import State
from maxtext.training.step import Batch


class Twice:
  """A step that is made twice after every `period` steps; `finished` are done when it begins.

  Raises Corrupt where the two results have not the same bits. Takes memory for a second state, and
  waits for both.
  """

  def __init__(self, step: Step, period: int, finished: int, shardings: State):
    self._step, self._period, self._finished = step, period, finished
    self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
    self._digest = jax.jit(lambda made: jax.tree.map(digest, made))

  def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    self._finished += 1
    if self._finished % self._period:
      return self._step(state, batch)
    once = self._digest(self._step(self._copy(state), batch))
    made = self._step(state, batch)
    pairs = zip(_named(once), _named(self._digest(made)), strict=True)
    if differing := [name for (name, one), (_, other) in pairs if one != other]:
      more = f", and {len(differing) - 1} more arrays" if differing[1:] else ""
      raise Corrupt(
        f"step {self._finished - 1}, made twice, has two results: {differing[0]}{more} differ; a "
        "device of this run computes wrongly, look for it before the run goes on"
      )
    return made


def digest(x: jax.Array) -> jax.Array:
  """A number [] that changes with any single bit of an array, and computes the same on any mesh."""
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  places = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    places = places * 31 + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return (bits * (2 * places + 1)).sum(dtype=jnp.uint32)  # odd factors lose no bit


def _named(made: object) -> list[tuple[str, int]]:
  """The digests with the names of their arrays, parameters first."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(made))
  named = [(jax.tree_util.keystr(path[1:], simple=True, separator="."), x) for path, x in leaves]
  return sorted(((name, int(x)) for name, x in named), key=lambda n: not n[0].startswith("params."))
