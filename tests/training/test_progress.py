"""On a terminal a bar that fits it, with whole lines above; elsewhere the lines alone."""

import contextlib
import io
import re
import sys

import pytest
from rich.console import Console

from maxtext import log as logs
from maxtext.training.metrics import format_step
from maxtext.training.progress import Progress
from maxtext.training.sections import Observe


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def observe(progress_bar: str = "auto", log_period: int = 1) -> Observe:
  return Observe(log_period, False, "", progress_bar, False, True, 0.0, False)


def scalars(step: int, **more: float) -> dict[str, float]:
  return {
    "perf/step_time_seconds": 0.5,
    "perf/per_device_tokens": 617.25,
    "perf/per_device_tflops_per_sec": 1.25,
    "perf/per_device_tokens_per_sec": 1234.5,
    "learning/total_weights": 64.0,
    "learning/loss": 6.0 - step,
    "learning/lm_loss": 6.0 - step,
    "learning/perplexity": 20.0,
  } | {f"perf/{name}": value for name, value in more.items()}


def plain(text: str) -> str:
  """Text without what moves the cursor and colours."""
  return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def drawn(progress: Progress, width: int) -> str:
  """The bar as plain text on a terminal of this width."""
  out = io.StringIO()
  console = Console(file=out, width=width, color_system="256", force_terminal=True)
  console.print(progress._bar(console))
  return plain(out.getvalue())


@pytest.fixture
def clock(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  return now


@contextlib.contextmanager
def terminal(term: str = "xterm-256color"):
  """Standard output is a terminal of 80 columns, with the log on it."""
  out = Terminal()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
    patch.setenv("TERM", term)
    patch.setenv("COLUMNS", "80")
    logs.start()
    yield out


def test_in_a_pipe_there_are_only_the_lines(capsys):
  logs.start()
  with Progress(observe(log_period=2), 4) as progress:
    for step in range(4):
      progress.step(step, scalars(step))
  assert capsys.readouterr().out.splitlines() == [format_step(i, scalars(i)) for i in (0, 2, 3)]


def test_on_a_terminal_whole_lines_stand_above_the_bar():
  """A line wider than the terminal is not cut: what is copied or recorded stays one line."""
  with terminal() as out, Progress(observe(), 2) as progress:
    progress.step(0, scalars(0))
    logs.log.info("a note [not] *markup* :smile:")
    print("printed")
    progress.step(1, scalars(1))
  text = plain(out.getvalue()).replace("\r", "\n")
  lines = [line.rstrip() for line in text.splitlines()]
  expected = [format_step(0, scalars(0)), "a note [not] *markup* :smile:", "printed"]
  expected.append(format_step(1, scalars(1)))
  assert [line for line in lines if line in expected] == expected
  assert "2/2" in lines[-1] and "100%" in lines[-1]


@pytest.mark.parametrize(
  "progress_bar, term, drawn",
  [
    ("auto", "xterm", True),
    ("auto", "dumb", False),
    ("off", "xterm", False),
    ("on", "dumb", True),
  ],
)
def test_the_bar_is_drawn_when_it_is_wanted(progress_bar, term, drawn):
  with terminal(term) as out, Progress(observe(progress_bar), 1) as progress:
    progress.step(0, scalars(0))
  assert ("100%" in out.getvalue()) == drawn


def test_processes_above_zero_draw_nothing():
  with terminal() as out, Progress(observe("on"), 3, process=1):
    pass
  assert out.getvalue() == ""


def test_the_terminal_is_given_back_after_an_error():
  with terminal() as out:
    with pytest.raises(RuntimeError), Progress(observe(), 3) as progress:
      progress.step(0, scalars(0))
      raise RuntimeError
    assert sys.stdout is out
    logs.log.info("afterwards")
  text = out.getvalue()
  assert "stopped" in text and text.endswith("afterwards\n")
  assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is hidden"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140, 250])
def test_the_bar_is_one_line_that_fits(width, clock):
  progress = Progress(observe(), 1_000_000, devices=8)
  for step in range(999, 1001):
    clock[0] += 3600
    progress.step(step, scalars(0, mfu=0.4126))
  with progress.doing("saving a checkpoint"):
    text = drawn(progress, width)
  assert text.endswith("\n") and text.count("\n") == 1
  assert len(text) <= width
  assert text.startswith("1,001/1,000,000")


def test_at_80_columns_all_that_matters_is_shown(clock):
  progress = Progress(observe(), 1000, devices=8)
  for step in range(3):
    clock[0] += 2.0
    progress.step(step, scalars(step, mfu=0.4126))
  text = drawn(progress, 80)
  bar = re.search("━+", text.replace("╸", "━").replace("╺", "━"))
  assert bar and len(bar[0]) >= 8
  for part in ("3/1,000", "loss 4.000", "9.88k tokens/s", "MFU 41.3%", "0:33:14 left"):
    assert part in text


def test_mfu_is_shown_only_where_it_is_known(clock):
  progress = Progress(observe(), 10)
  progress.step(0, scalars(0))
  assert "MFU" not in drawn(progress, 140)


def test_the_time_left_is_known_after_two_steps_and_runs_on_between_them(clock):
  progress = Progress(observe(), 12, first_step=2)
  clock[0] += 60  # what the first step takes is not part of the pace
  assert progress.seconds_left() is None
  assert "first step" in drawn(progress, 80) and "0:01:00" in drawn(progress, 80)
  progress.step(2, scalars(2))
  assert progress.seconds_left() is None
  clock[0] += 10
  progress.step(3, scalars(3))
  assert progress.seconds_left() == 80
  clock[0] += 3
  assert progress.seconds_left() == 77


def test_the_bar_says_what_else_goes_on(clock):
  progress = Progress(observe(), 10)
  progress.step(0, scalars(0))
  with progress.doing("evaluating"):
    assert "evaluating" in drawn(progress, 80)
  assert "evaluating" not in drawn(progress, 80)
