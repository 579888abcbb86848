"""A run meets batches that it cannot train on: it goes on without a person, and exactly."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtext import config, program, replay, trainer
from maxtext.checkpoints.manager import restore_state
from maxtext.data.pipeline import open_corpus, train_batches
from maxtext.errors import Diverged
from maxtext.hosts import Home
from maxtext.objectives.mean import Mean
from maxtext.objectives.next_token import NextToken
from maxtext.training.incidents import Incidents
from maxtext.training.state import tree

STEPS, ROWS, LENGTH = 14, 8, 32
BAD = (7, 9, 12)  # batches whose loss is not a number
OTHERS = ("step-7-batch-7", "step-5-batch-12")
CONFIG = f"""
run_name: r
dataset_type: synthetic
hardware: cpu
base_emb_dim: 16
base_num_query_heads: 2
base_num_kv_heads: 1
base_mlp_dim: 32
base_num_decoder_layers: 2
steps: {STEPS}
per_device_batch_size: {ROWS}
max_target_length: {LENGTH}
checkpoint_period: 3
max_num_checkpoints_to_keep: -1
enable_tensorboard: false
rollback_limit: 3
"""


class Compiled:
  """A step that is traced and compiled once, however many runs ask for it."""

  def __init__(self, step, *shapes):
    self._compiled = step.trace(*shapes).lower().compile()

  def __call__(self, *arguments):
    return self._compiled(*arguments)

  trace = lambda self, *shapes: self
  lower = lambda self: self
  compile = lambda self: self._compiled


class Killed(BaseException):
  """Where a process ends without another word."""


def loaded(folder, **keys):
  path = folder / "config.yml"
  path.write_text(CONFIG)
  words = keys | {"base_output_directory": folder}
  return config.load([str(path), *(f"{key}={value}" for key, value in words.items())], {})


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
  """More batches than a run has steps, as the data has them by itself."""
  data = loaded(tmp_path_factory.mktemp("data")).data
  stream = train_batches(open_corpus(data), data, ROWS, LENGTH)
  yield list(itertools.islice(stream, 2 * STEPS))
  stream.close()


@pytest.fixture(scope="module", autouse=True)
def poison(batches):
  """What spoils the loss of BAD batches, which are told by the sum of their tokens."""
  bad = jnp.array([batches[number]["inputs"].sum() for number in BAD])

  class Poisoned(NextToken):
    def __call__(self, model, batch, key=None):
      sums = super().__call__(model, batch, key)
      factor = jnp.where((batch["inputs"].sum() == bad).any(), jnp.nan, 1.0)
      return sums | {"loss": Mean(sums["loss"].total * factor, sums["loss"].weight)}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program, "NextToken", Poisoned)
    patch.setattr(program, "find_devices", lambda run: jax.devices()[:1])
    yield


@pytest.fixture(scope="module")
def built(poison, tmp_path_factory):
  made = program.build(loaded(tmp_path_factory.mktemp("built")), jax.devices()[:1], 256)
  made.__dict__["step"] = Compiled(made.step, made.state, made.batch(ROWS))
  return made


def train(folder, built, **keys):
  (folder / "r").mkdir(exist_ok=True)
  run = trainer.Run(loaded(folder, **keys), Home(folder / "r"), built, time.monotonic())
  with run.checkpoints:
    return run.train()


def arrays(folder, built):
  return jax.tree.map(np.asarray, restore_state(folder / "r", tree(built.state))[0])


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  assert train(folder, built) == 0
  return folder


def incident(folder, name):
  return json.loads((folder / f"r/incidents/{name}.json").read_text())


def test_a_run_that_goes_back_is_one_without_the_batches_that_it_passed(whole, built, batches):
  """From 6 past batches 6 and 7; from 3, since 6 led to this, past up to 9; from there up to 12."""
  record = json.loads((whole / "r/rollback.json").read_text())
  assert record == {"checkpoint": 3, "passed": 10, "count": 3}
  steps = sorted(int(path.name) for path in (whole / "r/checkpoints").iterdir())
  assert steps == [3, 6, 9, 12, STEPS]
  names = {path.stem for path in (whole / "r/incidents").iterdir()}
  assert names == {"step-7-batch-7", "step-7-batch-9", "step-5-batch-12"}
  state = built.init()
  for batch in batches[:3] + batches[13 : 13 + STEPS - 3]:
    state, metrics = built.step(state, jax.device_put(batch, built.batch(ROWS)["inputs"].sharding))
  assert metrics["ok"] and state.step == STEPS
  equal(tree(state), arrays(whole, built))
  lines = (whole / "r/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))


@pytest.mark.parametrize("counts", [(2,), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def test_a_run_that_is_killed_wherever_it_goes_back_ends_with_the_same_bits(
  whole, built, tmp_path, monkeypatch, counts
):
  """Once the record is there, once later checkpoints are gone, and once the data has moved."""
  dead = set()

  def dies_after(name):
    act = getattr(Incidents, name)

    def mortal(self, *arguments):
      result = act(self, *arguments)
      stage = name, *self._read().__dict__.values()
      if self._read().count in counts and stage not in dead and arguments[:1] != (None,):
        dead.add(stage)
        raise Killed
      return result

    monkeypatch.setattr(Incidents, name, mortal)

  for name in ("_put", "newest", "resume"):
    dies_after(name)
  code = None
  while code is None:
    with contextlib.suppress(Killed):
      code = train(tmp_path, built)
  assert len(dead) >= 3 * len(counts)
  equal(arrays(tmp_path, built), arrays(whole, built))
  assert incident(tmp_path, "step-5-batch-12") == incident(whole, "step-5-batch-12")


def test_a_run_goes_back_as_often_as_it_may(built, tmp_path):
  with pytest.raises(Diverged, match="step 7: loss nan.*step-7-batch-9.json"):
    train(tmp_path, built, rollback_limit=1)
  assert incident(tmp_path, "step-7-batch-9")["verdict"] == "stopped"


@pytest.mark.parametrize(
  "name",
  ["step-7-batch-9", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)],
)
def test_an_incident_is_replayed_bit_by_bit(whole, built, name, monkeypatch):
  monkeypatch.setattr(program, "build", lambda *_: built)
  found = incident(whole, name)
  again = lambda found: replay.replay(loaded(whole), whole / "r", found)
  lines, same = again(found)
  assert same and lines[1].endswith("every step as recorded, bit by bit")
  assert lines[2].split() == ["nan", "embedding"]
  found["recent"]["loss"][-2] += 1e-6
  lines, same = again(found)
  assert not same and lines[1].startswith(f"step {found['step'] - 1}: loss")
