"""`python -m maxtext.launch config.yml launch_target=gke key=value`: start a run elsewhere."""

from __future__ import annotations

import dataclasses
import difflib
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from maxtext import config, topology
from maxtext.bucket import is_url
from maxtext.config import Config, check_devices
from maxtext.config.checks import idle
from maxtext.config.complaints import COMMAND_LINE as TYPED
from maxtext.config.complaints import Complaint, lines
from maxtext.config.documents import PACKAGED
from maxtext.config.sections import SECTION_OF, hint_of
from maxtext.config.sources import COMMAND_LINE, PRESET
from maxtext.config.values import render, takes_text
from maxtext.errors import ConfigError, ConfigErrors, run_cli
from maxtext.hosts.sections import PLACE
from maxtext.jobs import Job, Launch, Machine, commands, find, jobset, local, overlay
from maxtext.jobs.job import AGAIN
from maxtext.jobs.sections import BUCKET, LABEL, SECRET

USAGE = """\
usage: python -m maxtext.launch [CONFIG.yml] launch_target=TARGET [key=value ...] [--submit]

Checks the configuration for the machine, and starts the run there:
  local    processes=2 on this machine, which train as one
  docker   launch_image on this machine, with launch_volume (a folder) at launch_mount
  gke      on launch_machine (v5p-128, v6e-256, h100-16 ...; num_slices=2 for several): the manifest
           of a JobSet, and of TensorBoard
  xpk      the same by `xpk workload create`
local starts at once; the others write launch_directory/RUN_NAME/, show what differs from the last
launch, and start with --submit.
Ends with 0: written, started, or trained; 2: configuration; else as what was started."""

CPU = Machine("this machine", "", hosts=1, chips=0, devices=0)
# Which keys are read for which target; what is typed for another one is refused.
EVERYWHERE = {"launch_target", "launch_directory"}
CONTAINER = {
  "launch_image",
  "launch_machine",
  "launch_volume",
  "launch_mount",
  "launch_environment",
  "launch_grace_seconds",
}
SECRETS, CLUSTER = {"launch_secrets"}, {"launch_namespace", "launch_max_restarts"}
GOOGLE = ("launch_cluster", "launch_project", "launch_zone")
READ = {
  "local": {"processes"},
  "docker": CONTAINER | SECRETS,
  "gke": CONTAINER | SECRETS | CLUSTER | {"launch_secret_name", "launch_overlay"},
  "xpk": CONTAINER | CLUSTER | set(GOOGLE),
}
NEEDED = {
  "local": (),
  "docker": ("launch_image", "launch_volume"),
  "gke": ("launch_image", "launch_volume", "launch_machine"),
  "xpk": ("launch_image", "launch_volume", "launch_machine", *GOOGLE),
}
HERE = (  # what is read, by its path
  *("dataset_path", "grain_train_files", "grain_eval_files", "grain_train_mixture_config_path"),
  *("tokenizer_path", "load_parameters_path", "load_full_state_path", "compiled_trainstep_file"),
)
FILES = {"local": "local.sh", "docker": "docker.sh", "gke": "gke.yml", "xpk": "xpk.sh"}


class _Whole(yaml.SafeDumper):
  """Writes what stands twice twice, and no aliases."""

  def ignore_aliases(self, data: Any) -> bool:
    return True


def main(argv: list[str]) -> int:
  """Render, and start what is to be started; returns the exit code. Raises ConfigError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE)
    return 0 if argv else 2
  submit, words = "--submit" in argv, [word for word in argv if word != "--submit"]
  # what this machine says of devices and of other processes does not hold where the run will be
  environ = {key: value for key, value in os.environ.items() if key.startswith("M_")}
  loaded = config.load(words, environ, purpose="launch")
  if found := list(complaints(loaded)):
    raise ConfigErrors(lines(found))
  if loaded.launch.launch_target == "local":
    if submit:
      raise ConfigError("--submit", "launch_target=local starts at once; leave it away")
    return _here(loaded)
  return _elsewhere(_job(loaded), submit)


def complaints(loaded: Config) -> Iterator[Complaint]:
  """What the target needs and has not, what it does not read, what a container would lose."""
  launch, target = loaded.launch, loaded.launch.launch_target
  for key, section in SECTION_OF.items():
    unread = section == "launch" and key not in EVERYWHERE | READ[target]
    if unread and loaded.sources[key].level == COMMAND_LINE:
      yield _at(loaded, key, f"has no effect with launch_target={target}; leave it away")
    elif key in PLACE and loaded.differs(key):
      yield _at(loaded, key, "is given to each process as it is started; leave it away")
  for key in NEEDED[target]:
    if not loaded.values[key]:
      yield _at(loaded, key, f"launch_target={target} needs it; set it")
  if target == "local":
    return
  yield from _lost(loaded)
  if problem := _unfit(target, launch.launch_volume):
    yield _at(loaded, "launch_volume", problem)


def _unfit(target: str, volume: str) -> str:
  """Why the target cannot mount the volume; empty if it can, or there is none."""
  if "://" in volume:
    if target != "gke":
      return "buckets are mounted on GKE only; name what is there"
    good = re.fullmatch(BUCKET, volume)
    return "" if good else f"{volume!r} is not of the form gs://BUCKET"
  claim = re.fullmatch(rf"{LABEL}(\.{LABEL})*", volume)
  if target == "gke" and volume and not claim:
    return f"{volume[:70]!r} is no PersistentVolumeClaim; names are of a-z, 0-9, - and ."
  if target == "docker" and volume and not os.path.isabs(volume):
    absolute = os.path.abspath(os.path.expanduser(volume))
    return f"{volume!r} is no absolute path, which docker demands; use {absolute}"
  if target == "docker" and volume and not os.path.isdir(volume):
    return f"{volume!r} is no folder of this machine; make it, or name another"
  return ""


def _lost(loaded: Config) -> Iterator[Complaint]:
  """What a container would lose when it ends, or has not when it begins."""
  mount = loaded.launch.launch_mount
  inside = lambda path: f"{posixpath.normpath(path)}/".startswith(f"{mount}/")
  base, block = loaded.run.base_output_directory, loaded.architecture.decoder_block
  if not inside(base):
    why = "is mounted in a pod" if is_url(base) else "is lost with the container"
    problem = f"{base!r} {why}; name a folder in {mount}"
    yield _at(loaded, "base_output_directory", f"{problem}, where launch_volume is")
  if os.path.isabs(block):
    problem = f"{block} is a file of this machine; put it into configs/decoder_blocks of the image"
    yield _at(loaded, "decoder_block", f"{problem}, or write its blocks as the key blocks")
  for key in HERE:
    for path in filter(None, map(str.strip, loaded.values[key].split(";"))):
      there = os.path.isabs(path) and not os.path.exists(posixpath.normpath(path))
      here = "://" not in path and not there
      if here and not inside(path) and key not in idle(loaded):
        problem = f"{path!r} is of this machine; put it on launch_volume"
        yield _at(loaded, key, f"{problem}, and name it as {mount}/...")


def _at(loaded: Config, key: str, problem: str) -> Complaint:
  source = loaded.sources[key]
  return Complaint(source.where if source.level else TYPED, key, problem)


def _here(loaded: Config) -> int:
  """Train in processes of this machine; returns the exit code."""
  count, hardware = loaded.launch.processes, loaded.run.hardware
  if count > 1 and hardware not in ("auto", "cpu"):
    problem = f"{count} of them on one machine share its CPU; set hardware=cpu, or leave it away"
    raise ConfigError("processes", problem)
  words = words_of(loaded, {"hardware": "cpu"} if count > 1 else {})
  own = local.environments(count)
  config.load(words, {**os.environ, **own[0]})  # whether devices, files and folders are there
  path = _file(loaded.launch, loaded.run.run_name)
  text = "".join(commands.script(["python", "-m", "train", *words], each) for each in own)
  text = re.sub(r"(?<=127\.0\.0\.1:)\d+", "PORT", text)  # which is another each time
  _write(path, text).write_text(text)
  return local.run([sys.executable, "-m", "train", *words], own)


def _job(loaded: Config) -> Job:
  """The run as it is to be started, once it is known to fit the machine. Raises ConfigErrors."""
  launch, run = loaded.launch, loaded.run
  machine = find(launch.launch_machine) if launch.launch_machine else CPU
  slices = loaded.mesh.num_slices if machine.topology else 1
  if run.hardware not in ("auto", machine.hardware):
    problem = f"{run.hardware} is not what {machine.name} has; leave it away"
    raise ConfigError("hardware", f"{problem}, or name another launch_machine")
  if machine.hardware == "gpu" and loaded.mesh.num_slices > 1:
    problem = f"{loaded.mesh.num_slices}, but GPUs have no slices; use num_slices=1"
    raise ConfigError("num_slices", f"{problem}, and count all GPUs in launch_machine")
  if launch.launch_target == "docker":
    machine = machine.whole
  if launch.launch_target == "docker" and machine.hosts * slices > 1:
    problem = f"{machine} is more than this host; use launch_target=gke or xpk"
    raise ConfigError("launch_machine", problem)
  if launch.launch_target == "xpk" and not machine.xpk:
    raise ConfigError("launch_machine", f"xpk knows no {machine.name}; use launch_target=gke")
  machine = machine if machine.chips else dataclasses.replace(CPU, devices=run.devices or 1)
  topology.expect(loaded.compile, machine, slices)
  check_devices(loaded, machine.devices * slices)
  forced: dict[str, Any] = {"hardware": machine.hardware, "run_name": run.run_name}
  if launch.launch_target != "docker" and not loaded.sources["exit_code_when_stopped"].level:
    forced["exit_code_when_stopped"] = AGAIN
  folder = f"{run.base_output_directory}/{run.run_name}"
  return Job(run.run_name, folder, words_of(loaded, forced), launch, machine, slices)


def words_of(loaded: Config, forced: Mapping[str, Any]) -> tuple[str, ...]:
  """The configuration as `train` is given it on its command line: what was set, without presets,
  which are everywhere, and without what has no effect; held to mean there what it means here.
  """
  left = idle(loaded) | {key for key, section in SECTION_OF.items() if section == "launch"}
  values: dict[str, Any] = {}
  for key, source in loaded.sources.items():
    if source.level > PRESET and key not in left:
      values[key] = loaded.values[key]
  values |= {"run_name": loaded.run.run_name, **forced}
  words = tuple(f"{k}={v if takes_text(hint_of(k)) else render(v)}" for k, v in values.items())
  again = config.load(words, {}, purpose="launch").values
  for key, value in {**loaded.values, **forced}.items():
    if again[key] != value and key not in left:
      problem = f"{render(value)} cannot be passed on by a command line; write it otherwise"
      raise ConfigError(key, problem)
  return words


def _elsewhere(job: Job, submit: bool) -> int:
  """Write what starts the job, and start it if that is wanted; returns the exit code."""
  launch = job.launch
  path = _file(launch, job.run_name)
  unset = [name for name in launch.launch_secrets if name not in os.environ]
  if submit and unset and launch.launch_target == "docker":
    problem = f"{unset[0]} is not set here, from where docker takes it; export it"
    raise ConfigError("launch_secrets", f"{problem}, or leave it away")
  if launch.launch_target == "gke":
    text = _text(_manifest(job))
    command = ["kubectl", "apply", f"--filename={path}"]
  else:
    command = {"docker": commands.docker, "xpk": commands.xpk}[launch.launch_target](job)
    text = commands.script(command)
  if found := SECRET.search(text):
    holder = next((word.split("=")[0] for word in job.words if found[0] in word), "launch_overlay")
    problem = f"{found[0][:4]}... looks like a secret, which is written nowhere; name its variable"
    raise ConfigError(holder, f"{problem} in launch_secrets")
  print(f"{job.run_name} on {job.machine}" + (f", {job.slices} slices" if job.slices > 1 else ""))
  last = _write(path, text)
  if launch.launch_target == "xpk":  # which makes no TensorBoard
    path.with_name("tensorboard.yml").write_text(_text(jobset.tensorboard(job)))
  if submit:
    if shutil.which(command[0]) is None:
      raise ConfigError("--submit", f"{command[0]} is not there; install it, or start {path} there")
    if code := subprocess.run(command).returncode:
      print(f"not started: {command[0]} ended with {code}")
      return code
    last.write_text(text)
  else:
    print(f"start:       {shlex.join(command) if path.suffix == '.yml' else f'bash {path}'}")
  for what, way in commands.afterwards(job, path):
    print(f"{what + ':':<12} {way}")
  return 0


def _text(documents: Iterable[Mapping[str, Any]]) -> str:
  return "---\n".join(yaml.dump(d, Dumper=_Whole, sort_keys=False, width=100) for d in documents)


def _manifest(job: Job) -> list[dict[str, Any]]:
  """The documents that are applied, with launch_overlay on top. Raises ConfigErrors for what
  Kubernetes would not take.
  """
  made, name = list(jobset.documents(job)), job.launch.launch_overlay
  own = overlay.read(name, [d["kind"] for d in made]) if name else []
  known = yaml.safe_load((PACKAGED / "launch" / "manifest.yml").read_text())
  return overlay.lay(made, own, known)


def _file(launch: Launch, run_name: str) -> Path:
  return Path(launch.launch_directory).expanduser() / run_name / FILES[launch.launch_target]


def _write(path: Path, text: str) -> Path:
  """Write what starts a run, and print what of it the last launch had otherwise; returns where the
  next one is to find it.
  """
  last = path.with_name(f"launched-{path.name}")
  try:
    before = last.read_text() if last.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except OSError as error:
    problem = f"{path} cannot be written ({error.strerror}); name a folder that can"
    raise ConfigError("launch_directory", problem) from None
  said = "not launched before"
  if before is not None:
    lines_ = difflib.unified_diff(
      before.splitlines(), text.splitlines(), "last launch", "this", n=1
    )
    said = "\n".join(["the last launch differs:", *lines_]) if before != text else "as last time"
  print(f"written:     {path}; {said}", flush=True)
  return last


if __name__ == "__main__":
  run_cli(main)
