"""Processes on one machine train as one: the same numbers, one configuration, one end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from end_to_end import hosts
from end_to_end.runs import Run, module

SMALL = ("base_num_decoder_layers=1", "base_mlp_dim=32", "eval_interval=-1", "max_target_length=16")
HASTE = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
ONE_DEVICE = ("devices=1", "jax_distributed_heartbeat_timeout_seconds=12")


def ended(processes):
  """The exit codes and the last lines."""
  codes = [process.wait() for process in processes]
  return codes, [process.lines[-1] if process.lines else "" for process in processes]


def test_processes_that_disagree_all_end_with_2_and_the_keys_that_differ(tmp_path):
  run = Run(tmp_path, "differ", SMALL)
  processes = hosts.together(run, 2, *ONE_DEVICE, own=(("steps=4",), ("steps=5", "adam_b1=0.8")))
  codes = [process.wait() for process in processes]
  assert codes == [2, 2]
  for process in processes:
    assert process.lines[-2:] == [
      "steps: 4 on process 0, 5 on process 1; give all processes the same",
      "adam_b1: 0.9 on process 0, 0.8 on process 1; give all processes the same",
    ]


@pytest.mark.slow
def test_after_a_death_both_go_on_with_the_newest_checkpoint(tmp_path):
  run = Run(tmp_path, "killed", (*SMALL, "steps=1000000", "checkpoint_period=2"))
  hosts.lost(hosts.together(run, 2, *ONE_DEVICE), signal.SIGKILL, 1)
  processes = hosts.together(run, 2, *ONE_DEVICE)
  processes[0].reach(0)
  assert processes[0].step() >= 4
  processes[1].send(signal.SIGTERM)
  codes, _ = ended(processes)
  assert codes == [0, 0]
  assert f"stopped by SIGTERM after {processes[0].step() + 1} of" in processes[0].output
  assert processes[1].output == ""


@pytest.mark.slow
def test_after_a_death_both_go_on_with_the_newest_copy_that_each_has_on_its_own_disk(tmp_path):
  local = ("enable_emergency_checkpoint=true", "local_checkpoint_period=2")
  keys = (*SMALL, *ONE_DEVICE, "steps=24", "checkpoint_period=1000", *local)
  keys = (*keys, f"local_checkpoint_directory={tmp_path}/local")
  whole, killed = (Run(tmp_path, name, keys) for name in ("whole", "killed"))
  for process in hosts.together(whole, 2):
    process.ends(0)
  processes = hosts.together(killed, 2)
  processes[0].reach(9)
  for process in processes:
    process.kill()
  copies = [tmp_path / "local" / "killed" / f"process-{number}" for number in (0, 1)]
  steps = [{int(path.name) for path in copy.iterdir() if path.name.isdigit()} for copy in copies]
  common = max(steps[0] & steps[1])
  damaged = copies[1] / str(common) / "state"
  damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
  processes = hosts.together(killed, 2)
  output = [process.ends(0) for process in processes][0]
  assert f"process-1/{common} is damaged: state is not as it was written; not used" in output
  assert f"resuming {killed.folder} after {common - 2} steps" in output
  assert killed.hashes() == whole.hashes()
  assert killed.losses() == whole.losses()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_whichever_process_dies_or_stops_the_others_name_it(tmp_path, number, victim):
  run = Run(tmp_path, "lost", (*SMALL, "steps=1000000"))
  hosts.lost(hosts.together(run, 3, *ONE_DEVICE, "ici_data_parallelism=3"), number, victim)


@pytest.mark.slow
def test_a_configuration_that_one_process_cannot_load_ends_both_with_2(tmp_path):
  run = Run(tmp_path, "typo", SMALL)
  codes, (first, second) = ended(hosts.together(run, 2, *ONE_DEVICE, own=((), ("steps=0",))))
  assert codes == [2, 2]
  assert "steps: 0 is out of range" in second
  assert first.startswith("process 1 of 2") and second in first


@pytest.mark.slow
def test_documents_that_one_process_cannot_read_end_both_with_3(tmp_path):
  homes = ({"HOME": str(tmp_path / "a")}, {"HOME": str(tmp_path / "b")})
  for name, text in (("a", b"Once upon a time. " * 500), ("b", b"Once \xff")):
    (tmp_path / name / "texts").mkdir(parents=True)
    (tmp_path / name / "texts" / "a.txt").write_bytes(text)
  run = Run(tmp_path, "data", (*SMALL, "dataset_path=~/texts"))
  codes, (first, second) = ended(hosts.together(run, 2, *ONE_DEVICE, environments=homes))
  assert codes == [3, 3]
  assert first.startswith("process 1 of 2") and second in first


@pytest.mark.slow
def test_documents_that_differ_end_both_with_2(tmp_path):
  homes = ({"HOME": str(tmp_path / "a")}, {"HOME": str(tmp_path / "b")})
  for name in ("a", "b"):
    (tmp_path / name / "texts").mkdir(parents=True)
    (tmp_path / name / "texts" / "a.txt").write_text(f"Once upon a time, {name}. " * 500)
  run = Run(tmp_path, "data", (*SMALL, "dataset_path=~/texts"))
  codes, lines = ended(hosts.together(run, 2, *ONE_DEVICE, environments=homes))
  assert codes == [2, 2]
  assert all(line.startswith("dataset_path: documents and tokens of sha256") for line in lines)


@pytest.mark.slow
def test_several_processes_have_the_losses_of_one_and_save_on_sigterm_to_any_of_them(tmp_path):
  keys = (*hosts.KEYS, f"steps={hosts.STEPS}")
  one, two, moved = (Run(tmp_path, name, keys) for name in ("one", "two", "moved"))
  one.train("devices=8")
  hosts.finish(two, 2)
  hosts.same(one, two)
  hosts.saved_by_sigterm(moved, 2, 1)
  hosts.saved_by_sigterm(moved, 4, 0)
  moved.train("devices=8")
  hosts.same(one, moved)


@pytest.mark.slow
def test_a_state_is_bit_equal_after_it_was_saved_and_restored_by_any_number_of_processes(tmp_path):
  keys = (*SMALL, "per_device_batch_size=1", "steps=3")
  run = Run(tmp_path, "one", keys)
  run.train("devices=8")
  hashes = run.hashes()
  for count in (2, 4):
    full = f"load_full_state_path={run.folder}"
    run = Run(tmp_path, f"by{count}", (*keys, full, "save_checkpoint_on_start=true"))
    hosts.finish(run, count, "save_checkpoint_on_completion=false")
    assert values(run.hashes()) == values(hashes)
  alone = Run(tmp_path, "again", (*keys, f"load_full_state_path={run.folder}"))
  alone.train("devices=8", "save_checkpoint_on_start=true")
  assert alone.hashes() == hashes


@pytest.mark.slow
def test_two_processes_go_back_together_and_once_more_after_a_death(tmp_path):
  keys = (*SMALL, *ONE_DEVICE, "steps=60", "checkpoint_period=7", "rollback_limit=100")
  keys += ("save_checkpoint_on_start=true",)
  entry = (str(hosts.__file__).replace("hosts.py", "faults.py"), "nan", "train")
  whole, killed = (Run(tmp_path, name, keys, entry) for name in ("whole", "killed"))
  processes = hosts.together(whole, 2, environments=(HASTE, HASTE))
  output, second = (process.ends(0) for process in processes)
  assert "going back to the checkpoint after" in output and second == ""
  assert list((whole.folder / "incidents").glob("*.json"))
  processes = hosts.together(killed, 2, environments=(HASTE, HASTE))
  processes[0].until(lambda: "going back" in processes[0].output)
  processes[1].kill()
  processes[0].ends(75)
  for process in hosts.together(killed, 2, environments=(HASTE, HASTE)):
    process.ends(0)
  assert killed.hashes() == whole.hashes()
  assert killed.losses() == whole.losses()


@pytest.mark.slow
def test_a_state_that_one_replica_reads_is_bit_equal_in_the_other_which_reads_nothing(tmp_path):
  keys = (*SMALL, *ONE_DEVICE, "ici_data_parallelism=2", "ici_fsdp_parallelism=1", "steps=3")
  entry = (str(hosts.__file__).replace("hosts.py", "faults.py"), "unread", "train")
  saved = Run(tmp_path, "saved", keys)
  for process in hosts.together(saved, 2):
    process.ends(0)
  more = (f"load_full_state_path={saved.folder}", "save_checkpoint_on_start=true")
  read = Run(tmp_path, "read", (*keys, *more), entry)
  for process in hosts.together(read, 2, "enable_single_replica_ckpt_restoring=true"):
    process.ends(0)
  assert read.hashes() == saved.hashes()
  codes, lines = ended(hosts.together(Run(tmp_path, "both", (*keys, *more), entry), 2))
  assert 0 not in codes and "process 1 reads a state" in "".join(lines)


def values(hashes: str) -> list[tuple[str, str]]:
  """Each array's path and sha256, without its sharding."""
  rows = [line.split("\t") for line in hashes.splitlines()]
  return [(row[0], row[-1]) for row in rows]


@pytest.mark.slow
def test_two_processes_write_the_text_of_one_and_the_first_alone_prints_it(tmp_path):
  run = Run(tmp_path, "writes", (*SMALL, "steps=10"))
  run.train("devices=1")
  keys = ("prompt=Once", "decode_length=40", "decode_sampling_strategy=weighted", "devices=2")
  alone = module("decode", run.folder, *keys).ends(0)
  placed = hosts.places(2)
  both = [module("decode", run.folder, *keys, environment=place) for place in placed]
  first, second = (process.ends(0) for process in both)
  text = lambda output: output.partition("Once")[2].rpartition("\n40 tokens in")[0]
  assert text(first) == text(alone) != ""
  assert second == ""


@pytest.mark.slow
def test_a_folder_that_one_process_does_not_see_ends_both_with_2(tmp_path):
  homes = ({"HOME": str(tmp_path / "a")}, {"HOME": str(tmp_path / "b")})
  run = Run(Path("~/runs"), "unshared", SMALL)
  codes, (first, second) = ended(hosts.together(run, 2, *ONE_DEVICE, environments=homes))
  assert codes == [2, 2]
  assert "is not there, where process 0 has made it; name one that all hosts share" in second
  assert first.startswith("process 1 of 2") and second in first


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_others_do_not_come_ends_with_75(tmp_path, number):
  place = hosts.places(2)[number]
  timeout = "jax_distributed_initialization_timeout=3"
  process = Run(tmp_path, "alone", SMALL).start(*ONE_DEVICE, timeout, environment=place)
  assert "did not all come within 3 s" in process.ends(75)
