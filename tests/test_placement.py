"""The table of where parameters stand, and its warnings."""

import jax
import numpy as np
from jax.sharding import Mesh

from maxtext import placement, sharding
from maxtext.sharding import Declared

F32 = np.dtype("float32")
PARAMS = {
  "embedding": Declared((64, 16), F32, ("vocab", "embed")),
  "mlp.kernel": Declared((16, 32), F32, ("embed", "mlp")),
  "norm.scale": Declared((16,), F32, ("norm",)),
}
RULES = {"embed": ("fsdp",), "mlp": ("tensor",), "vocab": (), "norm": ()}


def layout(sizes, **changes):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(*sizes.values()), tuple(sizes))
  rules = {"activation_batch": ("data", "fsdp"), **RULES, **changes}
  return sharding.Layout(mesh, sharding.Rules(rules))


def test_every_parameter_has_a_line_with_its_bytes_on_a_device():
  lines = placement.table(PARAMS, layout({"fsdp": 4, "tensor": 2})).splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["embedding", "[64,", "16]", "vocab", "embed", "-", "fsdp", "1,024"],
    ["mlp.kernel", "[16,", "32]", "embed", "mlp", "fsdp", "tensor", "256"],
    ["norm.scale", "[16]", "norm", "-", "64"],
    ["all", "1,344"],
  ]
  assert len({len(line) for line in lines[1:]}) == 1


def test_what_splits_nothing_and_what_is_left_whole_is_warned_of():
  every = lambda *args, **rules: list(placement.warnings(PARAMS, layout(*args, **rules), 0.02))
  assert every({"fsdp": 4, "tensor": 2}) == []
  assert every({"fsdp": 4, "tensor": 2}, mlp=()) == [
    "mesh axis 'tensor' of size 2 splits nothing: 2 devices each do the same work; "
    "make its size 1, or name it in logical_axis_rules"
  ]
  (line,) = every({"fsdp": 4, "tensor": 2}, embed=())
  assert line.startswith("embedding stands whole on every device, 66.0% of all parameters")
  assert "no rule splits vocab, embed here" in line
  assert list(placement.warnings(PARAMS, layout({"fsdp": 4, "tensor": 2}, embed=()), 0.7)) == []
  assert every({"data": 8}) == []  # copies are what was asked for
