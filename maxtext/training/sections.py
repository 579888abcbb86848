"""Settings of the training step, the optimizer, the evaluation and what is shown of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from maxtext.bounds import LARGEST, Bound, Count, CountOrOff, Fraction, NotNegative, Positive, Whole

Beta = Annotated[float, Bound(0, 1)]


@dataclasses.dataclass(frozen=True)
class Training:
  steps: Count
  per_device_batch_size: Positive
  max_target_length: Count
  gradient_accumulation_steps: Count
  z_loss_multiplier: NotNegative
  mtp_loss_scaling_factor: NotNegative
  load_balance_loss_weight: NotNegative
  routed_bias_update_rate: NotNegative
  abort_on_nan_loss: bool
  abort_on_inf_loss: bool
  skip_step_on_spikes: bool
  skip_step_interval: Annotated[int, Bound(4, LARGEST)]
  skip_step_scaling_factor: Positive
  skip_step_limit: Whole
  rollback_limit: Whole
  determinism_check_period: CountOrOff
  enable_dropout: bool

  def micro_batch(self, devices: int) -> int:
    """Rows of one forward pass on all devices together."""
    return rows(self.per_device_batch_size, devices)

  def global_batch(self, devices: int) -> int:
    """Rows that one step trains on."""
    return self.micro_batch(devices) * self.gradient_accumulation_steps


def rows(per_device: float, devices: int) -> int:
  """`per_device` rows, maybe a fraction, on each of `devices`; 0 where that is no whole number."""
  n = round(per_device * devices)
  return n if abs(n - per_device * devices) < 1e-6 * devices else 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  opt_type: Literal["adamw", "sgd"]
  learning_rate: NotNegative
  lr_schedule_type: Literal["cosine", "linear", "constant", "wsd"]
  warmup_steps_fraction: Fraction
  learning_rate_final_fraction: Fraction
  learning_rate_schedule_steps: CountOrOff
  wsd_decay_steps_fraction: Fraction
  adam_b1: Beta
  adam_b2: Beta
  adam_eps: Positive
  adam_weight_decay: NotNegative
  adamw_mask: tuple[str, ...]
  mu_dtype: Literal["float32", "bfloat16"] | None
  gradient_clipping_threshold: NotNegative
  optimizer_memory_host_offload: bool

  def complaints(self) -> Iterator[tuple[str, ...]]:
    for beta in ("adam_b1", "adam_b2"):
      if getattr(self, beta) == 1:
        yield beta, "1 never forgets the first gradient; use a fraction below 1"
    if (
      self.lr_schedule_type == "wsd"
      and self.warmup_steps_fraction + self.wsd_decay_steps_fraction > 1
    ):
      yield (
        "wsd_decay_steps_fraction",
        f"warmup {self.warmup_steps_fraction:g} and decay {self.wsd_decay_steps_fraction:g} are "
        "together more than the whole schedule; make their sum at most 1",
        "warmup_steps_fraction",
      )
    for pattern in self.adamw_mask:
      try:
        re.compile(pattern)
      except re.error as e:
        yield "adamw_mask", f"{pattern[:60]!r} is not a regular expression: {e}; correct it"


@dataclasses.dataclass(frozen=True)
class Eval:
  eval_interval: CountOrOff
  eval_steps: CountOrOff
  eval_per_device_batch_size: NotNegative
  target_eval_loss: NotNegative
  eval_sample_prompt: str
  eval_sample_length: Whole

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.target_eval_loss and self.eval_interval < 1:
      yield (
        "target_eval_loss",
        "without evaluation no loss can reach the target; set eval_interval, or target_eval_loss=0",
        "eval_interval",
      )

  def batch(self, training: Training, devices: int) -> int:
    """Rows of one evaluation batch on all devices together."""
    return rows(self.eval_per_device_batch_size or training.per_device_batch_size, devices)


@dataclasses.dataclass(frozen=True)
class Observe:
  log_period: Count
  enable_tensorboard: bool
  metrics_file: str
  progress_bar: Literal["auto", "on", "off"]
  record_internal_nn_metrics: bool
  enable_goodput_recording: bool
  watchdog_timeout_seconds: NotNegative
  watchdog_restart: bool
