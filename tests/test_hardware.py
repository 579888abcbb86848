"""What is put into the environment before jax is imported."""

import os

import pytest

from maxtext import config, hardware


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
