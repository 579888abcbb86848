"""The manifest of a run on GKE: a JobSet that trains, and TensorBoard, which reads its folder.

JobSet v1alpha2 (jobset.sigs.k8s.io), and GKE's labels for TPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maxtext.jobs.job import GOOD_FOR_NOTHING, Job, place

Tree = dict[str, Any]
SLICE, TRAIN, VOLUME, USER = "slice", "train", "runs", 1000
PORT = 6006  # TensorBoard's
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
XPK_ACCOUNT = "xpk-sa"  # which xpk lets read its storages
KEPT = 7 * 24 * 3600  # seconds for which what has ended can be looked at


def documents(job: Job) -> list[Tree]:
  """What `kubectl apply` is given."""
  return [_jobset(job), *tensorboard(job)]


def _jobset(job: Job) -> Tree:
  machine, multiple = job.machine, job.machine.hosts > 1 or job.slices > 1
  about = _about(job, job.name)
  if machine.topology and multiple:  # a slice is all of a node pool
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    about["annotations"] = {key: "cloud.google.com/gke-nodepool"}
  for_good = {
    "name": "failedForGood",
    "action": "FailJobSet",
    "onJobFailureReasons": ["PodFailurePolicy"],
  }
  work = {
    "parallelism": machine.hosts,
    "completions": machine.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,  # where one host fails all of them start again, by the JobSet
    "podFailurePolicy": {"rules": list(_failures())},
    "template": {"metadata": _marks(job), "spec": _pod(job)},
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": about,
    "spec": {
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "failurePolicy": {"maxRestarts": job.launch.launch_max_restarts, "rules": [for_good]},
      "ttlSecondsAfterFinished": KEPT,
      "replicatedJobs": [
        {"name": SLICE, "replicas": job.slices, "template": {"spec": work}},
      ],
    },
  }


def _failures() -> Iterator[Tree]:
  """What ends in the same way again is not tried; a host that is taken away is no failure."""
  codes = {"containerName": TRAIN, "operator": "In", "values": list(GOOD_FOR_NOTHING)}
  yield {"action": "FailJob", "onExitCodes": codes}
  yield {
    "action": "Ignore",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
  }


def _pod(job: Job) -> Tree:
  machine = job.machine
  tpu = bool(machine.topology)
  resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
  container = {
    "name": TRAIN,
    "image": job.launch.launch_image,
    "command": [word.replace("$", "$$") for word in job.command],  # which Kubernetes takes back
    "env": list(_environment(job)),
    "resources": {"limits": {resource: machine.chips}},
    "volumeMounts": [_mount(job), {"name": "shm", "mountPath": "/dev/shm"}],
  }
  pod: Tree = {"restartPolicy": "Never"}
  if tpu:  # its devices are root's, and slices talk to each other by the hosts' own network
    container["securityContext"] = {"privileged": True, "runAsUser": 0}
    pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    nodes = {
      "cloud.google.com/gke-tpu-accelerator": machine.label,
      "cloud.google.com/gke-tpu-topology": machine.topology,
    }
  else:
    pod["securityContext"] = _unprivileged()
    nodes = {"cloud.google.com/gke-accelerator": machine.label}
  return pod | {
    "terminationGracePeriodSeconds": job.launch.launch_grace_seconds,
    "nodeSelector": nodes,
    "tolerations": [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}],
    "containers": [container],
    "volumes": [_volume(job, network=tpu), {"name": "shm", "emptyDir": {"medium": "Memory"}}],
  }


def _environment(job: Job) -> Iterator[Tree]:
  """The variables of a pod. On TPUs GKE adds those that hosts.find reads there."""
  values: Tree = {}
  if not job.machine.topology:
    values["LD_LIBRARY_PATH"] = "/usr/local/nvidia/lib64"  # where GKE puts the driver
    if job.machine.hosts > 1:
      first = f"{job.name}-{SLICE}-0-0.{job.name}"
      number = {"fieldRef": {"fieldPath": INDEX}}
      values |= place(first, job.machine.hosts, number)
  values |= job.launch.environment
  for key in job.launch.launch_secrets:
    values[key] = {"secretKeyRef": {"name": job.launch.launch_secret_name, "key": key}}
  for key, value in values.items():
    yield {"name": key, ("value" if isinstance(value, str) else "valueFrom"): value}


def tensorboard(job: Job) -> Iterator[Tree]:
  """Deployment and Service `<name>-tensorboard`."""
  name, labels = f"{job.name}-tensorboard", {"app": f"{job.name}-tensorboard"}
  container = {
    "name": "tensorboard",
    "image": job.launch.launch_image,
    "command": ["tensorboard", f"--logdir={job.folder}", "--bind_all", f"--port={PORT}"],
    "ports": [{"containerPort": PORT, "protocol": "TCP"}],
    "readinessProbe": {"httpGet": {"path": "/", "port": PORT}},
    "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
    "volumeMounts": [_mount(job) | {"readOnly": True}],
  }
  pod = {
    "securityContext": _unprivileged(),
    "containers": [container],
    "volumes": [_volume(job, network=False)],
  }
  if job.launch.launch_target == "xpk":
    pod["serviceAccountName"] = XPK_ACCOUNT
  marks = _marks(job)
  marks["labels"] = labels
  yield {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": _about(job, name),
    "spec": {
      "replicas": 1,
      "selector": {"matchLabels": labels},
      "template": {"metadata": marks, "spec": pod},
    },
  }
  yield {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": _about(job, name),
    "spec": {"selector": labels, "ports": [{"port": PORT, "targetPort": PORT, "protocol": "TCP"}]},
  }


def _about(job: Job, name: str) -> Tree:
  labels = {"app.kubernetes.io/name": "maxtext", "app.kubernetes.io/instance": job.name}
  return {"name": name, "namespace": job.launch.launch_namespace, "labels": labels}


def _marks(job: Job) -> Tree:
  """What a pod carries: whether Cloud Storage FUSE has something to mount in it."""
  labels: Tree = {"labels": {"app.kubernetes.io/instance": job.name}}
  fuse = job.bucket or job.launch.launch_target == "xpk"  # whose storages may be buckets
  return labels | ({"annotations": {"gke-gcsfuse/volumes": "true"}} if fuse else {})


def _unprivileged() -> Tree:
  return {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}


def _mount(job: Job) -> Tree:
  return {"name": VOLUME, "mountPath": job.launch.launch_mount}


def _volume(job: Job, network: bool) -> Tree:
  """What all hosts share; `network`: the pod is on the host's own."""
  if not job.bucket:
    own = "-pvc" if job.launch.launch_target == "xpk" else ""  # as xpk calls a storage's claim
    claim = {"claimName": f"{job.launch.launch_volume}{own}"}
    return {"name": VOLUME, "persistentVolumeClaim": claim}
  options = f"implicit-dirs,rename-dir-limit=1000000,uid={USER},gid={USER}"
  attributes = {"bucketName": job.bucket, "mountOptions": options}
  if network:
    attributes["hostNetworkPodKSA"] = "true"
  return {
    "name": VOLUME,
    "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes},
  }
