"""What the environment says of this process's place among several, or that it is alone."""

import pytest

from maxtext import config
from maxtext.errors import ConfigError, ConfigErrors
from maxtext.hosts import find

ALONE = config.load(["hardware=cpu"], {}).hosts
JAX = {
  "JAX_COORDINATOR_ADDRESS": "host0:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
STEP = {  # a task of `srun -n 8` in a job of two nodes
  "SLURM_JOB_ID": "5000",
  "SLURM_STEP_ID": "2",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_NUM_TASKS": "8",
  "SLURM_STEP_NODELIST": "node[007-008]",
}
SHELL = {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}  # of salloc
BATCH = SHELL | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node[007-008]"}
MPI = {
  "OMPI_COMM_WORLD_SIZE": "6",
  "OMPI_COMM_WORLD_RANK": "4",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI6 = MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,fe80::2]:4"}
LOCAL = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLICE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc,w-2.svc,w-3.svc"}
SLICES = SLICE | {
  "MEGASCALE_NUM_SLICES": "3",
  "MEGASCALE_SLICE_ID": "2",
  "MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.svc:8081",
}


@pytest.mark.parametrize(
  "environ, coordinator, count, number",
  [
    (JAX, "host0:1234", 4, 3),
    (JAX | {"JAX_COORDINATOR_ADDRESS": "host0"}, "host0:8482", 4, 3),
    (JAX | {"JAX_COORDINATOR_ADDRESS": "host0", "JAX_COORDINATOR_PORT": "99"}, "host0:99", 4, 3),
    (STEP, "node007:62346", 8, 5),  # 61440 + (5000 + 2) % 4096
    (STEP | {"SLURM_STEP_NODELIST": "a1,b[2-3]"}, "a1:62346", 8, 5),
    (STEP | {"SLURM_STEP_NODELIST": "r[1,3]n[04-07]x,b"}, "r1n04x:62346", 8, 5),
    (STEP | {"JAX_COORDINATOR_PORT": "99"}, "node007:99", 8, 5),
    (STEP | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:77"}, "10.0.0.9:77", 8, 5),
    (MPI | {"JAX_COORDINATOR_PORT": "99"}, "10.96.0.1:99", 6, 4),
    (MPI6 | {"JAX_COORDINATOR_PORT": "99"}, "[fe80::1]:99", 6, 4),
    (LOCAL | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "127.0.0.1:8482", 2, 1),
    (SLICE, "w-0.svc:8482", 4, 2),
    (SLICE | {"JAX_COORDINATOR_PORT": "99"}, "w-0.svc:99", 4, 2),
    (SLICE | {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476,c:8476"}, "a:8482", 3, 2),
    (SLICES, "s-0-0.svc:8482", 12, 10),
    (SLICES | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, "s-0-0.svc:8482", 3, 2),
  ],
)
def test_each_launcher_is_understood(environ, coordinator, count, number):
  place = find(environ, ALONE)
  assert (place.coordinator, place.count, place.id) == (coordinator, count, number)


@pytest.mark.parametrize(
  "environ",
  [
    {},
    SHELL,
    BATCH,  # a batch script that does not use srun
    STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    SHELL | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # the shell is a step of its own
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
    {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"},  # compiles ahead of time
    {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    {"JAX_COORDINATOR_PORT": "99"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    SLICE | {"JAX_PLATFORMS": "cpu"},
  ],
)
def test_what_looks_like_several_and_is_one_trains_alone(environ):
  assert find(environ, ALONE) is None


EACH = STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
  "environ, device",
  [
    (EACH, 3),
    (EACH | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3),
    (EACH | {"SLURM_STEP_TASKS_PER_NODE": "1,4"}, 3),
    (EACH | {"SLURM_STEP_TASKS_PER_NODE": "11(x2)"}, 3),
    (EACH | {"CUDA_VISIBLE_DEVICES": "2"}, None),  # srun has given each task its own
    (EACH | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # JAX reads it
    (EACH | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),  # a host's only process has them all
    (STEP, None),
    (LOCAL | {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1),
    (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, None),
    (SLICE, None),
    (JAX, None),
  ],
)
def test_of_several_processes_on_a_host_each_has_a_gpu(environ, device):
  assert find(environ, ALONE).device == device


def test_two_jobs_of_open_mpi_on_one_host_have_ports_of_their_own():
  ports = {int(find(environ, ALONE).port) for environ in (MPI, MPI6)}
  assert len(ports) == 2 and all(61440 <= port < 65536 for port in ports)


def test_a_run_on_the_cpu_of_a_tpu_host_is_alone():
  assert find(SLICE, ALONE, "cpu") is None


def test_mpirun_counts_and_not_the_daemons_that_it_starts_under_slurm():
  daemons = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
  assert find(daemons | MPI, ALONE).count == 6
  one = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
  assert find(daemons | one, ALONE) is None


@pytest.mark.parametrize(
  "environ, named",
  [
    ({"JAX_COORDINATOR_ADDRESS": "host0:1"}, "JAX_COORDINATOR_ADDRESS"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
    ({"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
    (JAX | {"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID"),
    (JAX | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID"),
    (JAX | {"JAX_PROCESS_ID": "4"}, "JAX_NUM_PROCESSES"),
    ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, "SLURM_PROCID"),
    ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK"),
    (MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "JAX_COORDINATOR_ADDRESS"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID"),
    (SLICE | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID"),
    (SLICE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}, "MEGASCALE_COORDINATOR"),
    (SLICE | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID"),
  ],
)
def test_half_set_variables_are_refused_in_a_line_that_names_one(environ, named):
  with pytest.raises(ConfigError, match=f"^{named}") as refused:
    find(environ, ALONE)
  assert "\n" not in str(refused.value)


KEYS = [
  "jax_distributed_coordinator_address=a:1",
  "jax_distributed_num_processes=2",
  "jax_distributed_process_id=1",
]


def test_the_configuration_comes_first_and_can_say_no():
  given = config.load(["hardware=cpu", "per_device_batch_size=1", *KEYS], {}).hosts
  assert find(JAX, given).count == 2
  assert find(STEP, config.load(["skip_jax_distributed_system=true"], {}).hosts) is None


def test_a_configuration_that_is_kept_is_of_no_place_and_a_change_of_place_is_none(tmp_path):
  placed = config.load(["hardware=cpu", "per_device_batch_size=1", "run_name=a", *KEYS], {})
  kept = tmp_path / "config.yml"
  kept.write_text(placed.resolved())
  again = config.load([str(kept)], {})
  assert find({}, again.hosts) is None
  assert placed.changes(again.resolved()) == []


@pytest.mark.parametrize(
  "keys, complaint",
  [
    (["jax_distributed_process_id=0"], "jax_distributed_process_id: counts only beside jax_d"),
    (["jax_distributed_coordinator_address=a"], "'a' is not of the form host:port"),
    (
      ["jax_distributed_num_processes=2", "jax_distributed_process_id=2"],
      "2 of 2 processes; they are numbered from 0 to 1",
    ),
  ],
)
def test_keys_that_do_not_go_together_are_refused(keys, complaint):
  with pytest.raises(ConfigErrors, match=complaint):
    config.load(keys, {})


def test_the_devices_of_all_processes_are_checked_before_any_of_them_waits():
  keys = ["hardware=cpu", "devices=4", "ici_fsdp_parallelism=8", "per_device_batch_size=1"]
  assert config.load(keys, JAX | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
  with pytest.raises(ConfigErrors, match="16 devices cannot be arranged as fsdp 8"):
    config.load(keys, JAX)
  with pytest.raises(ConfigErrors, match="environment +JAX_PROCESS_ID: is not set"):
    config.load(keys, {"JAX_NUM_PROCESSES": "2"} | {"JAX_COORDINATOR_ADDRESS": "a"})
