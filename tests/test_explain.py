"""python -m maxtext.explain: what a key means, and every place that sets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maxtext.config.sections import SECTION_OF
from maxtext.errors import ConfigError
from maxtext.explain import main, meanings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.yml").write_text("model_name: tiny\nbase_emb_dim: 32\n")


def test_it_prints_meaning_type_value_and_every_place(capsys, monkeypatch):
  monkeypatch.setenv("M_BASE_EMB_DIM", "16")
  assert main(["base_emb_dim", "run.yml", "base_num_query_heads=3"]) == 0
  assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
    ["base_emb_dim", "(architecture)"],
    ["meaning", *meanings()["base_emb_dim"].split()],
    ["type", "a", "whole", "number,", "at", "least", "1"],
    ["value", "16"],
    ["set", "by", "environment", "M_BASE_EMB_DIM:", "16"],
    ["over", "run.yml:2", "base_emb_dim:", "32"],
    ["over", "configs/models/tiny.yml:2", "base_emb_dim:", "64"],
    ["over", "configs/base.yml:20", "base_emb_dim:", "256"],
  ]


def test_it_explains_even_what_is_wrong(capsys):
  assert main(["steps", "steps=ten"]) == 2
  out, err = capsys.readouterr()
  assert "steps: ten" in out and "'ten' is not a whole number" in err


def test_it_names_the_nearest_key():
  with pytest.raises(ConfigError, match="step: no such key, did you mean 'steps'?"):
    main(["step"])


def test_without_a_key_it_lists_all(capsys):
  assert main([]) == 0
  out = capsys.readouterr().out
  assert all(f"  {key} " in out for key in SECTION_OF)


def test_merged_rules_show_each_part(capsys):
  assert main(["logical_axis_rules", "logical_axis_rules={embed: [tensor]}"]) == 0
  out = capsys.readouterr().out
  assert "command line" in out and "logical_axis_rules: {embed: [tensor]}" in out
