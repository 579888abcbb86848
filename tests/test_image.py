"""The Dockerfile, by what can be seen of it without docker; end_to_end/image.py does more."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from end_to_end.image import ROOT, context, passes

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_image_has_all_of_the_wheel_and_little_else_of_the_checkout():
  wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
  own = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
  assert {file for file in context() if not file.startswith((*wheel, "scripts/"))} == own
  assert all(any(file.startswith(part) for file in context()) for part in wheel)


@pytest.mark.parametrize(
  "file", [".env", ".git/config", "runs/a/config.yml", "key.json", "x/.env", "scripts/.env"]
)
def test_what_may_be_secret_does_not_get_into_the_image(file):
  assert not passes(file, (ROOT / ".dockerignore").read_text().splitlines())


def test_every_device_is_an_extra_of_the_project_and_of_the_script():
  (named,) = re.findall(r"^# .*device=([a-z|]+) ", DOCKERFILE, re.MULTILINE)
  devices = set(named.split("|"))
  assert devices - {"cpu"} <= set(PROJECT["project"]["optional-dependencies"])
  assert all(re.search(rf"\b{device}\b.*\) extras=", DOCKERFILE) for device in devices)
  assert f"^({named})$" in (ROOT / "scripts" / "image.sh").read_text()


def test_whoever_runs_the_image_is_no_root_and_has_the_versions_of_the_tests():
  last = DOCKERFILE.split("FROM ")[-1]
  (user,) = re.findall(r"^USER (\d+)", last, re.MULTILINE)
  assert int(user) > 0
  installs = re.findall(r"pip .* install .*", DOCKERFILE)
  assert installs and all("--constraint constraints.txt" in i or "--no-deps" in i for i in installs)


def image(place: Path, *arguments: str) -> tuple[int, str, str]:
  """scripts/image.sh with a docker that only notes what it is asked: exit code, stderr, notes."""
  (place / "docker").write_text(f'#!/bin/sh\necho "$@" >>{place}/asked\n')
  (place / "docker").chmod(0o755)
  environment = os.environ | {"PATH": f"{place}:{os.environ['PATH']}"}
  command = [str(ROOT / "scripts" / "image.sh"), *arguments]
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  asked = place / "asked"
  return done.returncode, done.stderr, asked.read_text() if asked.exists() else ""


def test_the_script_builds_for_a_device_and_sends_only_if_asked(tmp_path):
  code, _, asked = image(tmp_path, "tpu", "r/m:1")
  assert (code, asked) == (0, f"build --build-arg device=tpu --tag r/m:1 {ROOT}\n")
  _, _, asked = image(tmp_path, "cpu", "r/m:2", "--push", "--quiet")
  assert asked.splitlines()[1:] == [
    f"build --build-arg device=cpu --tag r/m:2 --quiet {ROOT}",
    "push r/m:2",
  ]


@pytest.mark.parametrize("arguments", [(), ("gpu", "m"), ("tpu",)])
def test_the_script_says_how_it_is_called(tmp_path, arguments):
  code, said, asked = image(tmp_path, *arguments)
  assert code == 1 and "usage:" in said and not asked
