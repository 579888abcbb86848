"""Fixtures of the data layer's tests."""

import hypothesis
import pytest

from tests.data.cases import PACKERS

# The same examples every time, and none is slow because another process is.
hypothesis.settings.register_profile("data", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("data")


@pytest.fixture(params=PACKERS, ids=lambda packer: packer or "unpacked")
def packer(request):
  return request.param


@pytest.fixture
def folder(tmp_path):
  """A folder of 12 short, different documents."""
  for number in range(12):
    line = f"document {number} says that {number} squared is {number**2}.\n"
    (tmp_path / f"{number:02}.txt").write_text(line * (number % 4 + 1))
  return tmp_path
