"""The command lines of xpk and docker that start a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from maxtext.jobs.job import AGAIN, CRASHED, Job


def xpk(job: Job) -> list[str]:
  """`xpk workload create` for TPU slices, or nodes with GPUs."""
  launch, machine = job.launch, job.machine
  gpus = [f"--device-type={machine.xpk}", f"--num-nodes={machine.hosts}"]
  slices = [f"--tpu-type={machine.xpk}", f"--num-slices={job.slices}"]
  return [
    "xpk",
    "workload",
    "create",
    f"--cluster={launch.launch_cluster}",
    f"--project={launch.launch_project}",
    f"--zone={launch.launch_zone}",
    f"--namespace={launch.launch_namespace}",
    f"--workload={job.name}",
    *(slices if machine.topology else gpus),
    f"--docker-image={launch.launch_image}",
    f"--storage={launch.launch_volume}",
    f"--max-restarts={launch.launch_max_restarts}",
    f"--restart-on-exit-codes={CRASHED},{AGAIN}",  # and by itself those of signals
    f"--termination-grace-period-seconds={launch.launch_grace_seconds}",
    *(f"--env={name}={value}" for name, value in launch.environment.items()),
    f"--command={' '.join(map(_in_a_line, job.command))}",
  ]


def _in_a_line(word: str) -> str:
  """A word for the shell in which xpk runs a command: as codes what xpk's manifests do not survive,
  line breaks and quotes, and doubled $, of which Kubernetes takes one away.
  """
  codes = {code: f"\\x{code:02x}" for code in (*range(32), 127, *map(ord, "'\"\\"))}
  coded = word.translate(codes)
  quoted = shlex.quote(word) if coded == word else f"$'{coded}'"
  return quoted.replace("$", "$$")


def docker(job: Job) -> list[str]:
  """`docker run` on this host, with all its chips."""
  launch = job.launch
  tpu = ["--privileged", "--user=root", "--network=host"]
  devices = {"tpu": tpu, "gpu": ["--gpus=all"], "cpu": []}[job.machine.hardware]
  return [
    "docker",
    "run",
    "--rm",
    "--init",
    f"--name={job.name}",
    "--ipc=host",
    *devices,
    f"--stop-timeout={launch.launch_grace_seconds}",
    f"--volume={launch.launch_volume}:{launch.launch_mount}",
    *(f"--env={name}={value}" for name, value in launch.environment.items()),
    *(f"--env={name}" for name in launch.launch_secrets),
    launch.launch_image,
    *job.command,
  ]


def script(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
  """A command line for a shell, an argument to a line, with variables of its own."""
  own = [f"{name}={value}" for name, value in (variables or {}).items()]
  words = [*own, *map(shlex.quote, command)]
  return " \\\n  ".join([" ".join(words[: len(own) + 3]), *words[len(own) + 3 :]]) + "\n"


def afterwards(job: Job, path: Path) -> Iterator[tuple[str, str]]:
  """What to do with a job that was started from `path`, and the command that does it."""
  launch = job.launch
  of_process_0 = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  space = f"--namespace={launch.launch_namespace}"
  if launch.launch_target == "docker":
    mounted = f"--volume={launch.launch_volume}:{launch.launch_mount}:ro"
    look = f"tensorboard --bind_all --logdir={job.folder}"
    yield "logs", f"docker logs --follow {job.name}"
    yield (
      "TensorBoard",
      f"docker run --rm --publish=6006:6006 {mounted} {launch.launch_image} {look}",
    )
    yield "stop", f"docker stop {job.name}"
    return
  selector = f"--selector=jobset.sigs.k8s.io/jobset-name={job.name},{of_process_0}"
  yield "logs", f"kubectl logs {space} --follow --tail=-1 {selector}"
  look = f"kubectl port-forward {space} service/{job.name}-tensorboard 6006"
  if launch.launch_target == "gke":
    yield "TensorBoard", look
    yield "stop", f"kubectl delete --filename={path}"
  else:
    begun = f"kubectl rollout status {space} deployment/{job.name}-tensorboard"
    apply = f"kubectl apply --filename={path.with_name('tensorboard.yml')}"
    yield "TensorBoard", f"{apply} && {begun} && {look}"
    place = f"--cluster={launch.launch_cluster} --project={launch.launch_project}"
    place += f" --zone={launch.launch_zone}"
    yield "stop", f"xpk workload delete --workload={job.name} {place}"
