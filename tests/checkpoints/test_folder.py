"""Steps appear whole or not at all; what is not whole is passed over, what is not ours stays."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest

from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.folder import Folder
from maxtext.checkpoints.lookup import locate
from maxtext.errors import CheckpointError


def save(folder: Folder, step: int, loss: float | None = None) -> None:
  building, extra = folder.prepare(step), {}
  if loss is not None:
    (building / "facts.json").write_text(json.dumps({"eval_loss": loss}))
    extra = {"facts": "facts.json"}
  (building / "state").mkdir()
  (building / "state" / "data").write_bytes(f"step {step}".encode() * 100)
  manifest = manifests.write(building, step, (), extra)
  folder.publish(building, step)
  folder.remember(step, manifest)


@pytest.fixture
def folder(tmp_path) -> Folder:
  folder = Folder(tmp_path / "run" / "checkpoints")
  for step in (10, 20, 30):
    save(folder, step)
  return Folder(folder.path)


def damage(folder: Folder, step: int) -> None:
  file = folder.step(step) / "state" / "data"
  file.write_bytes(b"S" + file.read_bytes()[1:])


def half_write(folder: Folder, step: int) -> None:
  (folder.step(step) / "manifest.json").unlink()


def junk(folder: Folder, step: int) -> None:
  shutil.rmtree(folder.step(step))
  folder.step(step).mkdir()
  (folder.step(step) / "notes.txt").write_text("mine")


def remove_a_file(folder: Folder, step: int) -> None:
  (folder.step(step) / "state" / "data").unlink()


def truncate(folder: Folder, step: int) -> None:
  (folder.step(step) / "state" / "data").write_bytes(b"step")


@pytest.mark.parametrize("harm", [damage, half_write, junk, remove_a_file, truncate])
def test_a_step_that_is_not_whole_is_passed_over_with_one_line(folder, harm, caplog):
  harm(folder, 30)
  assert folder.steps() == (10, 20)
  assert (folder.newest(), folder.newest()) == (20, 20)
  (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
  assert line.startswith(f"{folder.path}/30 is ") and line.endswith("; using step 20")
  with pytest.raises(CheckpointError, match=f"{folder.path}/30 is "):
    folder.manifest(30)


def test_damage_is_seen_in_a_step_that_was_found_whole_before(folder):
  assert folder.newest() == 30
  damage(folder, 30)
  assert folder.newest() == 20


def test_without_a_whole_step_there_is_no_newest_and_a_line_says_so(folder, caplog):
  for step in (10, 20, 30):
    truncate(folder, step)
  assert folder.newest() is None
  assert "no other checkpoint is there" in caplog.text


def test_only_canonical_numbers_are_steps(folder):
  for name in ("040", "-5", "4.0", "٤", "latest", "50.saving", "60.state.orbax-checkpoint-tmp"):
    (folder.path / name).mkdir()
  (folder.path / "70").touch()
  assert folder.named() == [10, 20, 30]


def test_cleaning_removes_our_litter_and_nothing_else(folder):
  kept = ["notes", "50.saving.txt", "x.saving", "60.orbax-checkpoint-tmp"]
  for name in ("40.saving", "5.deleting", *kept):
    (folder.path / name / "state").mkdir(parents=True)
  (folder.path / "80.saving").symlink_to(folder.path / "notes")
  folder.clean()
  left = {path.name for path in folder.path.iterdir()}
  assert left == {"10", "20", "30", "80.saving", *kept}


def test_a_damaged_step_is_replaced_and_a_foreign_one_is_moved_aside(folder, caplog):
  damage(folder, 30)
  junk(folder, 20)
  save(folder, 30)
  save(folder, 20)
  junk(folder, 20)
  save(folder, 20)
  assert folder.steps() == (10, 20, 30)
  aside = sorted(path.name for path in folder.path.iterdir() if not path.name.isdecimal())
  assert aside == ["20.replaced", "20.replaced-2"]
  assert (folder.path / "20.replaced" / "notes.txt").read_text() == "mine"
  assert "20.replaced" in caplog.text


def test_the_oldest_retire_and_what_is_damaged_does_not_count(folder):
  save(folder, 40)
  truncate(folder, 30)
  folder.retire(keep=2, latest=40)
  assert folder.named() == [20, 30, 40]
  assert folder.steps() == (20, 40)


def test_each_so_many_steps_and_the_best_of_those_evaluated_stay(folder):
  for step, loss in ((40, 2.0), (50, 1.0), (60, 3.0), (70, 1.5), (80, None)):
    save(folder, step, loss)
  folder.retire(keep=1, latest=80, period=30, best=2)
  assert folder.steps() == (30, 50, 60, 70, 80)
  folder.retire(keep=1, latest=80, best=1)
  assert folder.steps() == (50, 80)


def test_the_step_just_written_never_retires(folder):
  save(folder, 5)
  folder.retire(keep=1, latest=5)
  assert folder.steps() == (5, 30)


class Killed(BaseException):
  """Nothing runs after it, as after SIGKILL."""


def stop_after(patch: pytest.MonkeyPatch, operations: int) -> None:
  """Let that many operations on files be done, and stop the process before the next."""
  left = iter(range(operations))

  def counted(original):
    def call(*args, **kwargs):
      if next(left, None) is None:
        raise Killed
      return original(*args, **kwargs)

    return call

  for name in ("rename", "replace", "mkdir", "write_bytes"):
    patch.setattr(Path, name, counted(getattr(Path, name)))
  for name in ("write_synced", "sync_folder", "measure"):
    patch.setattr(manifests, name, counted(getattr(manifests, name)))
  patch.setattr(shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("before", ["fresh", "damaged"])
def test_a_kill_before_any_file_operation_leaves_a_whole_step(tmp_path, monkeypatch, before):
  """Stop before the 1st, 2nd, ... operation of a save, until one save gets through."""
  for operations in range(100):
    folder = Folder(tmp_path / str(operations))
    for step in (10, 20):
      save(folder, step)
    if before == "damaged":
      save(folder, 30)
      truncate(folder, 30)
    finished = False
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
      stop_after(patch, operations)
      save(folder, 30)
      folder.retire(keep=1, latest=30)
      finished = True
    again = Folder(folder.path)
    assert again.newest() in ((30,) if finished else (20, 30))
    again.clean()
    save(again, 40)
    assert again.newest() == 40
    assert all(path.name.isdecimal() for path in again.path.iterdir())
    if finished:
      break
  assert finished and operations > 8


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/checkpoints/30"])
def test_a_run_its_checkpoints_and_a_step_lead_to_the_step(folder, tmp_path, where):
  path, manifest = locate(tmp_path / where)
  assert (path, manifest.step) == (folder.step(30), 30)


def test_locating_falls_back_in_a_run_but_not_for_a_named_step(folder, tmp_path):
  truncate(folder, 30)
  assert locate(tmp_path / "run")[0] == folder.step(20)
  with pytest.raises(CheckpointError, match=r"30 is damaged: state/data has 4 bytes, not 700"):
    locate(folder.step(30))


def test_a_path_that_leads_nowhere_says_what_was_looked_for(folder, tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  for name, words in [
    ("nowhere", "No such file or directory: give a run's folder"),
    ("file", "Not a directory: give a run's folder"),
    (".", r"looked for manifest.json in it, in <step>/ and in checkpoints/<step>/"),
    ("empty", r"looked for manifest.json in .*/empty/checkpoints/<step>/"),
    ("run/checkpoints/31", "31: No such file or directory"),
  ]:
    with pytest.raises(CheckpointError, match=words) as error:
      locate(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
