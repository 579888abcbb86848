"""What scripts/environment.sh does with the Python, the disk and the environment that it finds, and
what models by hand are worth.

The scripts run in a copy of the project, with a PATH that has the system's tools and a Python that
only says its version and notes what it is asked to do.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("awk", "bash", "cat", "cmp", "cp", "df", "dirname", "flock", "mkdir")
PYTHON = """#!/bin/bash
echo "$*" >>"$NOTES"
case "$1 $2" in
  "-c import sys"*) echo "$SAYS" ;;
  "-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
esac
"""


class Machine:
  """A fresh checkout on a machine with one Python."""

  def __init__(self, place: Path):
    self.checkout, self.bin, self.notes = place / "a checkout", place / "bin", place / "notes"
    shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
      shutil.copy(ROOT / name, self.checkout)
    self.bin.mkdir()
    for tool in TOOLS:
      if found := shutil.which(tool):
        (self.bin / tool).symlink_to(found)
    self.put("python3", PYTHON)

  def put(self, name: str, text: str) -> None:
    (self.bin / name).unlink(missing_ok=True)
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(0o755)

  def run(self, *arguments: str, version: str = "3.11", **environment: str) -> tuple[int, str]:
    """./scripts/test.sh from another directory: its exit code, and what it says on stderr."""
    self.notes.write_text("")
    done = subprocess.run(
      [str(self.checkout / "scripts/test.sh"), *arguments],
      cwd="/",
      env={"PATH": str(self.bin), "HOME": os.sep, "NOTES": str(self.notes), "SAYS": version}
      | environment,
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stderr

  def installs(self) -> list[str]:
    return [
      line for line in self.notes.read_text().splitlines() if line.startswith("-m pip install")
    ]

  def last(self) -> str:
    return self.notes.read_text().splitlines()[-1]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def test_arguments_reach_pytest(machine):
  assert machine.run("-k", "some thing") == (0, "")
  assert machine.last() == "-m pytest -k some thing"


def test_the_installation_is_editable_and_pinned(machine):
  machine.run()
  (install,) = machine.installs()
  assert f"--constraint {machine.checkout}/constraints.txt" in install
  assert install.endswith(f"--editable {machine.checkout}[test]")


def test_a_second_call_installs_nothing(machine):
  machine.run()
  assert machine.run() == (0, "")
  assert machine.installs() == []


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_other_requirements_are_installed(machine, file):
  machine.run()
  with (machine.checkout / file).open("a") as text:
    text.write("# changed\n")
  machine.run()
  assert len(machine.installs()) == 1


def test_an_installation_that_failed_is_tried_again(machine):
  machine.put("python3", PYTHON.replace("esac", '  "-m pip") [[ $3 != install ]] ;;\nesac'))
  code, says = machine.run()
  assert code == 1 and says.startswith("test.sh: the installation failed, see above")
  machine.put("python3", PYTHON)
  shutil.copy(machine.bin / "python3", machine.checkout / ".venv/bin/python")
  assert machine.run() == (0, "")
  assert len(machine.installs()) == 1


def test_a_checkout_that_moved_gets_a_new_environment(machine):
  machine.run()
  machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
  machine.run()
  assert f"-m venv --clear {machine.checkout}/.venv" in machine.notes.read_text()


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_an_old_python_is_refused_in_one_line(machine, version):
  code, says = machine.run(version=version)
  assert code == 1 and says.count("\n") == 1
  assert "needs Python 3.11 or newer" in says


def test_a_named_python_is_obeyed_or_refused(machine):
  code, says = machine.run(PYTHON="python3.11")
  assert code == 1 and says.count("\n") == 1 and "PYTHON=python3.11 does not run" in says
  machine.put("python3.11", PYTHON)
  machine.put("python3", "#!/bin/bash\nexit 1\n")
  assert machine.run(PYTHON="python3.11") == (0, "")


def test_another_version_replaces_the_environment(machine):
  machine.run()
  machine.put("python3.12", PYTHON.replace('"$SAYS"', "3.12"))
  machine.run(PYTHON="python3.12")
  assert f"-m venv --clear {machine.checkout}/.venv" in machine.notes.read_text()


def test_a_full_disk_is_said_in_one_line(machine):
  machine.put("df", "#!/bin/bash\necho head\necho tmpfs 100000 90000 10240 90% /\n")
  code, says = machine.run()
  assert code == 1 and says.count("\n") == 1
  assert f"{machine.checkout} has 10 MB free" in says


def test_uv_is_used_where_it_is(machine):
  machine.put(
    "uv", PYTHON.replace('"-m venv")', '"venv --quiet")').replace('cp "$0"', 'cp "${0%uv}python3"')
  )
  assert machine.run() == (0, "")
  assert "pip install --quiet --python" in machine.notes.read_text()
  assert machine.installs() == []


def test_pip_is_used_where_only_its_index_is_named(machine):
  machine.put("uv", "#!/bin/bash\nexit 1\n")
  assert machine.run(PIP_INDEX_URL="file:///index") == (0, "")
  assert len(machine.installs()) == 1


@pytest.mark.parametrize(
  "name, still",  # choices are moved by loads, and the attention put in here has no sinks
  [
    ("llama2-70b", []),
    ("mixtral-8x7b", []),
    ("qwen3-30b-a3b", []),
    ("gpt-oss-20b", ["sinks"]),
    ("gemma3-12b", []),
    ("deepseek3-671b", ["router_bias"]),
  ],
)
def test_a_model_by_hand_learns_by_all_its_weights(monkeypatch, name, still):
  monkeypatch.syspath_prepend(str(ROOT / "scripts"))
  plain = importlib.import_module("plain_models")

  def attend(mesh, window, q, k, v, *_):
    wide = jax.numpy.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])])  # as latent keys are
    return jax.nn.dot_product_attention(q, k, wide, is_causal=True)[..., : v.shape[-1]]

  monkeypatch.setattr(plain, "attend", attend)
  monkeypatch.setattr(plain, "gmm", lambda x, w, sizes, *_, **__: jax.lax.ragged_dot(x, w, sizes))
  model = plain.MODELS[name]
  few = lambda s: {"experts": 8, "active": 2} if s.experts else {}
  stages = [
    dataclasses.replace(s, repeat=1, hidden=32, windows=(8,), **few(s)) for s in model.stages
  ]
  small = {"latent": plain.Latent(16, 16, 8), "groups": 4} if model.latent else {"kv_heads": 1}
  small |= {"width": 32, "heads": 2, "head_dim": 16, "vocab": 64, "stages": tuple(stages)}
  model = dataclasses.replace(model, **small)
  params = plain.init(jax.random.key(0), model)
  tokens = jax.random.randint(jax.random.key(1), (1, 33), 0, model.vocab)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (plain.AXIS,))
  assert jax.tree.structure(plain.places(mesh, model)) == jax.tree.structure(params)
  loss = lambda params: plain.loss(mesh, model, ("gate",), params, tokens[:, :-1], tokens[:, 1:])
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, np.log(model.vocab), rtol=0.1)  # its weights are still small
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  assert [path[-1].key for path, leaf in leaves if not abs(leaf).max() > 0] == still
