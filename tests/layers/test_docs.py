"""The page on attention: its blocks of Python run, one after the other, as a reader would."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/attention.md"


def test_the_blocks_on_the_page_run(capsys):
  blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
  assert len(blocks) == 3
  place: dict = {"__name__": "page"}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), place)
  assert place["normalised"].shape == place["y"].shape == (2, 16, 64)
  assert capsys.readouterr().out.endswith("('embed', 'q_heads', 'kv')\n")
