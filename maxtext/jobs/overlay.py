"""A file of one's own over the manifest, and what Kubernetes would refuse of both together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from maxtext.errors import ConfigError, ConfigErrors, closest
from maxtext.jobs import schema

Tree = dict[str, Any]
KEY = "launch_overlay"
OURS = {"name": "run_name", "namespace": "launch_namespace"}  # which key sets it


def read(name: str, kinds: Sequence[str]) -> list[Tree]:
  """The documents of the file, each over the object of its kind. Raises ConfigError."""
  try:
    own = [d for d in yaml.safe_load_all(Path(name).expanduser().read_text()) if d]
  except (OSError, UnicodeError, yaml.YAMLError) as error:
    what = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    problem = f"{name!r} cannot be read: {what}; name a YAML file, or leave it away"
    raise ConfigError(KEY, problem) from None
  if lost := [d for d in own if not isinstance(d, dict) or d.get("kind") not in kinds]:
    problem = f"{str(lost[0])[:60]} says no kind: of {', '.join(kinds)}; begin it with one"
    raise ConfigError(KEY, problem)
  return own


def lay(made: Sequence[Tree], own: Sequence[Tree], kinds: Mapping[str, Any]) -> list[Tree]:
  """The objects with one's own over them. Raises ConfigErrors for what Kubernetes, by its `kinds`,
  would not take.
  """
  laid = list(made)
  for above in own:
    laid = [schema.over(d, above) if d["kind"] == above["kind"] else d for d in laid]
  found: list[str] = []
  for before, after in zip(made, laid, strict=True):
    kind, new = after["kind"], dict(_new(before, after))
    unfit = [line + _misnamed(line, new) for line in schema.problems(after, kind, kinds)]
    found += [f"{kind} {line}" for line in unfit or _unrelated(before, after)]
  if found:
    raise ConfigErrors(found)
  return laid


def _new(before: Any, after: Any, at: str = "") -> Iterator[tuple[str, str]]:
  """Where lists of named things have one more, and what may be wrong with its name."""
  if isinstance(before, dict) and isinstance(after, dict):
    for key in before.keys() & after.keys():
      yield from _new(before[key], after[key], f"{at}.{key}".lstrip("."))
  elif isinstance(before, list) and isinstance(after, list) and schema.named(before + after):
    known = {item["name"]: item for item in before}
    for i, item in enumerate(after):
      if item["name"] in known:
        yield from _new(known[item["name"]], item, f"{at}[{i}]")
      else:
        meant = closest(item["name"], known) or f"; there are {', '.join(known)}"
        yield f"{at}[{i}]", f"; {item['name'][:40]!r} is new there{meant}"


def _misnamed(line: str, new: Mapping[str, str]) -> str:
  """What to add to a complaint that something is incomplete: that it was to be something else."""
  said = (words for at, words in new.items() if line.startswith((f"{at}.", f"{at}:")))
  return next(said, "") if ": has no " in line else ""


def _unrelated(before: Tree, after: Tree) -> Iterator[str]:
  """What is of its kind by itself, and does not fit the rest."""
  for field, key in OURS.items():
    was, now = before["metadata"][field], after["metadata"].get(field)
    if now != was:
      problem = f"{now!r} is not {was!r}, by which others find it; leave it away"
      yield f"metadata.{field}: {problem}, and set {key}"
  spec = after["spec"]
  if after["kind"] == "Deployment":
    yield from _of_pod(spec["template"]["spec"], "spec.template.spec", ["Always"])
  for i, job in enumerate(spec.get("replicatedJobs", ())):
    at, work = f"spec.replicatedJobs[{i}].template.spec", job["template"]["spec"]
    policies = ["Never"] if "podFailurePolicy" in work else ["Never", "OnFailure"]
    yield from _of_pod(work["template"]["spec"], f"{at}.template.spec", policies)
    for ours in before["spec"]["replicatedJobs"]:
      for field in ("parallelism", "completions") if ours["name"] == job["name"] else ():
        hosts, asked = ours["template"]["spec"][field], work.get(field)
        if asked != hosts:
          problem = f"{asked} is not {hosts}, the hosts of launch_machine; leave it away"
          yield f"{at}.{field}: {problem}, or name another machine"


def _of_pod(pod: Tree, at: str, policies: Sequence[str]) -> Iterator[str]:
  policy = pod.get("restartPolicy", "Always")  # as Kubernetes takes it
  if policy not in policies:
    yield f"{at}.restartPolicy: {policy!r} cannot be here; use {' or '.join(policies)}"
  volumes = [volume["name"] for volume in pod.get("volumes", ())]
  for group in ("containers", "initContainers"):
    for i, container in enumerate(pod.get(group, ())):
      paths: set[str] = set()
      for j, mount in enumerate(container.get("volumeMounts", ())):
        name, path, here = mount["name"], mount["mountPath"], f"{at}.{group}[{i}].volumeMounts[{j}]"
        if name not in volumes:
          meant = closest(name, volumes) or f"; there are {', '.join(volumes)}"
          yield f"{here}.name: {name!r} is no volume of the pod{meant}"
        if path in paths:
          yield f"{here}.mountPath: {path!r} is mounted twice; use another"
        paths.add(path)
