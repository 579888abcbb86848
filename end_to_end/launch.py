"""`maxtext.launch` starts two processes here, which train as one with the losses of one process.

SIGTERM to the launch stops and saves both, and the same launch goes on; a complaint of the
configuration ends it with 2. Where xpk is installed, what it renders in a dry run is compared with
our manifest: labels, topology, hosts and chips.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import yaml

from end_to_end.hosts import same
from end_to_end.runs import CONFIG, OURS, Process, Run, check, module, report

KEYS = ("steps=24", "checkpoint_period=4", "dropout_rate=0", "learning_rate=1.0e-3")
PROMPT = "two\nlines of $HOME, $$ and 'quotes', \"double\" ones \\n"
MACHINES = (
  *("v4-8", "v4-32", "v5e-8", "v5e-16", "v5e-256", "v5p-8", "v5p-128", "v5p-384", "v5p-1024"),
  *("v6e-1", "v6e-4", "v6e-256", "tpu7x-128", "h100-8", "h100-16", "h100-mega-16", "h200-8"),
)


def launched(run: Run, *keys: str) -> Process:
  """The run, launched as two processes."""
  where = (
    f"run_name={run.name}",
    f"base_output_directory={run.parent}",
    f"launch_directory={run.parent / 'launches'}",
  )
  target = ("launch_target=local", "processes=2", "jax_cache_dir=''")
  return module("maxtext.launch", CONFIG, *target, *where, *run.keys, *keys)


def trains_and_goes_on(parent: Path) -> None:
  one, two = Run(parent, "one", KEYS), Run(parent, "two", KEYS)
  one.train("per_device_batch_size=16")
  process = launched(two)
  process.until(lambda: any("completed step: 5," in line for line in process.lines))
  process.send(signal.SIGTERM)
  output = process.ends(0)
  check("stopped by SIGTERM" in output, f"no word of it:\n{process.tail()}")
  output = launched(two).ends(0)
  check("resuming" in output and "finished 24 steps" in output, output)
  check("as last time" in output, f"the launch is not the one before:\n{output}")
  same(one, two)


def ends_with_the_complaint(parent: Path) -> None:
  run = Run(parent, "wrong", KEYS)
  output = launched(run, "learning_rat=1").ends(2)
  check("did you mean 'learning_rate'" in output, output)
  check(not run.folder.exists(), f"{run.folder} was made")


def jobs_of(manifest: Path) -> dict:
  (jobs,) = next(yaml.safe_load_all(manifest.read_text()))["spec"]["replicatedJobs"]
  return jobs


def container(manifest: Path) -> dict:
  return jobs_of(manifest)["template"]["spec"]["template"]["spec"]["containers"][0]


def asked(manifest: Path) -> tuple:
  """What a manifest asks the cluster for."""
  jobs, limits = jobs_of(manifest), container(manifest)["resources"]["limits"]
  work = jobs["template"]["spec"]
  selected = work["template"]["spec"]["nodeSelector"] or {}
  nodes = {k: v for k, v in selected.items() if "tpu" in k}
  return jobs["replicas"], work["parallelism"], work["completions"], nodes, limits


def as_xpk(parent: Path) -> None:
  if shutil.which("xpk") is None:
    print("  xpk is not installed: nothing is compared with it")
    return
  own = parent / "ours"
  common = ("launch_image=img:1", "base_output_directory=/data/runs", f"launch_directory={own}")
  place = ("launch_cluster=c", "launch_project=p", "launch_zone=us-central2-b")
  for machine in MACHINES:
    for slices in (1,) if machine.startswith("h") else (1, 2):
      size = (f"launch_machine={machine}", f"num_slices={slices}", "run_name=w")
      for target in (("gke", "launch_volume=v"), ("xpk", "launch_volume=v", *place)):
        keys = (f"launch_target={target[0]}", *target[1:], *common, *size)
        whole = ("ici_data_parallelism=-1", "ici_fsdp_parallelism=1", f"prompt={PROMPT}")
        module("maxtext.launch", *keys, *whole).ends(0)
      # a storage is looked up in the cluster, which a dry run has not
      command = (own / "w" / "xpk.sh").read_text().replace("--storage=v", "--dry-run")
      theirs = parent / "theirs.yml"
      theirs.unlink(missing_ok=True)
      dry = f"{command.rstrip()} --output-manifest-file={theirs}"
      home = OURS | {"HOME": str(parent), "PATH": os.environ["PATH"]}
      done = subprocess.run(["bash", "-c", dry], capture_output=True, text=True, env=home)
      check(theirs.exists(), f"xpk rendered nothing for {machine}:\n{done.stdout[-2000:]}")
      said = container(theirs)["command"][-1].replace("$$", "$")
      (words,) = re.findall(r"^ *\((python -m train .*)\) & ", said, re.MULTILINE)
      heard = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True
      )
      check(f"prompt={PROMPT}" in heard.stdout.split("\0"), f"lost on its way through xpk: {words}")
      ours = asked(own / "w" / "gke.yml")
      check(ours == asked(theirs), f"{machine}: {ours}, and {asked(theirs)} by xpk")
      print(f"  {machine} x {slices}: as xpk: {ours}", flush=True)


def main() -> None:
  with tempfile.TemporaryDirectory() as parent:
    ends_with_the_complaint(Path(parent))
    as_xpk(Path(parent))
    trains_and_goes_on(Path(parent))


if __name__ == "__main__":
  report(main)
