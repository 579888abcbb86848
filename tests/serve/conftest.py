"""Small decoders to generate with, and how."""

import dataclasses

import pytest

from maxtext.serve.sections import Decode
from tests.serve.models import DEFAULTS, build


@pytest.fixture
def model():
  """model(name of a spec, scan=, policy=, fsdp=2 ...) on a mesh of these sizes."""
  return build


@pytest.fixture
def decode():
  """A Decode section, greedy but for what is given."""

  def make(**keys) -> Decode:
    return dataclasses.replace(DEFAULTS.decode, **keys)

  return make
