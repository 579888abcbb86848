"""Settings of when checkpoints are written, how many stay and what a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from maxtext.bounds import Count, CountOrOff, Whole


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  enable_checkpointing: bool
  async_checkpointing: bool
  checkpoint_period: Count
  max_num_checkpoints_to_keep: CountOrOff
  checkpoint_keep_period: CountOrOff
  checkpoint_keep_best: Whole
  save_checkpoint_on_start: bool
  save_checkpoint_on_completion: bool
  load_parameters_path: str
  load_full_state_path: str
  checkpoint_storage_use_ocdbt: bool
  checkpoint_storage_use_zarr3: bool
  enable_continuous_checkpointing: bool
  enable_single_replica_ckpt_restoring: bool
  enable_emergency_checkpoint: bool
  local_checkpoint_directory: str
  local_checkpoint_period: Whole

  @property
  def period(self) -> int:
    """Steps from one checkpoint to the next; 0: as soon as the last one is written."""
    return 0 if self.enable_continuous_checkpointing else self.checkpoint_period

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.load_parameters_path and self.load_full_state_path:
      yield (
        "load_parameters_path",
        "a run starts from parameters or from a full state, not from both; leave one of "
        "load_parameters_path and load_full_state_path empty",
        "load_full_state_path",
      )
    local, period = "local_checkpoint_directory", "local_checkpoint_period"
    wanted, missing = self.enable_emergency_checkpoint, "enable_emergency_checkpoint"
    for key in (local, period):
      if wanted and not getattr(self, key):
        yield missing, f"needs a {key}; set it, or {missing}=false", key
    if wanted and self.local_checkpoint_period >= self.period > 0:
      yield (
        period,
        f"{self.local_checkpoint_period} is no less than checkpoint_period="
        f"{self.checkpoint_period}, whose checkpoints would always be nearer; use less",
        "checkpoint_period",
      )
