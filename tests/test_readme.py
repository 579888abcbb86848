"""The commands on the pages are ones that the programs take; end_to_end/readme.py runs them all."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from end_to_end.readme import PAGES, ROOT, blocks
from maxtext import config
from maxtext.config.sections import SECTION_OF
from maxtext.launch import complaints, words_of

PROGRAMS = {"printf", "source", "tensorboard", "wait", ".venv/bin/ruff", ".venv/bin/mypy"}


def commands() -> list[str]:
  joined = [block.replace("\\\n", " ") for page in PAGES for block in blocks(ROOT / page)]
  return [line.removesuffix(" &") for block in joined for line in block.splitlines()]


def programs_arguments(module: str) -> list[list[str]]:
  split = [shlex.split(command) for command in commands()]
  return [words[3:] for words in split if words[:3] == ["python", "-m", module]]


@pytest.mark.parametrize("arguments", programs_arguments("train"), ids=" ".join)
def test_a_documented_train_command_is_a_right_configuration(arguments, monkeypatch, tmp_path):
  for name in ("configs", "docs", "end_to_end"):
    (tmp_path / name).symlink_to(ROOT / name)
  for argument in arguments:  # files that the command before it has made
    if "=prepared/" in argument:
      made = tmp_path / argument.partition("=")[2].replace("*", "0")
      made.parent.mkdir(exist_ok=True)
      made.touch()
  monkeypatch.chdir(tmp_path)
  config.load(arguments, {})


@pytest.mark.parametrize("arguments", programs_arguments("maxtext.launch"), ids=" ".join)
def test_a_documented_launch_is_a_right_configuration(arguments, monkeypatch):
  monkeypatch.chdir(ROOT)
  loaded = config.load(arguments, {}, purpose="launch")
  assert not list(complaints(loaded)) and words_of(loaded, {})


@pytest.mark.parametrize("arguments", programs_arguments("decode"), ids=" ".join)
def test_a_documented_decode_command_sets_keys_that_exist(arguments):
  assert {argument.partition("=")[0] for argument in arguments[1:]} <= set(SECTION_OF)


@pytest.mark.parametrize("command", commands())
def test_a_documented_program_exists(command):
  program, *arguments = shlex.split(command)
  if program == "python":
    name = arguments[1].removeprefix("maxtext.")
    files = (ROOT / f"maxtext/{name}.py", ROOT / f"maxtext/{name}/__main__.py")
    assert arguments[0] == "-m" and any(path.is_file() for path in files)
  elif program.startswith("./"):
    assert os.access(ROOT / program, os.X_OK)
  else:
    assert program in PROGRAMS


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page):
  targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
  assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


def test_every_end_to_end_script_is_in_the_documentation():
  scripts = {p.name for p in Path(ROOT / "end_to_end").iterdir() if p.suffix in (".py", ".sh")}
  named = set(
    re.findall(r"^\| `(\w+\.(?:py|sh))` ", (ROOT / "docs/development.md").read_text(), re.M)
  )
  assert named == scripts - {"runs.py", "forks.py", "peaks.py", "faults.py"}


def test_the_index_leads_to_every_page():
  index = (ROOT / "docs/README.md").read_text()
  pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
  assert pages - {"README.md"} == set(re.findall(r"\]\(((?!\.\.)[^)]+\.md)\)", index))
