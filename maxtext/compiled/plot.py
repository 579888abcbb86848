"""A report's memory over the course of a step, drawn: one HTML file with nothing outside it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from maxtext.compiled.report import Report

WIDTH, HEIGHT, LEFT, TOP, BINS = 1000, 420, 70, 30, 1000
GIB = 2**30
STYLE = (
  "body{font:14px system-ui,sans-serif;margin:2em;color:#222}"
  "table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left}"
  "td:first-child{text-align:right}text{font-size:12px;fill:#444}"
)


def page(report: Report, lines: Sequence[str]) -> str:
  """The drawing, and below it the report as it is printed in `lines`."""
  title = html.escape(lines[0])
  printed = html.escape("\n".join(lines))
  return (
    f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title>"
    f"<style>{STYLE}</style></head><body><h3>{title}</h3>"
    f"{''.join(_drawing(report))}<pre>{printed}</pre></body></html>\n"
  )


def _drawing(report: Report) -> Iterator[str]:
  memory = report.memory
  if memory is None or not report.moments:
    return
  bins = binned(report.moments)
  most = max(max(bins), memory.peak)
  chip = memory.chip if memory.chip and memory.chip < 3 * most else None
  top = 1.05 * max(most, chip or 0)
  unit, size = ("GiB", GIB) if top >= GIB else ("MiB", 2**20)
  x = lambda i: LEFT + i * WIDTH / len(bins)
  y = lambda held: TOP + HEIGHT * (1 - held / top)
  yield f"<svg viewBox='0 0 {LEFT + WIDTH + 170} {TOP + HEIGHT + 50}' width='100%'>"
  for step in range(6):
    held = top / 1.05 * step / 5
    yield _level(y(held), "stroke='#eee'")
    yield f"<text x='{LEFT - 8}' y='{y(held) + 4:.1f}' text-anchor='end'>{held / size:.2f}</text>"
  yield f"<text x='{LEFT}' y='{TOP - 12}'>{unit} of a device</text>"
  outline = " ".join(f"{x(i):.1f},{y(held):.1f}" for i, held in enumerate(bins))
  base = f"{LEFT},{y(0):.1f} {outline} {x(len(bins) - 1):.1f},{y(0):.1f}"
  yield f"<polygon points='{base}' fill='#7aa6da' stroke='#2f5d94' stroke-width='1'/>"
  levels = [("arguments", memory.arguments, "stroke='#2b6'")]
  levels += [("peak, as compiled", memory.peak, "stroke='#c40' stroke-dasharray='5 3'")]
  levels += [("the device", chip, "stroke='#000'")] if chip else []
  for name, held, style in levels:
    yield _level(y(held), style)
    yield f"<text x='{LEFT + WIDTH + 6}' y='{y(held) + 4:.1f}'>{name} {held / size:.2f}</text>"
  peak = bins.index(max(bins))
  yield f"<circle cx='{x(peak):.1f}' cy='{y(bins[peak]):.1f}' r='4' fill='#c40'/>"
  unit = "M cycles, as the compiler estimates them" if report.time else "instructions"
  end = report.moments[-1][0] / 1e6 if report.time else len(report.moments)
  yield f"<text x='{LEFT}' y='{TOP + HEIGHT + 20}'>0</text>"
  yield (
    f"<text x='{LEFT + WIDTH}' y='{TOP + HEIGHT + 20}' text-anchor='end'>{end:,.0f} {unit}</text>"
  )
  yield "</svg>"


def _level(y: float, style: str) -> str:
  return f"<line x1='{LEFT}' x2='{LEFT + WIDTH}' y1='{y:.1f}' y2='{y:.1f}' {style}/>"


def binned(moments: Sequence[tuple[float, int]]) -> list[int]:
  """The most of each of BINS equal parts of the time, or of the instructions where none takes any;
  a part in which nothing begins holds what the one before ended with.
  """
  end = moments[-1][0]
  when = [time / end if end else i / len(moments) for i, (time, _) in enumerate(moments)]
  found: list[int] = []
  i, last = 0, moments[0][1]
  for part in range(BINS):
    most = last
    while i < len(moments) and (when[i] * BINS < part + 1 or part == BINS - 1):
      last = moments[i][1]
      most = max(most, last)
      i += 1
    found.append(most)
  return found
