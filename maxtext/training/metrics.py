"""What a run says of itself: its scalars, the lines that scripts grep, and where they go."""

from __future__ import annotations

import array
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from maxtext.errors import ConfigError
from maxtext.log import log
from maxtext.training import histograms
from maxtext.training.guardian import JUDGED
from maxtext.training.metrics_file import MetricsFile
from maxtext.training.sections import Observe
from maxtext.training.tensorboard import Events

_GROUPS = {
  "learning": (
    "loss",
    "lm_loss",
    "perplexity",
    "z_loss",
    "moe_lb_loss",
    "mtp_loss",
    "total_weights",
    "grad_norm",
    "raw_grad_norm",
    "param_norm",
    "current_learning_rate",
  ),
  "optim": ("step_skipped", *JUDGED),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
_ORDER = {name: place for place, name in enumerate(_TAGS)}


def perplexity(lm_loss: float) -> float:
  """exp(mean cross entropy in nats); infinity where a float has no room for it."""
  try:
    return math.exp(lm_loss)
  except OverflowError:
    return math.inf


def due(step: int, observe: Observe, steps: int) -> bool:
  """Whether step `step` gets a line and a point of the curves: each log_period-th, and the last."""
  return step % observe.log_period == 0 or step == steps - 1


def step_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """The tagged scalars of what the train step returns, name -> number, the perplexity, and of the
  layers' loads of experts the highest; norms that are of some steps only are left out.

  Raises KeyError for a metric that has no tag: every scalar has one published name.
  """
  arrays = ("judged", "norms")
  values = {name: float(value) for name, value in metrics.items() if name not in arrays}
  if "judged" in metrics:
    values |= zip(JUDGED, map(float, metrics["judged"]), strict=True)
  if "lm_loss" in values:
    values["perplexity"] = perplexity(values["lm_loss"])
  if "learning_rate" in values:
    values["current_learning_rate"] = values.pop("learning_rate")
  if "ok" in values:
    values["step_skipped"] = 1.0 - values.pop("ok")
  layers = {name: values.pop(name) for name in list(values) if name.startswith("expert_load/")}
  scalars = {_TAGS[name]: values[name] for name in sorted(values, key=_ORDER.__getitem__)}
  if layers:
    scalars["moe/expert_load"] = max(layers.values())
  return scalars | {f"moe/{name}": load for name, load in layers.items()}


def eval_scalars(total_loss: float, total_weights: float) -> dict[str, float]:
  """The tagged scalars of an evaluation: cross entropy summed over `total_weights` targets."""
  average = float(total_loss) / float(total_weights) if total_weights else math.nan
  return {
    "eval/avg_loss": average,
    "eval/avg_perplexity": perplexity(average),
    "eval/total_loss": float(total_loss),
    "eval/total_weights": float(total_weights),
  }


def format_step(step: int, scalars: Mapping[str, float]) -> str:
  """The line of a finished step; scripts grep it. Further losses stand where they apply."""
  line = (
    f"completed step: {step}, seconds: {scalars['perf/step_time_seconds']:.3f}, "
    f"TFLOP/s/device: {scalars['perf/per_device_tflops_per_sec']:.3f}, "
    f"Tokens/s/device: {scalars['perf/per_device_tokens_per_sec']:.3f}, "
    f"total_weights: {scalars['learning/total_weights']:.0f}"
  )
  for name in ("loss", "lm_loss", "perplexity", "moe_lb_loss", "mtp_loss"):
    if (tag := f"learning/{name}") in scalars:
      line += f", {name}: {scalars[tag]:.3f}"
  return line


def format_eval(step: int, scalars: Mapping[str, float]) -> str:
  """The line of an evaluation made after train step `step`."""
  return (
    f"Completed eval after train step {step}, loss={scalars['eval/avg_loss']:.3f}, "
    f"perplexity={scalars['eval/avg_perplexity']:.3f}, "
    f"total_weights={scalars['eval/total_weights']:.0f}"
  )


class Pace:
  """Turns the seconds of each step into the perf/ scalars, and adds up the time that trained.

  `tokens` and `flops` are those of one step on all devices, `peak` one device's published FLOP/s
  (None: no MFU). `started` is the time.monotonic() that goodput counts from.
  """

  def __init__(
    self,
    tokens: int,
    flops: float,
    devices: int,
    peak: float | None = None,
    started: float | None = None,
  ):
    self.tokens, self.flops, self.peak = tokens / devices, flops / devices, peak
    self.started = time.monotonic() if started is None else started
    self.productive = self.lost = 0.0
    self._after = array.array("d")  # the productive seconds after each step

  @property
  def goodput(self) -> float:
    """The share of the time so far that has trained."""
    return self.productive / max(time.monotonic() - self.started, self.productive, 1e-9)

  def keep(self, steps: int) -> None:
    """Forget all but the first so many steps: the run has gone back."""
    del self._after[max(steps, 0) :]
    kept = self._after[-1] if self._after else 0.0
    self.lost, self.productive = self.lost + self.productive - kept, kept

  def after(
    self, seconds: float, data_wait: float = 0.0, checkpoint_wait: float = 0.0
  ) -> dict[str, float]:
    """The scalars of a step of `seconds`, `data_wait` of them for data, after a save held it up."""
    self.productive += max(seconds - data_wait, 0.0)
    self._after.append(self.productive)
    seconds = max(seconds, 1e-9)
    scalars = {
      "perf/step_time_seconds": seconds,
      "perf/per_device_tflops": self.flops / 1e12,
      "perf/per_device_tflops_per_sec": self.flops / 1e12 / seconds,
      "perf/per_device_tokens": self.tokens,
      "perf/per_device_tokens_per_sec": self.tokens / seconds,
    }
    if self.peak is not None:
      scalars["perf/mfu"] = self.flops / seconds / self.peak
    return scalars | {
      "perf/data_wait_seconds": data_wait,
      "perf/checkpoint_wait_seconds": checkpoint_wait,
      "perf/goodput": self.goodput,
    }


@contextlib.contextmanager
def _writable(where: str, path: Path) -> Iterator[None]:
  """Turn the failure to open `path`, which setting `where` leads to, into a complaint."""
  try:
    yield
  except OSError as error:
    problem = (
      f"{error.filename or path} cannot be written ({error.strerror}); name a place that can"
    )
    raise ConfigError(where, problem) from None


class Metrics:
  """Where scalars, text and histograms go: metrics.jsonl and TensorBoard, from process 0 only.

  `first_step` is the step that this process trains first: what an earlier process of the same run
  wrote from there on is taken back, so the files of a resumed run are those of one never killed.
  A file that cannot be opened raises ConfigError; one that fails later is reported once, and the
  run goes on: metrics are not worth a training run.
  """

  def __init__(
    self,
    run_dir: Path,
    observe: Observe,
    run_name: str,
    config_text: str,
    hparams: Mapping[str, Any],
    first_step: int = 0,
    process: int = 0,
  ):
    self._file: MetricsFile | None = None
    self._events: Events | None = None
    self._tensorboard = observe.enable_tensorboard
    if process:
      return
    where, path = "base_output_directory", run_dir / "metrics.jsonl"
    if observe.metrics_file:
      where, path = "metrics_file", Path(observe.metrics_file).expanduser()
    with _writable(where, path):
      self._file = MetricsFile(path, run_name, first_step)
    if dropped := self._file.dropped:
      log.info(f"{path}: lines from step {first_step} on will be written anew ({dropped})")
    if observe.enable_tensorboard:
      with _writable("base_output_directory", run_dir / "tensorboard"):
        self._events = Events(run_dir / "tensorboard", first_step)
      self._events.hparams(hparams)
      self._events.text(0, "config", config_text)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write {tag: number} of one step, to both places."""
    if self._file:
      self._file.write(step, values)
    if self._events:
      self._events.scalars(step, values)

  def text(self, step: int, tag: str, text: str) -> None:
    """Show `text` in TensorBoard as it stands, in a fixed-width block with long lines folded."""
    if self._events:
      self._events.text(step, tag, text)

  def histograms(self, step: int, arrays: Mapping[str, Any]) -> None:
    """Show how each array is distributed in TensorBoard; every process calls it with its shards."""
    if self._tensorboard:
      counted = histograms.count(dict(arrays))
      if self._events:
        self._events.histograms(step, counted)

  def flush(self) -> None:
    """Return when all is on the disk; before a checkpoint, which must not know more than this."""
    if self._file:
      self._file.flush()
    if self._events:
      self._events.flush()

  def close(self, failed: bool = False) -> None:
    """Flush and close; a run that did not fail is marked as a success in HParams."""
    if self._file:
      self._file.close()
    if self._events:
      self._events.close(failed)
    self._file = self._events = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self.close(failed=kind is not None)
