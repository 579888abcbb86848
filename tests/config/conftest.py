"""Configurations in a folder of their own, with nothing of the machine's environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from maxtext.config import Config, load
from maxtext.errors import ConfigErrors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The working directory, empty."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def loaded(folder: Path) -> Callable[..., Config]:
  """loaded("a.yml", "steps=1", files={"a.yml": ...}, environ={...}) -> Config."""

  def run(
    *argv: str,
    files: Mapping[str, str | bytes] = {},
    environ: Mapping[str, str] = {},
    **kwargs: str,
  ) -> Config:  # noqa: B006
    for name, text in files.items():
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(argv, environ, **kwargs)

  return run


@pytest.fixture
def refused(loaded: Callable[..., Config]) -> Callable[..., list[str]]:
  """The same, for a configuration that is wrong -> the lines of its complaint."""

  def run(*argv: str, **kwargs: Mapping[str, str]) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
      loaded(*argv, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")

  return run
