"""What is put into the environment before jax is imported."""

import os

import pytest

from maxtext import config, hardware
from maxtext.errors import ConfigError


@pytest.fixture
def environ(monkeypatch):
  """The environment after `prepare` of a run with these keys."""
  monkeypatch.setattr(os, "environ", dict(os.environ))
  for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
    os.environ.pop(name, None)

  def prepare(*keys):
    hardware.prepare(config.load(["hardware=cpu", *keys], {}).run)
    return os.environ

  return prepare


def test_compiled_programs_are_kept_where_the_run_says(environ, tmp_path):
  assert environ(f"jax_cache_dir={tmp_path}")["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


def test_programs_of_several_virtual_devices_are_not_kept(environ, tmp_path):
  """A kept one may hang: of a ring over 8 devices every second start did, with jax 0.10.2."""
  found = environ(f"jax_cache_dir={tmp_path}", "devices=8")
  assert "JAX_COMPILATION_CACHE_DIR" not in found
  assert found["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      "--xla_no_such_flag=1",
      "XLA_FLAGS (environment): Unknown flag in XLA_FLAGS: --xla_no_such_flag=1;",
    ),
    (
      "--xla_backend_optimization_level=high",
      "value high for flag xla_backend_optimization_level;",
    ),
    ("no_such_file", 'Could not open file "no_such_file"'),
  ],
)
def test_flags_that_xla_does_not_take_are_refused_in_a_line(environ, monkeypatch, flags, words):
  """XLA itself ends the process for them, with all of its flags or with a signal."""
  monkeypatch.setenv("XLA_FLAGS", flags)
  with pytest.raises(ConfigError) as caught:
    hardware.prepare(config.load(["hardware=cpu"], {}).run)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_flags_that_xla_takes_stay(environ, monkeypatch):
  known = "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=2"
  monkeypatch.setenv("XLA_FLAGS", known)
  hardware.prepare(config.load(["hardware=cpu"], {}).run)
  assert os.environ["XLA_FLAGS"] == known


@pytest.mark.parametrize("hardware_key, kept", [("auto", False), ("cpu", False), ("tpu", True)])
def test_programs_of_several_processes_are_kept_only_where_they_are_not_of_a_cpu(
  environ, tmp_path, hardware_key, kept
):
  run = config.load([f"hardware={hardware_key}", f"jax_cache_dir={tmp_path}"], {}).run
  hardware.prepare(run, several=True)
  assert ("JAX_COMPILATION_CACHE_DIR" in os.environ) is kept
