"""Every recipe for hardware is a right configuration that fits by estimate, and was compiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maxtext import config, topology
from maxtext.config import documents
from maxtext.estimate.chips import CHIPS
from maxtext.estimate.layouts import made, model_of

ROOT = Path(__file__).parents[2]

RECIPES = sorted(documents.PACKAGED.glob("hardware/*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_on_the_devices_that_it_names(path):
  loaded = config.load([str(path), "hardware=tpu"], {}, purpose="launch")
  machine = topology.parse(loaded.compile.compile_topology)
  assert path.stem == f"{loaded.run.model_name}-{loaded.compile.compile_topology}"
  mesh = {key: getattr(loaded.mesh, key) for key in vars(loaded.mesh) if key.startswith("ici_")}
  mesh = {key: size for key, size in mesh.items() if size != 1}
  chip = CHIPS[topology.kind_of(machine.name)]
  layout = made(model_of(loaded), mesh, machine.devices, chip)
  assert layout is not None and layout.fits(chip)


def test_the_table_has_a_row_of_each_that_fits():
  rows = re.findall(
    r"^\| \[(.+?)\].*?\| ([\d.]+) of (\d+) GiB \|", (ROOT / "docs/hardware.md").read_text(), re.M
  )
  assert [name for name, *_ in rows] == [path.stem for path in RECIPES]
  assert all(float(peak) < float(chip) for _, peak, chip in rows)
