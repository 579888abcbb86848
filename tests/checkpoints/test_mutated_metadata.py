"""Mutated checkpoints, and what a run writes beside them: used as they were, or named in a line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from maxtext import replay
from maxtext.checkpoints.folder import Folder
from maxtext.checkpoints.lookup import locate_with_extra
from maxtext.errors import CheckpointError, ConfigError
from maxtext.training.incidents import RECORD, Incidents
from tests.mutation import mutated

COUNTS = [30, pytest.param(3000, marks=pytest.mark.slow)]
BATCH = {"number": 9, "sha256": "0" * 64, "checkpoint": 3, "passed": 2, "count": 1}
INCIDENT = {
  "step": 7,
  "loss": "NaN",
  "batch": BATCH,
  "recent": {"step": [6, 7], "loss": [2.5, "NaN"], "raw_grad_norm": [1.0, "NaN"]},
}


@pytest.mark.parametrize("count", COUNTS)
def test_the_step_before_a_mutated_one_is_used_and_the_damage_is_named(
  open_checkpoints, states, extra, tmp_path, count, caplog
):
  checkpoints = open_checkpoints()
  for step in (10, 20):
    checkpoints.save(step, states.of(step, states.mesh(1, 1)), extra)
  checkpoints.close()
  files = sorted(path for path in (checkpoints.directory / "20").rglob("*") if path.is_file())
  small = [path for path in files if path.stat().st_size < 4000]
  for seed in range(count):
    random = np.random.default_rng(seed)
    path = random.choice(small if seed % 4 else files)
    before, after = path.read_bytes(), mutated(path.read_bytes(), random)
    path.write_bytes(after)
    caplog.clear()
    step, _, found = locate_with_extra(checkpoints.directory)
    assert step.name == ("20" if after == before else "10"), f"{path}, seed {seed}"
    assert found == extra
    lines = [record.getMessage() for record in caplog.records]
    assert after == before or (len(lines) == 1 and f"{checkpoints.directory}/20 " in lines[0])
    path.write_bytes(before)


def test_a_manifest_of_brackets_without_end_is_damage(tmp_path):
  (tmp_path / "20").mkdir()
  (tmp_path / "20" / "manifest.json").write_bytes(b"[" * 100_000)
  assert Folder(tmp_path).newest() is None


@pytest.mark.parametrize("count", COUNTS)
def test_a_mutated_record_or_incident_is_read_as_what_it_says_or_named(tmp_path, count):
  incidents = Incidents(tmp_path, None, None, {}, {}, None, "facts")
  record, path = tmp_path / RECORD, tmp_path / "incident.json"
  for seed in range(count):
    random = np.random.default_rng(seed)
    record.write_bytes(mutated(b'{"checkpoint": 3, "passed": 2, "count": 1}', random))
    path.write_bytes(mutated(json.dumps(INCIDENT).encode(), random))
    try:
      past = incidents._read()
      assert [type(number) for number in dataclasses.astuple(past)] == [int] * 3
    except CheckpointError as error:
      assert str(record) in str(error)
    try:
      found = replay._read(path)
      assert found["batch"]["number"] == found["step"] + found["batch"]["passed"]
    except ConfigError as error:
      assert str(path) in str(error)
