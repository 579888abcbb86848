"""What an installation has, and that its commands work from any directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
  """The wheel's content, as pip would lay it out."""
  place = tmp_path_factory.mktemp("wheel")
  build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", place]
  subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
  (wheel,) = place.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(place / "site")
  return place / "site"


def run(site: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  """Python with the wheel's content ahead of the checkout, from another directory."""
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=directory,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
  )


def test_a_wheel_has_the_package_its_configs_and_three_aliases(installed):
  top = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
  assert top == {"maxtext", "train", "decode", "train_compile"}
  shipped = {path.relative_to(installed / "maxtext/configs") for path in installed.rglob("*.yml")}
  assert shipped == {path.relative_to(ROOT / "configs") for path in ROOT.rglob("configs/**/*.yml")}


@pytest.mark.parametrize(
  "name", ["train", "decode", "train_compile", "maxtext.train", "maxtext.decode"]
)
def test_a_command_works_from_any_directory(installed, tmp_path, name):
  done = run(installed, tmp_path, "-m", name, "--help")
  assert done.returncode == 0, done.stderr
  assert "usage: python -m" in done.stdout


def test_an_installation_reads_its_own_configs(installed, tmp_path):
  code = "from maxtext.config import documents; print(documents.PACKAGED.resolve())"
  assert run(installed, tmp_path, "-c", code).stdout.strip() == str(installed / "maxtext/configs")
  explained = run(installed, tmp_path, "-m", "maxtext.explain", "learning_rate")
  assert explained.returncode == 0, explained.stderr


def test_every_constraint_is_one_exact_version():
  lines = (ROOT / "constraints.txt").read_text().splitlines()
  pins = [line.partition(";")[0].strip() for line in lines if not line.startswith("#")]
  assert all(pin.count("==") == 1 and "*" not in pin for pin in pins)
  assert not any("://" in line or line.startswith("-") for line in lines)
