"""The listing is the same for equal runs, differs for others, and needs no device and no jax."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext import inspect
from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.sections import Checkpoint


def write_run(
  run, scale: float = 1.0, shape: tuple[int, int] = (8, 1), ocdbt: bool = True, zarr3: bool = True
):
  mesh = Mesh(
    np.array(jax.devices()).reshape(shape), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
  )
  place = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
  weights = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) * scale
  state = {
    "step": place(np.int32(20)),
    "params": {
      "up": place(weights, ("fsdp", "tensor")),
      "down": place(weights.T.astype(jnp.bfloat16), None, "fsdp"),
    },
  }
  section = Checkpoint(
    True, True, 10, 3, -1, 0, False, True, "", "", ocdbt, zarr3, False, False, False, "", 0
  )
  with Checkpoints(run / "checkpoints", section) as checkpoints:
    checkpoints.save(10, state, {})
    checkpoints.save(20, state, {"config": f"run_name: {run.name}\n"})
  return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two equal runs and one with other weights."""
  folder = tmp_path_factory.mktemp("runs")
  states = {
    name: write_run(folder / name, scale) for name, scale in [("a", 1.0), ("b", 1.0), ("c", 1.5)]
  }
  return folder, states


def listing(capsys, *argv: str) -> list[str]:
  assert inspect.main(list(map(str, argv))) == 0
  return capsys.readouterr().out.splitlines()


def test_a_line_has_path_shape_dtype_sharding_and_hash(runs, capsys):
  folder, states = runs
  params = states["a"]["params"]
  digest = lambda array: hashlib.sha256(np.asarray(array).tobytes(order="C")).hexdigest()
  mesh = "on fsdp 8"
  assert listing(capsys, folder / "a", "hash=true") == [
    f"params/down\t[8 16]\tbfloat16\t[- fsdp] {mesh}\t{digest(params['down'])}",
    f"params/up\t[16 8]\tfloat32\t[fsdp -] {mesh}\t{digest(params['up'])}",
    f"step\t[]\tint32\t[] {mesh}\t{digest(np.int32(20))}",
  ]


def test_without_hash_the_lines_end_with_the_sharding(runs, capsys):
  folder, _ = runs
  hashed = listing(capsys, folder / "a", "hash=true")
  assert listing(capsys, folder / "a") == [line.rpartition("\t")[0] for line in hashed]


def test_equal_runs_are_equal_lines_and_others_are_not(runs, capsys):
  folder, _ = runs
  a, b, c = (listing(capsys, folder / name, "hash=true") for name in "abc")
  assert a == b
  assert [x == y for x, y in zip(a, c, strict=True)] == [False, False, True]


def test_a_run_its_checkpoints_and_a_step_are_the_same_lines(runs, capsys):
  folder, _ = runs
  places = [folder / "a", folder / "a" / "checkpoints", folder / "a" / "checkpoints" / "20"]
  first, *others = [listing(capsys, place, "hash=true") for place in places]
  assert others == [first, first]


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(False, True), (True, False), (False, False)])
def test_every_storage_format_is_the_same_lines(runs, tmp_path, capsys, ocdbt, zarr3):
  folder, _ = runs
  write_run(tmp_path / "a", ocdbt=ocdbt, zarr3=zarr3)
  assert listing(capsys, tmp_path / "a", "hash=true") == listing(capsys, folder / "a", "hash=true")


def test_another_mesh_changes_the_sharding_and_not_the_hash(runs, tmp_path, capsys):
  folder, _ = runs
  write_run(tmp_path / "a", shape=(2, 4))
  here, there = (listing(capsys, run / "a", "hash=true") for run in (tmp_path, folder))
  columns = lambda lines, *which: [[line.split("\t")[n] for n in which] for line in lines]
  assert columns(here, 0, 1, 2, 4) == columns(there, 0, 1, 2, 4)
  assert columns(here, 3) == [
    ["[- fsdp] on fsdp 2 tensor 4"],
    ["[fsdp+tensor -] on fsdp 2 tensor 4"],
    ["[] on fsdp 2 tensor 4"],
  ]


def test_a_process_prints_only_arrays_on_standard_output_and_imports_no_jax(runs):
  folder, _ = runs
  code = (
    "import sys; from maxtext import inspect; inspect.main(sys.argv[1:]); "
    "assert not {'jax', 'orbax'} & set(sys.modules)"
  )
  command = [sys.executable, "-c", code, str(folder / "a"), "hash=true"]
  run = subprocess.run(command, capture_output=True, text=True)
  assert [line.split("\t")[0] for line in run.stdout.splitlines()] == [
    "params/down",
    "params/up",
    "step",
  ]
  assert run.stderr.startswith(f"step 20: {folder}/a/checkpoints/20, ") and run.returncode == 0


def run_module(*argv: str) -> tuple[int, str, str]:
  command = [sys.executable, "-m", "maxtext.inspect", *map(str, argv)]
  run = subprocess.run(command, capture_output=True, text=True)
  return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    ([], "usage: python -m maxtext.inspect"),
    (["a", "b"], "command line: one run or checkpoint is inspected at a time, not a b"),
    (["hash=true"], "one run or checkpoint is inspected at a time, not none"),
    (["a", "hsah=true"], "'hsah' is no option, did you mean 'hash'? (hash, debug)"),
    (["a", "hash=yes"], "hash='yes' is not true or false"),
  ],
)
def test_a_wrong_command_line_exits_with_2(argv, words):
  code, output, errors = run_module(*argv)
  assert (code, output) == (2, "") and words in errors and "Traceback" not in errors


def test_what_is_no_checkpoint_or_is_damaged_exits_with_4(tmp_path):
  write_run(tmp_path / "a")
  code, output, errors = run_module(tmp_path / "nowhere")
  assert (code, output, errors.count("\n")) == (4, "", 1) and str(tmp_path / "nowhere") in errors
  (tmp_path / "a" / "checkpoints" / "20" / "state" / "_METADATA").write_text("{}")
  code, output, errors = run_module(tmp_path / "a" / "checkpoints" / "20")
  assert (code, output, errors.count("\n")) == (
    4,
    "",
    1,
  ) and "20 is damaged: state/_METADATA has 2" in errors
  code, output, errors = run_module(tmp_path / "a")
  assert code == 0 and output.count("\n") == 3
  assert (
    errors.splitlines()[0].endswith("; using step 10") and "step 10: " in errors.splitlines()[1]
  )
