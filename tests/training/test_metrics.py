"""What a run writes of itself is complete, readable, and the same after a kill."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxtext.errors import ConfigError
from maxtext.training import histograms, metrics_file, tensorboard
from maxtext.training.metrics import (
  Metrics,
  Pace,
  due,
  eval_scalars,
  format_eval,
  format_step,
  step_scalars,
)
from maxtext.training.sections import Observe

PUBLISHED = {
  "learning": "loss lm_loss perplexity z_loss moe_lb_loss mtp_loss total_weights grad_norm "
  "raw_grad_norm param_norm current_learning_rate",
  "optim": "step_skipped",
}
RETURNED = (
  "loss lm_loss z_loss moe_lb_loss mtp_loss total_weights grad_norm raw_grad_norm param_norm"
)


def observe(**changes) -> Observe:
  settings = {
    "log_period": 1,
    "enable_tensorboard": True,
    "metrics_file": "",
    "progress_bar": "auto",
    "record_internal_nn_metrics": False,
    "enable_goodput_recording": True,
    "watchdog_timeout_seconds": 0.0,
    "watchdog_restart": False,
  }
  return Observe(**settings | changes)


def start(run: Path, first_step: int = 0, name: str = "run", **changes) -> Metrics:
  hparams = {"learning_rate": 3e-4, "opt_type": "adamw", "scan_layers": True, "head_dim": None}
  return Metrics(run, observe(**changes), name, "steps: 10\nname: '*x*'\n", hparams, first_step)


def write(metrics: Metrics, steps: range) -> None:
  """Steps, and after every second of them an evaluation, whose numbers depend on the step alone."""
  for step in steps:
    metrics.scalars(step, {"learning/loss": 7 / (step + 1), "learning/total_weights": 64.0})
    if step % 2:
      metrics.scalars(step, eval_scalars(100 / (step + 1), 10))


def rows(run: Path) -> list[dict]:
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  accumulator = EventAccumulator(str(run / "tensorboard"))
  accumulator.Reload()
  return accumulator


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
  read = events(run)
  return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.fixture
def errors(caplog, monkeypatch):
  """The error lines that are logged."""
  monkeypatch.setattr(logging.getLogger("maxtext"), "propagate", True)
  return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def test_every_published_scalar_has_its_tag():
  given = dict.fromkeys(RETURNED.split(), 1.0) | {"learning_rate": 1e-3, "ok": np.True_}
  tags = {f"{group}/{name}" for group, names in PUBLISHED.items() for name in names.split()}
  assert set(step_scalars(given)) == tags
  assert step_scalars(given)["optim/step_skipped"] == 0.0
  assert step_scalars({"ok": np.False_})["optim/step_skipped"] == 1.0
  assert step_scalars({"learning_rate": 1e-3}) == {"learning/current_learning_rate": 1e-3}


def test_a_metric_without_a_published_name_is_refused():
  with pytest.raises(KeyError, match="entropy"):
    step_scalars({"loss": 1.0, "entropy": 2.0})


def test_perplexity_that_no_float_can_hold_is_infinite():
  assert step_scalars({"lm_loss": 1000.0})["learning/perplexity"] == math.inf
  assert math.isnan(step_scalars({"lm_loss": math.nan})["learning/perplexity"])


def test_the_pace_is_per_device_and_mfu_needs_a_known_peak():
  scalars = Pace(tokens=1000, flops=8e12, devices=8, peak=4e12).after(0.5, data_wait=0.1)
  assert scalars["perf/per_device_tokens"] == 125
  assert scalars["perf/per_device_tokens_per_sec"] == 250
  assert scalars["perf/per_device_tflops"] == 1
  assert scalars["perf/per_device_tflops_per_sec"] == 2
  assert scalars["perf/mfu"] == 0.5
  assert scalars["perf/data_wait_seconds"] == 0.1
  assert "perf/mfu" not in Pace(tokens=1000, flops=8e12, devices=8).after(0.5)


def test_goodput_is_the_share_of_the_time_that_trained(monkeypatch):
  clock = iter([100.0, 110.0, 120.0])
  monkeypatch.setattr("time.monotonic", lambda: next(clock))
  pace = Pace(tokens=1, flops=1.0, devices=1)
  assert pace.after(5.0, data_wait=1.0)["perf/goodput"] == pytest.approx(0.4)
  assert pace.after(6.0)["perf/goodput"] == pytest.approx(0.5)


def test_the_step_line_is_the_one_that_scripts_grep():
  scalars = {
    "perf/step_time_seconds": 0.0067500,
    "perf/per_device_tflops_per_sec": 0.0061,
    "perf/per_device_tokens_per_sec": 9481.4813,
    "learning/total_weights": 64.0,
    "learning/loss": 6.0342,
    "learning/lm_loss": 6.03421,
    "learning/perplexity": 417.4711,
  }
  line = (
    "completed step: 4, seconds: 0.007, TFLOP/s/device: 0.006, Tokens/s/device: 9481.481, "
    "total_weights: 64, loss: 6.034, lm_loss: 6.034, perplexity: 417.471"
  )
  assert format_step(4, scalars) == line
  more = {"learning/mtp_loss": 0.25, "learning/moe_lb_loss": 0.0125}
  assert format_step(4, scalars | more) == line + ", moe_lb_loss: 0.013, mtp_loss: 0.250"


def test_the_eval_line_is_the_one_that_scripts_grep():
  line = "Completed eval after train step 9, loss=2.500, perplexity=12.182, total_weights=40"
  assert format_eval(9, eval_scalars(100.0, 40)) == line


def test_an_evaluation_of_nothing_is_not_a_number():
  assert math.isnan(eval_scalars(0.0, 0)["eval/avg_loss"])


def test_each_log_period_and_the_last_step_are_due():
  assert [step for step in range(8) if due(step, observe(log_period=3), 8)] == [0, 3, 6, 7]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
  numbers = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.1), "e": 2.0}
  with start(tmp_path) as metrics:
    metrics.scalars(3, numbers)
  text = (tmp_path / "metrics.jsonl").read_text()
  row = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
  assert list(row) == ["step", "run_name", "a", "b", "c", "d", "e"]
  assert (row["step"], row["run_name"]) == (3, "run")
  for name, number in numbers.items():
    np.testing.assert_equal(float(row[name]), float(number))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from test_metrics import start, write
assert "tensorboardX" not in sys.modules and "rich" not in sys.modules
metrics = start(Path(sys.argv[1]))
write(metrics, range(6))
metrics.flush()  # as before a checkpoint
write(metrics, range(6, 9))
metrics.flush()
os.write(metrics._file._fd, b'{{"step": 9, "run_na')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_and_resumed_leaves_the_files_of_one_never_killed(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  with start(whole) as metrics:
    write(metrics, range(12))
  here = Path(__file__).resolve().parent
  program = KILLED.format(root=str(here.parents[1]), here=str(here))
  dead = subprocess.run([sys.executable, "-c", program, str(killed)], check=False, timeout=120)
  assert dead.returncode == -signal.SIGKILL
  assert len((killed / "metrics.jsonl").read_bytes().splitlines()) > 9
  with start(killed, first_step=6) as metrics:
    write(metrics, range(6, 12))
  assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  assert curves(killed) == curves(whole)
  assert len(curves(whole)["learning/loss"]) == 12
  assert sorted(p.name for p in killed.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_run_killed_before_its_first_checkpoint_begins_its_files_anew(tmp_path):
  for steps in (range(5), range(3)):
    with start(tmp_path) as metrics:
      write(metrics, steps)
  assert [row["step"] for row in rows(tmp_path)] == [0, 1, 1, 2]
  assert curves(tmp_path)["learning/loss"] == [(0, 7.0), (1, 3.5), (2, pytest.approx(7 / 3))]


def test_two_starts_within_a_second_keep_each_others_events(tmp_path):
  for first in (0, 2, 4):
    with start(tmp_path, first_step=first) as metrics:
      write(metrics, range(first, first + 2))
  assert len(list((tmp_path / "tensorboard").iterdir())) == 3
  assert [step for step, _ in curves(tmp_path)["learning/loss"]] == [0, 1, 2, 3, 4, 5]


def test_runs_that_share_a_metrics_file_keep_their_own_lines(tmp_path):
  shared = tmp_path / "sub" / "all.jsonl"
  options = {"metrics_file": str(shared), "enable_tensorboard": False}
  for name, first in (("one", 0), ("two", 0), ("one", 1)):
    with start(tmp_path, first, name, **options) as metrics:
      write(metrics, range(first, first + 3))
    with shared.open("a") as file:
      file.write("a note of mine\n")
  notes = [line for line in shared.read_text().splitlines() if not line.startswith("{")]
  written = [json.loads(line) for line in shared.read_text().splitlines() if line.startswith("{")]
  steps = lambda name: [
    r["step"] for r in written if r["run_name"] == name and "eval/avg_loss" not in r
  ]
  assert (steps("one"), steps("two")) == ([0, 1, 2, 3], [0, 1, 2])
  assert notes == ["a note of mine"] * 3
  assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
  "tail, left",
  [
    (b'{"step": 1, "run_name": "run", "x": 1.0}', [0, 1]),
    (b'{"step": 1, "run_na', [0]),
    (b'{"step": 5, "run_name": "run", "x": 1.0}', [0]),
  ],
)
def test_an_unfinished_last_line_is_mended(tmp_path, tail, left):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 0, "run_name": "run", "x": 1.0}\n' + tail)
  with start(tmp_path, first_step=2, enable_tensorboard=False) as metrics:
    metrics.scalars(2, {"x": 1.0})
  assert [row["step"] for row in rows(tmp_path)] == [*left, 2]


def test_a_purge_that_is_interrupted_loses_nothing(tmp_path, monkeypatch):
  with start(tmp_path, enable_tensorboard=False) as metrics:
    write(metrics, range(4))
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(metrics_file.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    start(tmp_path, first_step=2)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_processes_above_zero_write_nothing(tmp_path):
  metrics = Metrics(tmp_path / "run", observe(), "run", "", {}, process=1)
  metrics.scalars(0, {"learning/loss": 1.0})
  metrics.text(0, "sample", "x")
  metrics.histograms(0, {"w": np.ones(3)})
  metrics.flush()
  metrics.close()
  assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_complaint_that_names_it(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(ConfigError, match="base_output_directory: .*file.* cannot be written") as e:
    start(tmp_path / "file")
  assert e.value.exit_code == 2 and "\n" not in str(e.value)
  with pytest.raises(ConfigError, match="metrics_file: .*file.* cannot be written"):
    start(tmp_path, metrics_file=str(tmp_path / "file" / "m.jsonl"))
  with pytest.raises(ConfigError, match="metrics_file: .* cannot be written .Is a directory"):
    start(tmp_path, metrics_file=str(tmp_path))


def test_a_full_disk_is_reported_once_and_does_not_end_the_run(tmp_path, errors):
  with start(tmp_path, metrics_file="/dev/full", enable_tensorboard=False) as metrics:
    write(metrics, range(5))
  assert errors() == ["/dev/full: step 0 not written (No space left on device); the run goes on"]


def test_what_is_written_after_the_file_was_removed_stands_in_a_new_one(tmp_path, errors):
  path = tmp_path / "run" / "metrics.jsonl"
  with start(path.parent, enable_tensorboard=False) as metrics:
    write(metrics, range(2))
    shutil.rmtree(path.parent)
    write(metrics, range(2, 4))
  assert [row["step"] for row in rows(path.parent) if "eval/avg_loss" not in row] == [2, 3]
  words = "was removed or replaced; lines before this step are in that file only"
  assert errors() == [f"{path}: step 2: {words}"]


def test_lines_are_whole_again_when_the_disk_has_space_again(tmp_path, errors, monkeypatch):
  """A write that fails half way leaves nothing behind."""
  real, calls = os.write, []

  def full(fd: int, data: bytes) -> int:
    calls.append(data)
    if len(calls) == 2:
      raise OSError(28, "No space left on device")
    return real(fd, data[:20] if len(calls) == 1 else data)

  with start(tmp_path, enable_tensorboard=False) as metrics:
    monkeypatch.setattr(metrics_file.os, "write", full)
    write(metrics, range(3))
  assert [row["step"] for row in rows(tmp_path)] == [1, 1, 2]
  assert errors()[1].endswith("written again from step 1 on, lines missing: 1")


def test_curves_can_be_watched_while_the_run_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(tensorboard, "INTERVAL", -1.0)
  with start(tmp_path) as metrics:
    write(metrics, range(3))
    deadline = time.monotonic() + 20
    while "learning/loss" not in curves(tmp_path) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert curves(tmp_path)["learning/loss"][0] == (0, 7.0)


def test_a_disk_that_fails_at_the_end_does_not_hold_the_run_up(tmp_path, errors, monkeypatch):
  from tensorboardX.event_file_writer import EventsWriter

  def full(*_):
    raise OSError(28, "No space left on device")

  metrics = start(tmp_path)
  metrics.flush()
  monkeypatch.setattr(EventsWriter, "close", full)
  begin = time.monotonic()
  metrics.close()
  assert time.monotonic() - begin < tensorboard.PATIENCE / 2
  assert len(errors()) == 1


def test_tensorboard_failing_is_reported_once_and_does_not_end_the_run(
  tmp_path, errors, monkeypatch
):
  from tensorboardX.event_file_writer import EventsWriter

  def full(*_):
    raise OSError(28, "No space left on device")

  with start(tmp_path) as metrics:
    metrics.flush()
    monkeypatch.setattr(EventsWriter, "flush", full)
    write(metrics, range(5))
    metrics.flush()
    write(metrics, range(5, 9))
    metrics.flush()
  folder = tmp_path / "tensorboard"
  assert errors() == [f"{folder}: No space left on device; the run goes on without TensorBoard"]
  assert len(rows(tmp_path)) == 13


def test_tensorboard_goes_on_when_the_disk_has_space_again(tmp_path, errors, monkeypatch):
  """Of what was tried meanwhile no file is left."""
  from tensorboardX.event_file_writer import EventsWriter

  real, room = EventsWriter.flush, [True]

  def flush(writer):
    if not room[0]:
      raise OSError(28, "No space left on device")
    return real(writer)

  monkeypatch.setattr(EventsWriter, "flush", flush)
  monkeypatch.setattr(tensorboard, "INTERVAL", 0.0)
  with start(tmp_path) as metrics:
    write(metrics, range(2))
    metrics.flush()
    room[0] = False
    for step in range(2, 6):
      write(metrics, range(step, step + 1))
      metrics.flush()
    room[0] = True
    write(metrics, range(6, 9))
    metrics.flush()
  folder = tmp_path / "tensorboard"
  assert errors() == [
    f"{folder}: No space left on device; the run goes on without TensorBoard",
    f"{folder}: written again",
  ]
  assert [step for step, _ in curves(tmp_path)["learning/loss"]][-3:] == [6, 7, 8]
  assert len(list(folder.iterdir())) == 2


def test_hyperparameters_and_configuration_stand_in_the_runs_own_events(tmp_path):
  from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

  with start(tmp_path) as metrics:
    metrics.text(3, "sample", "two\n\n  <b>lines</b>")
    metrics.text(5, "long", "word " * 50)
  assert [p.is_file() for p in (tmp_path / "tensorboard").iterdir()] == [True]
  read = events(tmp_path)
  content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
  found = parse_session_start_info_plugin_data(content).hparams
  assert found["learning_rate"].number_value == 3e-4
  assert found["opt_type"].string_value == "adamw"
  assert found["scan_layers"].bool_value is True
  assert found["head_dim"].string_value == "null"
  text = lambda tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode()
  assert text("config") == "    steps: 10\n    name: '*x*'\n"
  assert text("sample") == "    two\n    \n      <b>lines</b>\n"
  assert max(map(len, text("long").splitlines())) <= 114
  assert text("long").split() == ["word"] * 50


def test_only_a_run_that_did_not_fail_ends_as_a_success(tmp_path):
  with pytest.raises(RuntimeError), start(tmp_path / "failed"):
    raise RuntimeError
  with start(tmp_path / "well"):
    pass
  ended = lambda run: "_hparams_/session_end_info" in events(run).summary_metadata
  assert (ended(tmp_path / "failed"), ended(tmp_path / "well")) == (False, True)


def test_without_tensorboard_there_is_no_folder_for_it(tmp_path):
  with start(tmp_path, enable_tensorboard=False) as metrics:
    write(metrics, range(1))
    metrics.text(0, "sample", "x")
    metrics.histograms(0, {"w": np.ones(3)})
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_histogram_counts_every_finite_value_where_it_lies():
  mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
  values = np.random.default_rng(0).normal(size=(8, 300)).astype(np.float32) * 0.1
  values[0, :3] = np.nan, np.inf, 300.0
  sharded = jax.device_put(values, NamedSharding(mesh, PartitionSpec("fsdp")))
  counted = histograms.count({"w": sharded})["w"]
  finite = values[np.isfinite(values)]
  np.testing.assert_array_equal(counted.at_most, (finite <= histograms.EDGES[:, None]).sum(1))
  assert (counted.size, counted.most, counted.least) == (finite.size, 300.0, finite.min())
  assert counted.at_most.sharding.is_fully_replicated
  np.testing.assert_allclose(counted.squares, np.square(finite).sum(), rtol=1e-5)  # f32 sums


def test_histograms_reach_tensorboard_with_all_their_values(tmp_path):
  values = np.array([-500.0, -1.0, 0.0, 0.0, 1e-9, 0.3, 999.0, np.nan], np.float32)
  with start(tmp_path) as metrics:
    arrays = {"params/w": values, "params/dead": values[-1:], "params/ones": np.ones(5)}
    metrics.histograms(4, arrays)
  read = events(tmp_path)
  assert read.Tags()["histograms"] == ["params/ones", "params/w"]
  [event] = read.Histograms("params/w")
  shown = event.histogram_value
  assert (event.step, shown.num, shown.min, shown.max) == (4, 7, -500.0, 999.0)
  assert sum(shown.bucket) == 7
  assert shown.bucket_limit == sorted(shown.bucket_limit)
  assert (shown.bucket_limit[0], shown.bucket_limit[-1]) == (-500.0, 999.0)
  ones = read.Histograms("params/ones")[0].histogram_value
  assert (ones.bucket_limit, ones.bucket) == ([1.0, 1.0], [0.0, 5.0])
