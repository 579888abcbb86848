"""Copies on local disks: the nearest of what is whole is used, and nothing else."""

from __future__ import annotations

import dataclasses
import errno

import jax
import pytest

from maxtext.checkpoints.local import Local
from maxtext.errors import CheckpointError
from maxtext.log import log
from tests.checkpoints.conftest import SECTION


@pytest.fixture
def row(states):
  return states.mesh(4, 2)


@pytest.fixture
def open_local(tmp_path, states, open_checkpoints):
  """The copies of a run's state on a mesh, beside its checkpoints."""
  opened = []

  def open_(mesh) -> Local:
    for one in opened:
      one.close()
      one._lock and one._lock.close()
    directory = str(tmp_path / "local")
    shared = open_checkpoints(local_checkpoint_directory=directory, checkpoint_period=1)
    opened.append(Local(tmp_path / "run", shared, states.target(mesh)))
    return opened[-1]

  return open_


@pytest.fixture
def lines(monkeypatch):
  said: list[str] = []
  monkeypatch.setattr(log, "warning", lambda line, *values: said.append(line % values))
  return said


def save(states, local, extra, mesh, shared=(), copies=()):
  for step in sorted({*shared, *copies}):
    for checkpoints, steps in ((local._shared, shared), (local, copies)):
      if step in steps:
        checkpoints.save(step, states.of(step, mesh), extra, force=True)
        checkpoints.wait()


def test_the_nearest_comes_back_bit_for_bit(open_local, states, extra, same_bits, row):
  save(states, open_local(row), extra, row, shared=(4, 8), copies=(5, 7, 9))
  again = open_local(row)
  assert (again.steps(), again.newest()) == ((4, 7, 8, 9), 9)  # two copies stay
  target = states.target(row)
  for step in (4, 7, 8, 9):
    restored = again.restore(step, target)
    assert same_bits(restored, states.of(step, row))
    same = jax.tree.map(lambda a, like: a.sharding == like.sharding, restored, target)
    assert all(jax.tree.leaves(same))
    assert again.extra(step)["data"] == extra["data"]


def test_a_copy_with_a_flipped_bit_is_passed_over_with_a_line(
  open_local, states, extra, same_bits, row, lines
):
  local = open_local(row)
  save(states, local, extra, row, shared=(4,), copies=(5, 6))
  file = local.directory / "6" / "state"
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  again = open_local(row)
  assert again.newest() == 5
  problem = "is damaged: state is not as it was written; not used"
  assert lines == [f"{local.directory}/6 {problem}"]
  (local.directory / "5" / "manifest.json").unlink()
  third = open_local(row)
  assert third.newest() == 4
  assert same_bits(third.restore(4, states.target(row)), states.of(4, row))


def test_a_copy_of_another_mesh_or_run_is_passed_over_and_goes_with_the_next_save(
  open_local, states, extra, row, lines
):
  local = open_local(row)
  save(states, local, extra, row, shared=(4,), copies=(6,))
  other = states.mesh(2, 4)
  assert open_local(other).newest() == 4
  assert lines == [f"{local.directory}/6 is of a state that was split in another way; not used"]
  local._shared.directory.rename(local._shared.directory.with_name("old"))
  anew = open_local(row)
  assert anew.newest() is None
  assert "6 is of another run, or from before this one was begun anew; not used" in lines[-1]
  save(states, anew, extra, row, copies=(2,))
  assert open_local(row).steps() == (2,)
  assert not (local.directory / "6").exists()


def test_what_a_run_went_back_behind_is_dropped_in_both_places(open_local, states, extra, row):
  local = open_local(row)
  save(states, local, extra, row, shared=(4, 6), copies=(5, 6))
  local.drop(6)
  assert local.steps() == (4, 5)


def test_a_shared_disk_that_cannot_be_written_is_named_and_not_the_local_one(
  open_local, states, extra, row, monkeypatch
):
  local = open_local(row)

  def unplugged(path, content):
    raise OSError(errno.EROFS, "Read-only file system", str(path))

  monkeypatch.setattr("maxtext.checkpoints.manifest.write_synced", unplugged)
  with pytest.raises(CheckpointError) as error:
    save(states, local, extra, row, copies=(2,))
  shared = local._shared.directory
  assert str(error.value).startswith(f"{shared}/") and "Read-only file system" in str(error.value)


def test_two_runs_do_not_write_into_one_folder(open_local, states, extra, row, tmp_path):
  local = open_local(row)
  save(states, local, extra, row, copies=(2,))
  twin = Local(tmp_path / "run", local._shared, states.target(row))
  with pytest.raises(CheckpointError, match="cannot be used: another run writes there"):
    twin.save(3, states.of(3, row), extra, force=True)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"local_checkpoint_directory": ""}, "needs a local_checkpoint_directory"),
    ({"local_checkpoint_period": 0}, "needs a local_checkpoint_period"),
    ({"local_checkpoint_period": 10}, "10 is no less than checkpoint_period=10"),
  ],
)
def test_contradictions_are_refused(changes, words):
  whole = dataclasses.replace(
    SECTION,
    enable_emergency_checkpoint=True,
    local_checkpoint_directory="/somewhere",
    local_checkpoint_period=2,
  )
  assert not list(whole.complaints())
  (complaint,) = dataclasses.replace(whole, **changes).complaints()
  assert words in complaint[1]
