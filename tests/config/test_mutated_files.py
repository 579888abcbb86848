"""Mutated configurations: loaded, or refused in lines that name the place; no other end."""

from __future__ import annotations

import numpy as np
import pytest

from end_to_end.runs import CONFIG
from maxtext import config
from maxtext.config.documents import PACKAGED
from maxtext.errors import ConfigError
from tests.mutation import mutated

FILES = {
  "run.yml": CONFIG,
  "quickstart.yml": PACKAGED / "quickstart.yml",
  "block.yml": PACKAGED / "decoder_blocks" / "gemma3.yml",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_mutated_file_is_a_configuration_or_lines_that_say_why_not(tmp_path, name, count):
  content = FILES[name].read_bytes()
  for seed in range(count):
    (tmp_path / name).write_bytes(mutated(content, np.random.default_rng(seed)))
    words = [str(tmp_path / name)]
    if name == "block.yml":
      words = [f"decoder_block={words[0]}"]
    try:
      config.load(words, {})
    except ConfigError as error:
      lines = str(error).splitlines()
      assert lines and all(len(line) < 500 for line in lines), f"seed {seed}: {error}"
