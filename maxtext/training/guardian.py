"""What a step does about a loss or a gradient that stands out: it is judged before it is applied.

The judgement is a part of the compiled step, from numbers that the state carries: nothing is
compiled anew as limits move, no step waits for the host, and a resumed run judges as if it had
never ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxtext.training.state import Params, State

# A spread below this share of the median is taken for as much: losses, which differ little, and
# norms of gradients, of which one in some thousands is twice the median by itself.
FLOORS = (0.02, 0.5)
ROWS = ("loss", "grad_norm", "skipped")  # of a history
JUDGED = ("loss_zscore", "grad_norm_zscore", "skips")  # what `judge` says, in this order


@dataclasses.dataclass(frozen=True)
class Guard:
  """Norms are reported of gradients that are not applied, of each layer of the `stacked`
  parameters.

  With a `factor` nothing is applied that is so many deviations above the last `interval` steps, or
  is not finite.
  """

  stacked: Collection[str] = ()
  interval: int = 0
  factor: float = 0.0

  def history(self) -> jax.Array | None:
    """That of no step: [3 n], ROWS by step modulo n; NaN where nothing is known."""
    return jnp.full((len(ROWS), self.interval), jnp.nan, jnp.float32) if self.factor else None

  def judge(self, state: State, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, State]:
    """(JUDGED [3], the state that knows of this step): z-scores over median and median absolute
    deviation, and how many steps of the window, this one included, are not applied.

    Judged is from when half of the window is known. Numbers that are not finite have an infinite
    score and are not remembered. Needs a history.
    """
    assert state.history is not None
    numbers, known = jnp.stack([loss, norm]).astype(jnp.float32), state.history[:2]
    middle = median(known)
    spread = 1.4826 * median(jnp.abs(known - middle[:, None]))
    scores = (numbers - middle) / jnp.maximum(spread, jnp.array(FLOORS) * jnp.abs(middle) + 1e-30)
    enough = jnp.isfinite(known).sum(axis=1) >= -(-self.interval // 2)
    finite = jnp.isfinite(numbers)
    scores = jnp.where(finite, jnp.where(enough, scores, 0.0), jnp.inf)
    entry = jnp.append(jnp.where(finite, numbers, jnp.nan), (scores > self.factor).any())
    history = state.history.at[:, state.step % self.interval].set(entry)
    judged = jnp.append(scores, jnp.nansum(history[2]))
    return judged, dataclasses.replace(state, history=history)

  def norms(self, grads: Params) -> jax.Array:
    """The norms of all gradients [n]: by name, and of those that are stacked layer by layer."""
    parts = []
    for name in sorted(grads):
      squares = jnp.square(grads[name].astype(jnp.float32))
      axes = tuple(range(name in self.stacked, squares.ndim))
      parts.append(jnp.atleast_1d(jnp.sqrt(squares.sum(axis=axes))))
    return jnp.concatenate(parts)

  def named(self, norms: np.ndarray, shapes: Mapping[str, Any]) -> dict[str, float | list[float]]:
    """What `norms` has computed, by the parameters' names."""
    found, rest = {}, norms.tolist()
    for name in sorted(shapes):
      layers = shapes[name].shape[0] if name in self.stacked else 1
      mine, rest = rest[:layers], rest[layers:]
      found[name] = mine if name in self.stacked else mine[0]
    return found


def median(x: jax.Array) -> jax.Array:
  """[r n] -> [r], of what is finite; what jnp.nanmedian sorts for takes three times as long."""
  known = jnp.isfinite(x)
  largest = jax.lax.top_k(jnp.where(known, x, -jnp.inf), x.shape[1] // 2 + 1)[0]
  count = known.sum(axis=1, keepdims=True)
  places = jnp.concatenate([jnp.maximum(count - 1, 0) // 2, count // 2], axis=1)
  return jnp.take_along_axis(largest, places, axis=1).mean(axis=1)


def passed(state: State) -> State:
  """The state after a step that was not applied: it counts, also in the schedule of the rate."""
  scheduled = lambda part: isinstance(part, optax.ScaleByScheduleState)
  count = lambda part: part._replace(count=part.count + 1) if scheduled(part) else part
  opt_state = jax.tree.map(count, state.opt_state, is_leaf=scheduled)
  return dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)
