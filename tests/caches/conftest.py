"""The small decoders that text is generated with."""

import pytest

from tests.serve.models import build


@pytest.fixture
def model():
  """model(name of a spec, scan=, policy=, fsdp=2 ...) on a mesh of these sizes."""
  return build
