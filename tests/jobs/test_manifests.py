"""The manifests of a run on GKE, by the published API and by what their parts are to do."""

from __future__ import annotations

import typing

import pytest
import yaml
from kubeflow_trainer_api import models

from maxtext import hosts
from maxtext.config.documents import PACKAGED
from maxtext.errors import CheckpointError, ConfigError, DataError, Diverged, Restart
from maxtext.jobs import Job, Launch, find, jobset, schema
from maxtext.jobs.job import LONGEST

MODELS = {
  "JobSet": models.JobsetV1alpha2JobSet,
  "PodTemplate": models.IoK8sApiCoreV1PodTemplateSpec,
  "Service": models.IoK8sApiCoreV1Service,
}
KINDS = yaml.safe_load((PACKAGED / "launch" / "manifest.yml").read_text())
SETTINGS = yaml.safe_load((PACKAGED / "base.yml").read_text())["launch"]
# What xpk 1.16 renders for them (a dry run): label, topology, parallelism = completions, chips of
# a host. It knows neither slices of v5e on one host nor several nodes of less than eight GPUs.
SHAPES = {
  "v4-8": ("tpu-v4-podslice", "2x2x1", 1, 4),
  "v4-32": ("tpu-v4-podslice", "2x2x4", 4, 4),
  "v5e-8": ("tpu-v5-lite-podslice", "2x4", 2, 4),
  "v5litepod-16": ("tpu-v5-lite-podslice", "4x4", 4, 4),
  "v5e-256": ("tpu-v5-lite-podslice", "16x16", 64, 4),
  "v5p-8": ("tpu-v5p-slice", "2x2x1", 1, 4),
  "v5p-128": ("tpu-v5p-slice", "4x4x4", 16, 4),
  "v5p-384": ("tpu-v5p-slice", "4x4x12", 48, 4),
  "v5p-1024": ("tpu-v5p-slice", "8x8x8", 128, 4),
  "v6e-1": ("tpu-v6e-slice", "1x1", 1, 1),
  "v6e-4": ("tpu-v6e-slice", "2x2", 1, 4),
  "v6e-256": ("tpu-v6e-slice", "16x16", 64, 4),
  "tpu7x-128": ("tpu7x", "4x4x4", 16, 4),
  "v5e-4": ("tpu-v5-lite-podslice", "2x2", 1, 4),
  "h100-8": ("nvidia-h100-80gb", "", 1, 8),
  "h100-mega-32": ("nvidia-h100-mega-80gb", "", 4, 8),
  "h200-16": ("nvidia-h200-141gb", "", 2, 8),
  "b200-64": ("nvidia-b200", "", 8, 8),
  "a100-2": ("nvidia-a100-80gb", "", 1, 2),
}


def job(machine: str = "v5p-128", slices: int = 1, name: str = "demo", **settings) -> Job:
  given = {"launch_target": "gke", "launch_image": "img:1", "launch_volume": "gs://runs"}
  lists = ("launch_environment", "launch_secrets")
  values = {**SETTINGS, **given, **settings}
  launch = Launch(**{k: tuple(v) if k in lists else v for k, v in values.items()})
  return Job(name, f"/data/{name}", (f"run_name={name}", "steps=3"), launch, find(machine), slices)


def parts(made: Job) -> tuple[dict, dict, dict]:
  """The specifications of the JobSet's one kind of jobs: of a job, of a pod, of its container."""
  (jobs,) = jobset.documents(made)[0]["spec"]["replicatedJobs"]
  work = jobs["template"]["spec"]
  pod = work["template"]["spec"]
  return work, pod, pod["containers"][0]


def published(kind: str, tree: dict) -> dict:
  """The tree as the published API keeps it: what it does not know is gone. Raises ValueError."""
  return MODELS[kind].from_dict(tree).to_dict()


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("machine", SHAPES)
def test_a_manifest_is_one_by_the_published_api_and_by_ours(machine, slices):
  environment = {"launch_environment": ["A=b"], "launch_secrets": ["HF_TOKEN"]}
  for volume in ("gs://runs", "shared-claim"):
    made = jobset.documents(job(machine, slices, launch_volume=volume, **environment))
    run, deployment, service = made
    template = deployment["spec"]["template"]
    assert published("JobSet", run) == run
    assert published("PodTemplate", template) == template
    assert published("Service", service) == service
    for document in made:
      assert not list(schema.problems(document, document["kind"], KINDS))


@pytest.mark.parametrize("machine, expected", SHAPES.items())
def test_a_manifest_asks_for_the_hosts_and_chips_of_the_machine(machine, expected):
  label, topology, hosts_, chips = expected
  work, pod, container = parts(job(machine))
  assert work["parallelism"] == work["completions"] == hosts_
  kind, resource = ("tpu-", "google.com/tpu") if topology else ("", "nvidia.com/gpu")
  nodes = {f"cloud.google.com/gke-{kind}accelerator": label}
  if topology:
    nodes["cloud.google.com/gke-tpu-topology"] = topology
  assert pod["nodeSelector"] == nodes
  assert container["resources"]["limits"] == {resource: chips}
  devices = find(machine).devices
  assert devices == hosts_ * chips * (2 if machine.startswith("tpu7x") else 1)


def seen(made: Job, index: int) -> dict[str, str]:
  """The variables of a pod of the first job, as the cluster fills them in."""
  known = {jobset.INDEX: str(index)}
  return {
    v["name"]: v.get("value") or known[v["valueFrom"]["fieldRef"]["fieldPath"]]
    for v in parts(made)[2]["env"]
  }


def test_processes_with_gpus_find_their_place_in_what_the_manifest_gives_them():
  section = hosts.Hosts("", None, None, 300, 20, False, 0)
  mine = ["LD_LIBRARY_PATH=/own"]
  assert seen(job("h100-32", launch_environment=mine), 1)["LD_LIBRARY_PATH"] == "/own"
  for index in range(4):
    found = hosts.find(seen(job("h100-32"), index), section, "gpu")
    assert found is not None and (found.count, found.id) == (4, index)
    assert found.coordinator == "demo-slice-0-0.demo:8482"
  assert hosts.find(seen(job("h100-8"), 0), section, "gpu") is None


def test_processes_on_slices_find_their_place_in_what_gke_adds_to_the_manifest():
  section = hosts.Hosts("", None, None, 300, 20, False, 0)
  made, found = job("v5p-32", slices=2), []
  for number in range(2):
    names = ",".join(f"{made.name}-slice-{number}-{i}.{made.name}" for i in range(4))
    several = {
      "MEGASCALE_NUM_SLICES": "2",
      "MEGASCALE_SLICE_ID": str(number),
      "MEGASCALE_COORDINATOR_ADDRESS": f"{made.name}-slice-0-0.{made.name}",
    }
    for index in range(parts(made)[0]["parallelism"]):
      added = {"TPU_WORKER_ID": str(index), "TPU_WORKER_HOSTNAMES": names, **several}
      found.append(hosts.find(seen(made, index) | added, section, "tpu"))
  assert [(place.count, place.id) for place in found] == [(8, i) for i in range(8)]
  assert {place.coordinator for place in found} == {"demo-slice-0-0.demo:8482"}


def outcome(made: Job, code: int, disrupted: bool = False) -> str:
  """What becomes of the run when a process ends with `code`: by Kubernetes' rules for pods, of
  which the first that matches counts, and JobSet's for jobs.
  """
  run = jobset.documents(made)[0]["spec"]
  work = parts(made)[0]
  action = "Count"
  for rule in work["podFailurePolicy"]["rules"]:
    codes = rule.get("onExitCodes")
    if (codes and code in codes["values"]) or (disrupted and rule.get("onPodConditions")):
      action = rule["action"]
      break
  if action == "Ignore":
    return "another pod"
  assert action == "FailJob" or work["backoffLimit"] == 0
  reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
  for rule in run["failurePolicy"]["rules"]:
    if reason in rule["onJobFailureReasons"]:
      return rule["action"]
  return "RestartJobSet" if run["failurePolicy"]["maxRestarts"] else "FailJobSet"


@pytest.mark.parametrize("machine", ["v5p-128", "h100-16"])
def test_what_would_end_in_the_same_way_is_not_tried_again_and_what_was_taken_away_is(machine):
  made = job(machine)
  for error in (ConfigError, DataError, CheckpointError, Diverged):
    assert outcome(made, error.exit_code) == "FailJobSet"
    assert outcome(made, error.exit_code, disrupted=True) == "FailJobSet"
  for code in (Restart.exit_code, 1, 134, 137, 143):
    assert outcome(made, code) == "RestartJobSet"
    assert outcome(made, code, disrupted=True) == "another pod"


def test_a_pod_has_the_time_to_save_that_is_asked_for():
  assert parts(job(launch_grace_seconds=900))[1]["terminationGracePeriodSeconds"] == 900


def test_slices_of_several_hosts_have_a_node_pool_each():
  key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  pools = {
    (machine, slices): jobset.documents(job(machine, slices))[0]["metadata"].get("annotations")
    for machine, slices in (("v5p-128", 1), ("v5p-8", 2), ("v5p-8", 1), ("h100-16", 1))
  }
  assert [bool(found and key in found) for found in pools.values()] == [True, True, False, False]


def test_a_secret_is_named_and_its_value_is_nowhere():
  made = job(launch_secrets=["HF_TOKEN"], launch_secret_name="hub")
  (variable,) = parts(made)[2]["env"]
  reference = {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
  assert variable == {"name": "HF_TOKEN", "valueFrom": reference}


def test_tensorboard_reads_the_runs_folder_and_nothing_can_write_there():
  made = job(launch_volume="shared-claim")
  deployment, service = jobset.documents(made)[1:]
  pod = deployment["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert f"--logdir={made.folder}" in container["command"]
  (mount,) = container["volumeMounts"]
  assert mount == {"name": "runs", "mountPath": "/data", "readOnly": True}
  assert pod["volumes"] == [parts(made)[1]["volumes"][0]]
  labels = deployment["spec"]["template"]["metadata"]["labels"]
  assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize("name", ["Demo_1", "demo-1", "demo.1", "a" * 100, "7b", "=", "a" * 41])
def test_a_run_is_a_name_in_kubernetes_that_no_other_run_has(name):
  made = job("v5e-256", slices=100, name=name)
  assert len(made.name) <= LONGEST and made.name[0].isalpha()
  assert len(f"{made.name}-slice-99-63-abcde") <= 63
  for document in jobset.documents(made):
    assert not list(schema.problems(document, document["kind"], KINDS))
  others = [job(name=other).name for other in ("demo_1", "a" * 99, "run-7b", "-")]
  assert made.name not in others


SINGLE = {  # our words for what is not looked into, and what the published API has there
  "switch": (bool,),
  "number": (int,),
  "port": (int, str),
  "label": (str,),
  "text": (str,),
  "mark": (str,),
  "quantity": (str,),
}


def of_type(kind: object, hint: object, name: str) -> None:
  """Assert that a kind of ours is part of a published model's field."""
  arguments = [a for a in typing.get_args(hint) if a is not type(None)]
  if typing.get_origin(hint) in (typing.Union, typing.Annotated):
    of_type(kind, arguments[0], name)
  elif isinstance(kind, list):
    assert typing.get_origin(hint) is list, name
    of_type(kind[0], arguments[0], f"{name}[]")
  elif isinstance(kind, str) and kind.startswith("{"):
    assert typing.get_origin(hint) is dict, name
  elif isinstance(kind, dict) or kind in KINDS:
    fields = KINDS[kind] if isinstance(kind, str) else kind
    known = {field.alias or key: field for key, field in hint.model_fields.items()}
    for field, inner in fields.items():
      assert field.rstrip("!") in known, f"{name}.{field}"
      of_type(inner, known[field.rstrip("!")].annotation, f"{name}.{field}")
    needed = {key for key, field in known.items() if field.is_required()}
    assert needed <= {f.rstrip("!") for f in fields if f.endswith("!")} | {"replicas"}, name
  elif kind != "any" and not hasattr(hint, "model_fields"):
    assert hint in SINGLE.get(kind, (str,)), f"{name}: {kind} is not {hint}"


@pytest.mark.parametrize("kind", MODELS)
def test_every_field_that_we_know_is_one_of_the_published_api(kind):
  of_type(kind, MODELS[kind], kind)
