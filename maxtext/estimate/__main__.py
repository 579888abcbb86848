"""`python -m maxtext.estimate config.yml devices=N [chip=KIND] [key=value]`: which layouts fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from maxtext import config
from maxtext.config import Config
from maxtext.config.values import render
from maxtext.data.pipeline import vocabulary
from maxtext.errors import ConfigError, closest, run_cli
from maxtext.estimate.advice import lighter
from maxtext.estimate.chips import CHIPS
from maxtext.estimate.flops import parameter_count
from maxtext.estimate.layouts import FULL, Layout, layouts, model_of
from maxtext.estimate.memory import Model

USAGE = f"""\
usage: python -m maxtext.estimate [config.yml] devices=N [chip=KIND] [key=value ...]

Lists the layouts in which this run fits on N chips of a kind ({", ".join(CHIPS)}), with
the bytes of a step on each device and the least time that it can take, best first; no device is
needed. Mesh sizes that are typed here are kept. Ends with 1 where nothing fits.
"""
SHOWN = 10  # layouts


def main(argv: list[str]) -> int:
  """Print the layouts; returns 1 where none fits. Raises ConfigError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
    return 0 if argv else 2
  jax.config.update("jax_platforms", "cpu")  # shapes alone: whatever device there is stays free
  words, devices, kind = parse(argv)
  environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  loaded = config.load(words, environ)
  if devices % loaded.mesh.num_slices:
    problem = f"{devices} chips do not make num_slices={loaded.mesh.num_slices} equal slices"
    raise ConfigError("devices", f"{problem}; use a multiple")
  size = 0 if loaded.architecture.vocab_size else vocabulary(loaded.data)
  model, chip = model_of(loaded, size), CHIPS[kind]
  found = layouts(model, devices, chip)
  if not found:
    raise ConfigError("devices", _illegal(loaded, devices))
  fit = [layout for layout in found if layout.fits(chip)]
  print("\n".join(head(model, devices, kind, len(found), len(fit))))
  print("\n".join(table(fit[:SHOWN] or found[:1])))
  if fit:
    print(f"\nbest: {fit[0].paste}")
    return 0
  print("\n".join(advice(model, devices, kind, size, found[0])))
  return 1


def parse(argv: Sequence[str]) -> tuple[list[str], int, str]:
  """What is left for the configuration, the number of chips, and their kind."""
  given = dict(word.split("=", 1) for word in argv if word.startswith(("devices=", "chip=")))
  devices, kind = given.get("devices", ""), given.get("chip", "v5p")
  if not devices.isdigit() or not int(devices):
    raise ConfigError("command line  devices", "say how many chips there are, as devices=64")
  if kind not in CHIPS:
    offer = f"{closest(kind, CHIPS)} ({', '.join(CHIPS)})"
    raise ConfigError("command line  chip", f"{kind[:40]!r} is no kind of chip{offer}")
  own = ("devices=", "chip=", "hardware=")
  words = [word for word in argv if not word.startswith(own)]
  return [*words, "hardware=auto", "devices=null"], int(devices), kind


def head(model: Model, devices: int, kind: str, count: int, fit: int) -> Iterator[str]:
  """What is planned, and on what."""
  loaded, chip, training = model.config, CHIPS[kind], model.config.training
  rows, passes = training.micro_batch(devices), training.gradient_accumulation_steps
  length = training.max_target_length
  name = loaded.run.model_name or loaded.block.name
  yield (
    f"{name}, {_count(parameter_count(model.spec))} parameters, on {devices} x {kind}: "
    f"{chip.memory / 2**30:.0f} GiB, {chip.flops / 1e12:,.0f} TFLOP/s each"
  )
  yield (
    f"{passes * rows * length:,} tokens a step: {rows} rows of {length}"
    + (f", {passes} times" if passes > 1 else "")
    + f"; {loaded.precision.dtype}, remat_policy={loaded.memory.remat_policy}"
  )
  yield f"{count} layouts are legal, {fit} fit in {FULL:.0%} of the memory"
  yield ""


def table(shown: Sequence[Layout]) -> Iterator[str]:
  """A line per layout: bytes of a device by kind, seconds by what takes them, and its settings."""
  small = max(layout.bytes.total for layout in shown) < 2**30
  unit, size_of = ("MiB", 2**20) if small else ("GiB", 2**30)
  far = any(layout.bytes.host for layout in shown)
  columns = ("params", "optimizer", "grads", "kept", "at work", "total", *["hosts"] * far)
  times = ("compute", "hidden", "exposed", "step", "MFU")
  yield f"{f'  {unit} per device':<{51 + 8 * far}}  seconds per step, at best"
  widths = [max(len(name), 6) + 2 for name in (*columns, *times)]
  line = lambda cells: "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths))
  yield f"{line((*columns, *times))}  layout"
  for layout in shown:
    b, s = layout.bytes, layout.seconds
    sizes = (b.params, b.optimizer, b.grads, b.activations, b.work, b.total, *[b.host] * far)
    cells = [f"{size / size_of:.2f}" for size in sizes]
    cells += [_short(t) for t in (max(s.compute, s.memory), s.hidden, s.exposed, s.total)]
    yield f"{line([*cells, f'{layout.mfu:.0%}'])}  {layout.paste}"


def _count(parameters: int) -> str:
  return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _short(seconds: float) -> str:
  digits = 2 - math.floor(math.log10(seconds)) if seconds > 0 else 0
  return f"{seconds:.{min(max(digits, 0), 5)}f}"


def advice(model: Model, devices: int, kind: str, size: int, nearest: Layout) -> Iterator[str]:
  """What would fit, where nothing does: each change by itself, else all of them, or more chips."""
  chip, changes = CHIPS[kind], list(lighter(model.config))
  over = nearest.bytes.total / 2**30
  yield f"\nnone fits; the nearest needs {over:.1f} GiB of {chip.memory / 2**30:.0f}. With"

  def tried(values: dict[str, Any], count: int = devices) -> tuple[Layout, str] | None:
    made = layouts(model_of(model.config.changed(**values), size), count, chip)
    if not made:
      return None
    words = [f"devices={count}"] * (count > devices) + [f"{k}={render(values[k])}" for k in values]
    verdict = "fits" if made[0].fits(chip) else "does not fit"
    total = made[0].bytes.total / 2**30
    return made[0], f"  {' '.join(words)}: {total:.1f} GiB, {verdict}; {made[0].paste}"

  single = [found for change in changes if (found := tried(change))]
  yield from (line for _, line in single)
  if not any(layout.fits(chip) for layout, _ in single) and len(changes) > 1:
    if together := tried({key: value for change in changes for key, value in change.items()}):
      yield together[1]
  first = {} if model.config.memory.remat_policy == "full" else {"remat_policy": "full"}
  for more in (2, 4, 8, 16):
    batch = model.config.training.per_device_batch_size / more
    found = tried({"per_device_batch_size": batch, **first}, more * devices)
    if found and found[0].fits(chip):
      yield found[1]
      return


def _illegal(loaded: Config, devices: int) -> str:
  rows = loaded.training.per_device_batch_size * devices
  return (
    f"no layout of {devices} chips is legal for {rows:g} rows of "
    f"{loaded.training.max_target_length} tokens and the sizes of this model; use a number of "
    "chips that divides them, as a power of two, or another per_device_batch_size"
  )


if __name__ == "__main__":
  run_cli(main)
