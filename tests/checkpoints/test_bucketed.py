"""Checkpoints and files of a run in a bucket, for which a folder stands, behind the same client."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from maxtext.bucket import Bucket, lacking
from maxtext.checkpoints.bucketed import Bucketed
from maxtext.checkpoints.lookup import locate
from maxtext.checkpoints.remote import CACHE, Steps, copied
from maxtext.errors import CheckpointError, ConfigError
from maxtext.hosts import mirror as mirrors
from maxtext.hosts.mirror import LEASE, Lease, Mirror, mirrored
from tests.checkpoints.conftest import SECTION


@pytest.fixture
def bucket(tmp_path) -> Bucket:
  return Bucket(f"file://{tmp_path}/bucket/run")


@pytest.fixture
def mirror(bucket, tmp_path) -> Mirror:
  found = Mirror(bucket, tmp_path / "here" / "run")
  found.lease.take()
  found.pull()
  return found


@pytest.fixture
def saved(mirror, states, extra, tmp_path):
  """Three saved steps; the folder that stands for the bucket."""
  mesh = states.mesh(4, 2)
  with Bucketed(mirror, SECTION) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, states.of(step, mesh), extra)
  return tmp_path / "bucket" / "run"


def opened(mirror: Mirror) -> Bucketed:
  return Bucketed(mirror, SECTION)


def test_what_is_saved_is_restored_bit_by_bit_and_nothing_is_left_on_the_own_disk(
  saved, mirror, states, extra, same_bits
):
  assert not [path for path in (mirror.folder / "checkpoints").rglob("*") if path.is_file()]
  mesh = states.mesh(2, 4)
  checkpoints = opened(mirror)
  assert checkpoints.steps() == (10, 20, 30) and checkpoints.newest() == 30
  for step in (30, 10):
    assert same_bits(checkpoints.restore(step, states.target(mesh)), states.of(step, mesh))
    assert checkpoints.extra(step) == extra
  assert not list(saved.rglob("unfinished"))


def test_every_damage_is_found_with_its_url_and_the_step_before_is_used(saved, mirror, caplog):
  files = [path for path in (saved / "checkpoints" / "30").rglob("*") if path.is_file()]
  for path in files:
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x"
    for content in (flipped, whole[:-1] if whole else b"x", None):
      path.unlink() if content is None else path.write_bytes(content)
      with opened(mirror) as checkpoints:
        caplog.clear()
        assert checkpoints.newest() == 20, path
        line = caplog.text
        assert f"{saved}/checkpoints/30 is" in line and "using step 20" in line, line
        named = path.name == "manifest.json" or path.name in line
        assert named and "no complete" not in line or content is None, line
    path.write_bytes(whole)
  assert opened(mirror).newest() == 30


def test_what_was_left_unfinished_is_no_step_and_is_cleared_by_the_next_save(
  saved, mirror, states, extra
):
  Steps(mirror.folder, mirror.bucket.below("checkpoints")).begin(30)
  with opened(mirror) as checkpoints:
    assert checkpoints.newest() == 20 and checkpoints.damaged() == ()
    assert (saved / "checkpoints" / "30" / "state").is_dir()
    checkpoints.save(40, states.of(40, states.mesh(4, 2)), extra)
  assert {path.name for path in (saved / "checkpoints").iterdir() if any(path.rglob("*.json"))} == {
    "10",
    "20",
    "40",
  }


def test_old_steps_go_and_a_dropped_one_is_gone(saved, mirror, states, extra):
  with opened(mirror) as checkpoints:
    checkpoints.save(40, states.of(40, states.mesh(4, 2)), extra)
    checkpoints.wait()
    assert checkpoints.steps() == (20, 30, 40)
    checkpoints.drop(40)
    assert checkpoints.steps() == (20, 30) and checkpoints.newest() == 30


def test_a_save_that_fails_is_an_error_and_costs_no_older_step(saved, mirror, states, extra):
  put = Bucket.put

  def failing(self, names, folder):
    names = list(names)
    put(self, names[: len(names) // 2], folder)
    raise OSError(28, "No space left on device", self.url)

  with pytest.MonkeyPatch.context() as patch, opened(mirror) as checkpoints:
    patch.setattr(Bucket, "put", failing)
    checkpoints.save(40, states.of(40, states.mesh(4, 2)), extra)
    with pytest.raises(CheckpointError, match="40: cannot be saved: No space left on device$"):
      checkpoints.wait()
    assert checkpoints.newest() == 30


def test_a_run_that_another_has_taken_over_commits_nothing_more(saved, mirror, states, extra):
  other = Lease(mirror.bucket)
  mirror.bucket.write(LEASE, other._text())
  with opened(mirror) as checkpoints:
    checkpoints.save(40, states.of(40, states.mesh(4, 2)), extra)
    with pytest.raises(CheckpointError, match="another process trains this run by now"):
      checkpoints.wait()
    assert checkpoints.newest() == 30


def test_a_bucket_that_is_gone_is_said_to_be_gone(saved, mirror, states, extra):
  saved.rename(saved.with_name("elsewhere"))
  with opened(mirror) as checkpoints:
    checkpoints.save(40, states.of(40, states.mesh(4, 2)), extra)
    with pytest.raises(CheckpointError, match="cannot be saved: there is no such bucket or object"):
      checkpoints.wait()


def test_a_url_of_a_run_its_checkpoints_or_a_step_leads_to_a_copy(saved, bucket):
  for url, step in (("", 30), ("/checkpoints", 30), ("/checkpoints/20", 20), ("/", 30)):
    folder, manifest = locate(bucket.url + url)
    assert manifest.step == step and (folder / "state").is_dir()
    assert not folder.is_relative_to(saved)
  with pytest.raises(CheckpointError, match="checkpoints/25 .*does not exist|is no complete"):
    locate(bucket.url + "/checkpoints/25")
  with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
    copied(f"{bucket.url}er")


def test_files_are_copied_when_they_change_and_go_when_they_are_gone(mirror, bucket):
  (mirror.folder / "config.yml").write_text("a: 1\n")
  (mirror.folder / "deep").mkdir()
  (mirror.folder / "deep" / "events").write_text("e")
  (mirror.folder / "half.writing").write_text("h")
  mirror.push()
  assert bucket.files().keys() - {LEASE} == {"config.yml", "deep/events"}
  (mirror.folder / "config.yml").unlink()
  (mirror.folder / "deep" / "events").write_text("ee")
  mirror.push()
  assert bucket.files().keys() - {LEASE} == {"deep/events"}
  assert bucket.read("deep/events") == b"ee"
  elsewhere = Mirror(bucket, mirror.folder.parent / "elsewhere")
  elsewhere.pull()
  assert [path.name for path in elsewhere.folder.rglob("*") if path.is_file()] == ["events"]


def test_a_file_that_goes_while_it_is_copied_is_no_failure(mirror, bucket, monkeypatch):
  for name in ("config.yml", "rollback.json"):
    (mirror.folder / name).write_text("a: 1\n")
  put = Bucket.put

  def going(self, names, folder):
    (mirror.folder / "rollback.json").unlink(missing_ok=True)
    put(self, names, folder)

  monkeypatch.setattr(Bucket, "put", going)
  mirror.push()
  assert bucket.files().keys() - {LEASE} == {"config.yml"}


def test_a_bucket_that_fails_meanwhile_costs_a_line_and_nothing_that_was_written(
  mirror, bucket, caplog
):
  (mirror.folder / "metrics.jsonl").write_text("1\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Bucket, "put", lambda *_: (_ for _ in ()).throw(OSError(5, "it is away")))
    mirror.try_push()
    mirror.try_push()
    assert caplog.text.count("not copied there (it is away); the run goes on") == 1
  mirror.try_push()
  assert "copied there again" in caplog.text and bucket.read("metrics.jsonl") == b"1\n"


def test_a_lease_is_waited_for_taken_from_the_dead_and_refused_by_the_living(
  bucket, tmp_path, monkeypatch
):
  monkeypatch.setattr(mirrors, "PERIOD", 0.2)
  monkeypatch.setattr(mirrors, "EXPIRED", 0.6)
  first = Lease(bucket)
  first._owner |= {"host": "elsewhere", "processes": "of another machine"}
  first.take()
  Lease(bucket).take()  # in time: it was never renewed
  with pytest.raises(CheckpointError, match="another process trains"):
    first.check()
  bucket.write(LEASE, first._text())
  ended = threading.Event()

  def renew() -> None:
    while not ended.wait(0.05):
      first.renew()

  living = threading.Thread(target=renew)
  living.start()
  try:
    with pytest.raises(ConfigError, match="is being trained by process .* of elsewhere"):
      with mirrored(bucket.url, str(tmp_path / "cache")):
        pass
  finally:
    ended.set()
    living.join()
  killed = json.loads(Lease(bucket)._text()) | {"process": 2**22 + 1}
  bucket.write(LEASE, json.dumps(killed).encode())
  monkeypatch.setattr(mirrors, "EXPIRED", 1e6)
  with mirrored(bucket.url, str(tmp_path / "cache")) as mirror:
    (mirror.folder / "config.yml").write_text("a: 1\n")
  assert set(bucket.files()) == {"config.yml"}


@pytest.mark.parametrize(
  ("url", "said"),
  [
    ("ftp://place/x", "runs are kept in a file system or at gs://"),
    ("gs://", "names no bucket"),
    ("az://box/x", "needs a package; pip install adlfs"),
  ],
)
def test_what_cannot_be_a_bucket_is_said(url, said):
  assert said in lacking(url)


def test_copies_that_are_read_go_with_the_process(saved, bucket):
  folder = copied(bucket.url)
  assert Path(folder).parent.name.startswith(CACHE)
