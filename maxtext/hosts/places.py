"""Whether the environment says that this process is one of several, and which; knows no jax."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping

from maxtext.errors import ConfigError
from maxtext.hosts.sections import Hosts

PORT = 8482  # JAX's own choice on TPUs
FIRST_PORT, PORTS = 61440, 4096  # where jobs that have a number find one of their own, as in JAX

Environ = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Place:
  """Process `id` of `count`; number 0 listens at `coordinator` (host:port); `source` said so.

  Of several on a host, each has the GPU `device`; None: all that it sees.
  """

  coordinator: str
  count: int
  id: int
  source: str
  device: int | None = None

  @property
  def port(self) -> str:
    return self.coordinator.rpartition(":")[2]


def find(environ: Environ, hosts: Hosts, hardware: str = "auto") -> Place | None:
  """This process's place among several, None where it is alone.

  The first to speak is heard: the configuration, JAX's variables, Open MPI, SLURM, Cloud TPU.
  JAX_COORDINATOR_ADDRESS and JAX_COORDINATOR_PORT count with each. Raises ConfigError, which names
  a variable that is missing or makes no sense.
  """
  if hosts.skip_jax_distributed_system:
    return None
  address, count = hosts.jax_distributed_coordinator_address, hosts.jax_distributed_num_processes
  if address and count is not None and hosts.jax_distributed_process_id is not None:
    place = Place(address, count, hosts.jax_distributed_process_id, "the configuration")
    return place if count > 1 else None
  schemes = [_of_jax, _of_open_mpi, _of_slurm]
  if hardware in ("auto", "tpu") and environ.get("JAX_PLATFORMS") != "cpu":
    schemes.append(_of_tpu)
  for scheme in schemes:
    if (found := scheme(environ)) is not None:
      return found if found.count > 1 else None
  if "JAX_COORDINATOR_ADDRESS" in environ:
    problem = "is set, but not how many processes there are; set JAX_NUM_PROCESSES and "
    raise ConfigError("JAX_COORDINATOR_ADDRESS", f"{problem}JAX_PROCESS_ID too, or unset it")
  return None


def _of_jax(environ: Environ) -> Place | None:
  """JAX_NUM_PROCESSES and JAX_PROCESS_ID, beside JAX_COORDINATOR_ADDRESS."""
  if not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(environ):
    return None
  source = "JAX_NUM_PROCESSES"
  count = _number(environ, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  if count == 1:
    return Place("", 1, 0, source)
  address = _address(environ, _text(environ, "JAX_COORDINATOR_ADDRESS", source))
  return _placed(address, count, _number(environ, "JAX_PROCESS_ID", source), source)


def _of_open_mpi(environ: Environ) -> Place | None:
  """What mpirun sets. Under SLURM it starts its own daemons by srun, whose variables mislead."""
  if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} & set(environ):
    return None
  count = _number(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
  number = _number(environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
  uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
  launcher = re.search(r"tcp://(.+?)[,:]|tcp6://(\[.+?)[,\]]", uri)
  if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(count):
    host = "127.0.0.1"
  elif launcher:
    host = launcher[1] or f"{launcher[2]}]"
  elif count > 1:
    host = _text(environ, "JAX_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE")
  else:
    host = ""
  job = environ.get("PMIX_NAMESPACE") or uri.partition(".")[0]
  address = _address(environ, host, zlib.crc32(job.encode()) if job else None)
  several = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
  device = _device(environ, "OMPI_COMM_WORLD_LOCAL_RANK") if several else None
  return _placed(address, count, number, "Open MPI", device)


def _of_slurm(environ: Environ) -> Place | None:
  """What srun sets for a step of several tasks.

  SLURM_NTASKS is no sign of one: a batch script and the shell of salloc have it too, and neither is
  one of so many processes.
  """
  if "SLURM_STEP_NUM_TASKS" not in environ:
    return None
  count = _number(environ, "SLURM_STEP_NUM_TASKS", "")
  if count == 1:
    return Place("", 1, 0, "SLURM")
  number = _number(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
  nodes = _text(environ, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
  job = _number(environ, "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS")
  step = environ.get("SLURM_STEP_ID", "0")
  address = _address(environ, _first_node(nodes), job + int(step) if step.isdecimal() else job)
  tasks = re.sub(r"\(x\d+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
  device = _device(environ, "SLURM_LOCALID") if set(tasks.split(",")) != {"1"} else None
  return _placed(address, count, number, "SLURM", device)


def _of_tpu(environ: Environ) -> Place | None:
  """What GKE sets in the pods of a TPU slice, and of several slices. One host needs nothing."""
  names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if not names:
    return None
  hosts = [name.rpartition(":")[0] or name for name in names.split(",")]
  slices, number, coordinator = 1, 0, hosts[0]
  if "MEGASCALE_NUM_SLICES" in environ:
    slices = _number(environ, "MEGASCALE_NUM_SLICES", "")
  if slices > 1:
    number = _number(environ, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES") * len(hosts)
    named = _text(environ, "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES")
    coordinator = re.sub(r":\d+$", "", named)
  if len(hosts) > 1:
    worker = _number(environ, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
    if worker >= len(hosts):
      raise ConfigError("TPU_WORKER_ID", f"{worker} of the {len(hosts)} in TPU_WORKER_HOSTNAMES")
    number += worker
  return _placed(_address(environ, coordinator), len(hosts) * slices, number, "Cloud TPU")


def _first_node(nodes: str) -> str:
  """`node[007-015,20],x` -> `node007`."""
  first = re.split(r",(?![^\[]*\])", nodes)[0]
  return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first)


def _address(environ: Environ, host: str, job: int | None = None) -> str:
  """host:port; the port is the environment's, else the job's own, else PORT."""
  host = environ.get("JAX_COORDINATOR_ADDRESS", host)
  if re.fullmatch(r"(\[.*\]|[^:]*):\d+", host):
    return host
  port = PORT if job is None else FIRST_PORT + job % PORTS
  if "JAX_COORDINATOR_PORT" in environ:
    port = _number(environ, "JAX_COORDINATOR_PORT", "")
  return f"{host}:{port}"


def _device(environ: Environ, local: str) -> int | None:
  """The GPU of one of several processes on a host, unless it has been given its own."""
  given = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ","))
  if "JAX_LOCAL_DEVICE_IDS" in environ or "," not in given:
    return None
  return _number(environ, local, "more than one process on this host")


def _placed(address: str, count: int, number: int, source: str, device: int | None = None) -> Place:
  if number >= count:
    raise ConfigError(source, f"makes this process {number} of {count}; they count from 0")
  return Place(address, count, number, source, device)


def _number(environ: Environ, name: str, because: str) -> int:
  text = _text(environ, name, because)
  if not text.isdecimal():
    raise ConfigError(name, f"{text!r} is not a number; correct it, or unset it")
  return int(text)


def _text(environ: Environ, name: str, because: str) -> str:
  """A variable that is needed `because` another is set."""
  if not environ.get(name):
    problem = f"is not set, but {because} is; set it too, or skip_jax_distributed_system=true"
    raise ConfigError(name, problem)
  return environ[name]
