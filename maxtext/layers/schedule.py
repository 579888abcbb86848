"""How layers and microbatches go through the stages of a pipeline: arithmetic, without jax."""

from __future__ import annotations

import dataclasses

STAGE = "stage"  # the mesh axis


@dataclasses.dataclass(frozen=True)
class Schedule:
  """`microbatches` go through `stages` of `layers` each, `repeats` times round: the first time
  through the first stages * layers layers, and so on.

  What a stage makes is with the next one `hop` ticks later: 1, or 2 where it travels while both
  work on something else.
  """

  stages: int
  repeats: int
  layers: int
  microbatches: int
  hop: int = 1

  @property
  def waiting(self) -> int:
    """Microbatches that wait at each stage for the first one."""
    return self.microbatches // self.stages

  @property
  def late(self) -> int:
    """Ticks until what the first stage was given arrives at the last one."""
    return self.hop * (self.stages - 1)

  @property
  def turns(self) -> int:
    """How often what waits has moved in these."""
    return self.late // self.waiting

  @property
  def ticks(self) -> int:
    """Of a whole step, forward."""
    return self.repeats * self.microbatches + self.late

  @property
  def bubble(self) -> float:
    """The share of its time in which a stage has nothing to do."""
    return self.late / self.ticks

  def __str__(self) -> str:
    """What a run prints of it."""
    times = f", each {self.repeats} times through" if self.repeats > 1 else ""
    return (
      f"pipeline: {self.stages} stages, {self.microbatches} microbatches{times}; "
      f"a stage is idle for {self.bubble:.0%} of its time (the bubble)"
    )
