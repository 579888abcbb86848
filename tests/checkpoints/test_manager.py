"""What is saved comes back bit for bit on any mesh; what cannot be says so in one line."""

from __future__ import annotations

import random
import re
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxtext.checkpoints import storage
from maxtext.checkpoints.lookup import locate
from maxtext.checkpoints.manager import restore_newest, restore_parameters, restore_state
from maxtext.checkpoints.storage import Writer
from maxtext.checkpoints.stores import Store
from maxtext.errors import CheckpointError


@pytest.fixture
def row(states):
  return states.mesh(8, 1)


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(
  open_checkpoints, states, extra, same_bits, ocdbt, zarr3
):
  checkpoints = open_checkpoints(
    checkpoint_storage_use_ocdbt=ocdbt, checkpoint_storage_use_zarr3=zarr3
  )
  state = states.of(10, states.mesh(8, 1))
  assert checkpoints.save(10, state, extra)
  checkpoints.wait()
  assert (checkpoints.steps(), checkpoints.newest()) == ((10,), 10)
  for shape in [(8, 1), (2, 4), (1, 1)]:
    target = states.target(states.mesh(*shape))
    restored = checkpoints.restore(10, target)
    assert same_bits(restored, state)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(
      lambda a: a.sharding, target
    )


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_read_once_and_sent_to_its_replicas_a_state_has_the_same_bits(
  open_checkpoints, states, extra, same_bits, monkeypatch, shape
):
  """Minus zeros and NaNs among them; and no byte of an array is read twice."""
  checkpoints = open_checkpoints(enable_single_replica_ckpt_restoring=True)
  state = states.of(10, states.mesh(2, 4))
  checkpoints.save(10, state, extra)
  checkpoints.wait()
  read, bytes_read = Store.read, []

  def counted(*arguments):
    found = read(*arguments)
    bytes_read.append(found.nbytes)
    return found

  monkeypatch.setattr(Store, "read", counted)
  target = states.target(states.mesh(*shape))
  restored = checkpoints.restore(10, target)
  assert same_bits(restored, state)
  assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target))
  assert sum(bytes_read) == sum(array.nbytes for array in jax.tree.leaves(state))


def test_a_restored_state_can_be_donated(open_checkpoints, states, extra, same_bits, row):
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  restored = checkpoints.restore(10, states.target(row))
  jax.block_until_ready(
    jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)(restored)
  )
  assert same_bits(checkpoints.restore(10, states.target(row)), states.of(10, row))


def test_steps_that_go_on_at_once_do_not_reach_into_the_save(
  open_checkpoints, states, extra, same_bits, row
):
  """The state is donated to the next step while its save is being written, ten times over."""
  checkpoints = open_checkpoints(max_num_checkpoints_to_keep=-1, checkpoint_period=1)
  advance = jax.jit(
    lambda s: jax.tree.map(lambda a: (a * 3 + 1).astype(a.dtype), s), donate_argnums=0
  )
  # As a program's own result: arrays made from numpy are never really donated.
  state = advance(states.of(0, row))
  truth = {}
  for step in range(1, 11):
    truth[step] = jax.tree.map(lambda a: np.array(a, copy=True), state)
    checkpoints.save(step, state, extra)
    for _ in range(3):
      state = advance(state)
    jax.block_until_ready(state)
  checkpoints.wait()
  target = states.target(states.mesh(2, 4))
  assert all(same_bits(checkpoints.restore(step, target), truth[step]) for step in truth)


def test_what_layers_have_is_cut_into_them_and_comes_back_on_any_mesh(
  open_checkpoints, states, extra, same_bits, row, monkeypatch
):
  """A layer, and an expert of it, is a chunk; what is small, or of two axes, is whole."""
  monkeypatch.setattr(storage, "PIECE", 2 * 8 * 16)
  monkeypatch.setattr(storage, "SHARE", 4)
  here = NamedSharding(row, P())
  shapes = {"layers": (3, 8, 16), "experts": (3, 2, 8, 16), "scales": (3, 1, 16), "table": (64, 16)}
  draw = lambda shape: np.random.default_rng(0).random(shape, np.float32)
  more = {name: jax.device_put(draw(shape), here) for name, shape in shapes.items()}
  state = states.of(10, row) | {"more": more}
  like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
  target = states.target(states.mesh(2, 4)) | {"more": jax.tree.map(like, more)}
  checkpoints = open_checkpoints()
  checkpoints.save(10, state, extra)
  checkpoints.wait()
  assert same_bits(checkpoints.restore(10, target), state)
  place = {"driver": "ocdbt", "base": f"file://{checkpoints.directory}/10/state/"}
  for name, chunk in {
    "params.layers.up": (1, 8, 2),
    "more.layers": (1, 8, 16),
    "more.experts": (1, 1, 8, 16),
    "more.scales": (3, 1, 16),
    "more.table": (64, 16),
  }.items():
    there = tensorstore.open({"driver": "zarr3", "kvstore": {**place, "path": f"{name}/"}}).result()
    assert there.chunk_layout.read_chunk.shape == chunk, name


def test_extras_come_back_as_they_were_when_saved(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  before = {**extra, "data": dict(extra["data"])}
  extra["data"]["offset"] = 99
  checkpoints.wait()
  assert checkpoints.extra(10) == before
  assert (checkpoints.directory / "10" / "config.yml").read_text() == before["config"]


def test_a_step_is_saved_when_it_is_due_or_forced_and_once(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints(checkpoint_period=10)
  state = states.of(10, row)
  assert [checkpoints.due(step) for step in (0, 9, 10, 11)] == [True, False, True, False]
  assert not checkpoints.save(9, state, extra)
  assert checkpoints.save(10, state, extra)
  assert not checkpoints.save(10, state, extra, force=True)
  assert checkpoints.save(13, state, extra, force=True)
  checkpoints.wait()
  assert checkpoints.steps() == (10, 13)


def test_without_checkpointing_nothing_is_written(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints(enable_checkpointing=False)
  assert not checkpoints.save(10, states.of(10, row), extra, force=True)
  assert not checkpoints.directory.exists()


def test_a_synchronous_save_is_on_disk_when_it_returns(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints(async_checkpointing=False)
  checkpoints.save(10, states.of(10, row), extra)
  assert checkpoints.steps() == (10,)


def test_the_newest_are_kept_and_litter_is_removed(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints(max_num_checkpoints_to_keep=2)
  litter = checkpoints.directory / "7.saving" / "state.orbax-checkpoint-tmp"
  litter.mkdir(parents=True)
  assert checkpoints.newest() is None and litter.exists()  # who only reads removes nothing
  for step in (10, 20, 30):
    checkpoints.save(step, states.of(step, row), extra)
  checkpoints.wait()
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["20", "30"]


def test_every_one_of_100_flipped_bits_is_found_and_the_step_before_serves(
  open_checkpoints, states, extra, same_bits, row
):
  checkpoints = open_checkpoints()
  for step in (10, 20):
    checkpoints.save(step, states.of(step, row), extra)
  checkpoints.wait()
  target, rng = states.target(row), random.Random(0)
  files = sorted(path for path in (checkpoints.directory / "20").rglob("*") if path.is_file())
  sizes = [path.stat().st_size for path in files]
  for trial in range(100):
    (file,) = rng.choices(files, sizes) if trial >= len(files) else [files[trial]]
    good = file.read_bytes()
    bad = bytearray(good)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    file.write_bytes(bad)
    assert (checkpoints.newest(), checkpoints.steps()) == (10, (10,)), file
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoints.directory / "20"))):
      checkpoints.restore(20, target)
    file.write_bytes(good)
  assert checkpoints.newest() == 20
  assert same_bits(checkpoints.restore(10, target), states.of(10, row))


def test_a_half_written_step_is_saved_again(open_checkpoints, states, extra, same_bits, row):
  checkpoints = open_checkpoints()
  for _ in range(2):
    checkpoints.save(10, states.of(10, row), extra)
    checkpoints.wait()
    (checkpoints.directory / "10" / "state" / "_METADATA").unlink()
    assert checkpoints.newest() is None
  assert checkpoints.save(10, states.of(11, row), extra)
  checkpoints.wait()
  assert same_bits(checkpoints.restore(10, states.target(row)), states.of(11, row))
  assert [path.name for path in checkpoints.directory.iterdir()] == ["10"]


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (
      {"shape": (16, 64)},
      "params/embedding is float32 [16 32] in the checkpoint and float32 [16 64]",
    ),
    ({"dtype": jnp.bfloat16}, "and bfloat16 [16 32] in this model; 1 of 11 arrays differ"),
  ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
  open_checkpoints, states, extra, row, change, words
):
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  target = states.target(row)
  leaf = target["params"]["embedding"]
  wanted = {"shape": leaf.shape, "dtype": leaf.dtype, **change}
  target["params"] = {
    **target["params"],
    "embedding": jax.ShapeDtypeStruct(**wanted, sharding=leaf.sharding),
  }
  with pytest.raises(CheckpointError) as error:
    checkpoints.restore(10, target)
  assert str(error.value).startswith(f"{checkpoints.directory}/10 is of another model: ")
  assert words in str(error.value) and "\n" not in str(error.value)


def test_parameters_alone_are_restored_from_a_run_its_checkpoints_or_a_step(
  open_checkpoints, states, extra, same_bits, row, monkeypatch
):
  checkpoints = open_checkpoints()
  for step in (10, 20):
    checkpoints.save(step, states.of(step, row), extra)
  checkpoints.wait()
  read = []
  deserialize = ocp.type_handlers.ArrayHandler.deserialize

  def spy(self, infos, args=None):
    read.extend(info.name for info in infos)
    return deserialize(self, infos, args)

  monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", spy)
  target = states.target(states.mesh(2, 4))["params"]
  where = checkpoints.directory
  for path, step in [(where.parent, 20), (where, 20), (where / "10", 10), (str(where / "20"), 20)]:
    assert same_bits(restore_parameters(path, target), states.of(step, row)["params"])
  assert set(read) == {"params.embedding", "params.layers.up", "params.norm.scale"}
  del target["embedding"]
  with pytest.raises(
    CheckpointError, match="params/embedding, float32 .16 32. in the checkpoint, is not in"
  ):
    restore_parameters(where, target)


def test_parameters_come_from_the_newest_step_where_training_has_deleted_the_one_that_was_found(
  open_checkpoints, states, extra, same_bits, row
):
  checkpoints = open_checkpoints()
  for step in (10, 20):
    checkpoints.save(step, states.of(step, row), extra)
  checkpoints.wait()
  run, target = checkpoints.directory.parent, states.target(row)["params"]
  old = locate(checkpoints.directory / "10")
  assert restore_newest(run, *old, target)[0].step == 10
  checkpoints.drop(10)
  manifest, params = restore_newest(run, *old, target)
  assert (manifest.step, same_bits(params, states.of(20, row)["params"])) == (20, True)
  with pytest.raises(CheckpointError):  # it was named
    restore_newest(old[0], *old, target)


def test_a_full_state_comes_from_another_run_with_its_extras(
  open_checkpoints, states, extra, same_bits, row
):
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  state, found = restore_state(checkpoints.directory.parent, states.target(row))
  assert same_bits(state, states.of(10, row)) and found == extra


def test_stock_orbax_reads_the_arrays(open_checkpoints, states, extra, same_bits, row):
  checkpoints = open_checkpoints()
  state = states.of(10, row)
  checkpoints.save(10, state, extra)
  checkpoints.wait()
  tree = ocp.PyTreeCheckpointer().restore(
    checkpoints.directory / "10" / "state",
    restore_args=jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), storage._nested(state)
    ),
  )
  assert same_bits(tree["params"], state["params"])
  assert set(tree["opt_state"]) == {"0"}


def test_keys_that_orbax_would_merge_are_refused(row):
  with pytest.raises(ValueError, match="one name"):
    storage.describe({"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}})


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 4 MB, which the test may fill and make read-only."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small file system takes root")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def small_files():
  """For the length of a test no file of this process may grow past 1 MB."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def too_large(row) -> dict:
  return {"params": {"w": jax.random.normal(jax.random.key(0), (8, 1 << 18))}}


def refuses_and_recovers(checkpoints, cause, large, small, extra, capfd) -> None:
  """A save that fails is an error at the next call, and harms neither past nor future."""
  checkpoints.save(10, small, extra)
  checkpoints.wait()
  for step, call in [(20, checkpoints.wait), (30, lambda: checkpoints.save(40, small, extra))]:
    checkpoints.save(step, large, extra)
    with pytest.raises(CheckpointError) as error:
      call()
    assert str(error.value) == f"{checkpoints.directory}/{step}: cannot be saved: {cause}"
  assert [path.name for path in checkpoints.directory.iterdir()] == ["10"]
  assert checkpoints.steps() == (10,)
  assert checkpoints.save(40, small, extra)
  checkpoints.wait()
  assert checkpoints.steps() == (10, 40)
  assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_error_and_the_last_step_stays(
  small_disk, open_checkpoints, states, extra, row, capfd
):
  checkpoints = open_checkpoints(small_disk / "run" / "checkpoints")
  cause = "No space left on device"
  refuses_and_recovers(checkpoints, cause, too_large(row), states.of(1, row), extra, capfd)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_may_not_grow_is_one_error_and_the_last_step_stays(
  small_files, open_checkpoints, states, extra, row, capfd
):
  checkpoints = open_checkpoints()
  refuses_and_recovers(
    checkpoints, "File too large", too_large(row), states.of(1, row), extra, capfd
  )


def test_a_disk_that_turned_read_only_is_one_error(
  small_disk, open_checkpoints, states, extra, row, same_bits
):
  checkpoints = open_checkpoints(small_disk / "run" / "checkpoints")
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  with pytest.raises(CheckpointError) as error:
    checkpoints.save(20, states.of(20, row), extra)
  assert str(error.value) == f"{checkpoints.directory}/20: cannot be saved: Read-only file system"
  assert same_bits(checkpoints.restore(10, states.target(row)), states.of(10, row))


@pytest.mark.parametrize("failed", [None, "start", "finish"])
def test_closing_orbax_fails_in_silence_only_after_a_save_that_failed(
  open_checkpoints, states, extra, row, monkeypatch, failed
):
  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  monkeypatch.setattr(Writer, "close", full)
  if failed:
    monkeypatch.setattr(Writer, failed, full)
    with pytest.raises(CheckpointError, match="/20: cannot be saved: No space left on device"):
      checkpoints.save(20, states.of(20, row), extra)
      checkpoints.wait()
    checkpoints.close()
  else:
    with pytest.raises(
      CheckpointError, match=f"^{checkpoints.directory}: cannot be closed: No space left on device$"
    ):
      checkpoints.close()


@pytest.mark.parametrize("what", ["run", "run/checkpoints"])
def test_a_file_where_a_folder_should_be_is_one_error(
  tmp_path, open_checkpoints, states, extra, row, what
):
  (tmp_path / what).parent.mkdir(exist_ok=True)
  (tmp_path / what).touch()
  checkpoints = open_checkpoints()
  with pytest.raises(
    CheckpointError, match=f"^{checkpoints.directory}.*(Not a directory|File exists)$"
  ):
    checkpoints.save(10, states.of(10, row), extra)


# pytest's own hook for errors that no thread can raise stands where ours does in a run.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_folder_removed_while_it_is_written_is_one_error(
  open_checkpoints, states, extra, row, monkeypatch, when, capfd
):
  """`before` Orbax is done, and `after` it, before the manifest is written."""
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  checkpoints.wait()
  finish = storage.Writer.finish

  def interfere(self):
    if when == "before":
      shutil.rmtree(checkpoints.directory, ignore_errors=True)
    finish(self)
    shutil.rmtree(checkpoints.directory, ignore_errors=True)

  with monkeypatch.context() as patch:
    patch.setattr(storage.Writer, "finish", interfere)
    checkpoints.save(20, states.of(20, row), extra)
    with pytest.raises(
      CheckpointError, match=f"^{checkpoints.directory}/20: cannot be saved: No such file"
    ):
      checkpoints.wait()
  checkpoints.save(30, states.of(30, row), extra)
  checkpoints.wait()
  assert checkpoints.steps() == (30,)
  assert capfd.readouterr() == ("", "")


def test_the_newest_step_is_the_one_under_way(open_checkpoints, states, extra, row):
  checkpoints = open_checkpoints()
  checkpoints.save(10, states.of(10, row), extra)
  assert (checkpoints.newest(), checkpoints.steps()) == (10, (10,))


def test_leaving_with_an_error_finishes_the_save_and_keeps_the_error(
  open_checkpoints, states, extra, row
):
  checkpoints = open_checkpoints()
  with pytest.raises(ZeroDivisionError), checkpoints:
    checkpoints.save(10, states.of(10, row), extra)
    raise ZeroDivisionError
  assert checkpoints.steps() == (10,)
