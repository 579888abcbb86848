"""The `launch` section: where `maxtext.launch` starts the run, and with what."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Iterator
from typing import Literal

from maxtext.bounds import Count, Whole
from maxtext.errors import ConfigError
from maxtext.jobs import machines

BUCKET = r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]"
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # a name in Kubernetes
# What the image, Kubernetes and our manifest have in a container
OCCUPIED = ("/bin", "/dev", "/etc", "/lib", "/opt/maxtext", "/proc", "/sys", "/usr", "/var/run")
# OCI's reference: a registry's host, a repository, a tag, a digest
HOST = r"([A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(:\d+)?|[A-Za-z0-9-]+:\d+|localhost)"
PART, TAG = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
IMAGE = rf"({HOST}/)?{PART}(/{PART})*(:{TAG})?(@sha256:[0-9a-f]{{64}})?"
SECRET = re.compile(  # what services call their tokens; each has a form of its own
  r"\bhf_\w{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bsk-[\w-]{20,}"
  r"|\bAKIA[0-9A-Z]{16}|\bAIza[\w-]{30,}|\bya29\.[\w-]{8,}|\bxox[abp]-[\w-]{8,}"
  r"|\beyJ[\w-]{10,}\.[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY"
  r"|\b[a-z][a-z0-9+.-]*://[^\s/:@]*:[^\s/@]+@"  # user:password@ of a URL
)
SECRET_NAME = re.compile(
  r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE)_?KEY)(_|$)", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Launch:
  launch_target: Literal["local", "docker", "gke", "xpk"]
  processes: Count
  launch_machine: str
  launch_image: str
  launch_volume: str
  launch_mount: str
  launch_environment: tuple[str, ...]
  launch_secrets: tuple[str, ...]
  launch_secret_name: str
  launch_namespace: str
  launch_cluster: str
  launch_project: str
  launch_zone: str
  launch_overlay: str
  launch_max_restarts: Whole
  launch_grace_seconds: Count
  launch_directory: str

  def complaints(self) -> Iterator[tuple[str, ...]]:
    if self.launch_machine:
      try:
        machines.find(self.launch_machine)
      except ConfigError as error:
        yield error.where, error.problem
    image = self.launch_image
    if image and not re.fullmatch(IMAGE, image):
      problem = f"{image[:70]!r} is no container image; write HOST/NAME:TAG, the name in lower case"
      yield "launch_image", problem
    yield from self._mount()
    for key in ("launch_secret_name", "launch_namespace"):
      if not re.fullmatch(LABEL, getattr(self, key)):
        problem = f"{getattr(self, key)[:70]!r} is no name in Kubernetes; use a-z, 0-9 and -"
        yield key, problem
    for entry in self.launch_environment:
      name, equals, value = entry.partition("=")
      if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        yield "launch_environment", f"{entry[:20]!r} is not of the form NAME=value"
      elif SECRET_NAME.search(name) or SECRET.search(value):
        problem = f"{name} looks like a secret, which is written nowhere; name it in launch_secrets"
        yield "launch_environment", problem
    for name in self.launch_secrets:
      if not re.fullmatch(r"[A-Za-z_]\w*", name) or SECRET.search(name):
        problem = "names variables, as HF_TOKEN; their values stand in the Kubernetes secret"
        yield "launch_secrets", f"{problem} launch_secret_name"
    if not self.launch_directory:
      yield "launch_directory", "is empty; name a folder, for instance launches"

  def _mount(self) -> Iterator[tuple[str, str]]:
    mount = self.launch_mount
    within = lambda path, folder: f"{path}/".startswith(f"{folder}/")
    taken = [own for own in OCCUPIED if within(own, mount) or within(mount, own)]
    if not re.fullmatch(r"/[\w./-]*\w", mount) or posixpath.normpath(mount) != mount:
      yield "launch_mount", f"{mount!r} is no path in a container; write one as /data"
    elif taken:
      yield "launch_mount", f"{mount!r} collides with {taken[0]} of the container; use one as /data"

  @property
  def environment(self) -> dict[str, str]:
    """Variables with their values."""
    return dict(entry.split("=", 1) for entry in self.launch_environment)
