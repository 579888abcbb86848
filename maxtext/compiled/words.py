"""A report for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from maxtext.compiled.report import NOTHING, Memory, Report

GIB = 2**30
KINDS_SHOWN = 10  # of collectives


def lines(report: Report) -> Iterator[str]:
  """All of it, on a screen."""
  yield from _head(report)
  if report.memory:
    yield from _memory(report.memory, report)
  if report.largest:
    yield from _largest(report)
  if report.sent:
    yield from _sent(report)
  if report.work:
    yield from _time(report)
  yield from _verdict(report)


def _head(report: Report) -> Iterator[str]:
  run = report.run
  mesh = " x ".join(f"{axis} {size}" for axis, size in run["mesh"].items()) or "1"
  slices = f"{run['slices']} x " if run["slices"] > 1 else ""
  where = f"{slices}{run['topology']}: " if run["topology"] else ""
  yield (
    f"{run['model']}, {run['parameters']:,} parameters, on {where}"
    f"{run['devices']} x {run['device_kind']}, mesh {mesh}"
  )
  yield (
    f"{run['tokens']:,} tokens a step, {run['rows']} rows of {run['length']:,}; {run['dtype']}, "
    f"remat_policy={run['remat_policy']}; compiled in {report.compile_cpu_seconds:.0f} CPU s"
  )
  if report.part:
    yield report.part


def _memory(memory: Memory, report: Report) -> Iterator[str]:
  unit = _unit(memory.peak)
  yield f"\nmemory of a device {unit[0]:>9}"
  parts = ("parameters", "optimizer", "batch")
  detail = ", ".join(f"{name} {getattr(memory, name) / unit[1]:.2f}" for name in parts)
  row = lambda name, size, note="": f"  {name:<16}{size / unit[1]:10.2f}  {note}".rstrip()
  yield row("arguments", memory.arguments, detail)
  yield row("outputs", memory.outputs, "beside those that take an argument's place")
  yield row("temporaries", memory.temporaries)
  if memory.program:
    yield row("program", memory.program)
  if memory.host:
    yield row("on the host", memory.host)
  of = ""
  if memory.chip:
    of = f"{memory.peak / memory.chip:.0%} of {memory.chip / GIB:.2f} GiB"
  yield row("peak", memory.peak, ", at ".join(filter(None, [of, report.at])))


def _largest(report: Report) -> Iterator[str]:
  unit = _unit(report.memory.peak if report.memory else report.largest[0].size)
  rows = [
    (f"{one.size / unit[1]:.2f}", one.array, one.axes, one.source, one.name)
    for one in report.largest
  ]
  names = (f"{unit[0]} at peak", "array on a device", "axes", "made in", "as")
  yield from _table(names, rows, ">")


def _sent(report: Report) -> Iterator[str]:
  rows = [
    (
      one.kind,
      " ".join(one.axes),
      f"{one.times:,}",
      f"{one.size / 2**20:,.2f}",
      f"{one.wire / 2**20:,.2f}",
      f"{one.beside / one.size:.0%}" if one.size else "-",
    )
    for one in report.sent[:KINDS_SHOWN]
  ]
  names = ("collective", "over", "times", "MiB", "MiB sent", "overlapped")
  yield from _table(names, rows, "<<>>>>")
  if left := report.sent[KINDS_SHOWN:]:
    yield f"  and {len(left)} kinds more, {sum(one.wire for one in left) / 2**20:,.2f} MiB sent"


def _time(report: Report) -> Iterator[str]:
  work, time = report.work, report.time
  again = f" and {work['flops_again'] / 1e12:.4g} computed again" if work["flops_again"] else ""
  yield (
    f"\nwork of a device: {work['flops'] / 1e12:.4g} TFLOP{again}; "
    f"{work['bytes'] / GIB:.4g} GiB read and written"
  )
  if time is None:
    yield "time: this compiler estimates no cycles"
    return
  yield (
    f"time, estimated: {time.total:.4g} s a step = {work['cycles'] / 1e6:,.1f} M cycles "
    f"{time.cycles:.4g} + kernels {time.kernels:.4g} + waiting for others {time.exposed:.4g}"
  )
  yield f"  {time.tokens_per_second_per_device:,.0f} tokens/s per device, MFU {time.mfu:.1%}"
  yield "  not known: " + "; ".join(time.blind)


def _verdict(report: Report) -> Iterator[str]:
  if report.problem:
    yield f"\nit does not fit: {report.problem}"
  elif report.memory and report.memory.chip:
    yield f"\nit {'fits' if report.fits else 'does not fit'}"
  if report.advice == (NOTHING,):
    yield f"what would fit: {NOTHING}"
  elif report.advice:
    yield "what would fit, by estimate, the fastest first:"
    yield from (f"  {line}" for line in report.advice)


def _table(names: Sequence[str], rows: Sequence[tuple[str, ...]], sides: str) -> Iterator[str]:
  """A blank line, then a table; `sides` says to which each column is set, the last for the rest."""
  sides = sides.ljust(len(names), "<")
  wide = [max(map(len, column)) for column in zip(names, *rows)]
  yield ""
  for row in (names, *rows):
    yield "  ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, wide)).rstrip()


def _unit(size: int) -> tuple[str, int]:
  return ("GiB", GIB) if size >= GIB else ("MiB", 2**20)
