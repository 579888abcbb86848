"""All sections of a configuration, and what their fields say about each key."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from maxtext.checkpoints.sections import Checkpoint
from maxtext.config.architecture import Architecture
from maxtext.config.run import Run
from maxtext.data.sections import Data
from maxtext.hosts.sections import Hosts
from maxtext.jobs.sections import Launch
from maxtext.layers.sections import Experts, Kernel, Memory, Pipeline, Precision
from maxtext.mesh import Mesh
from maxtext.serve.sections import Decode
from maxtext.topology import Compile
from maxtext.training.sections import Eval, Observe, Optimizer, Training


@dataclasses.dataclass(frozen=True)
class Sections:
  """One field per section; a setting is `config.training.steps`."""

  run: Run
  architecture: Architecture
  precision: Precision
  memory: Memory
  experts: Experts
  kernel: Kernel
  mesh: Mesh
  pipeline: Pipeline
  hosts: Hosts
  training: Training
  optimizer: Optimizer
  eval: Eval
  observe: Observe
  data: Data
  checkpoint: Checkpoint
  decode: Decode
  launch: Launch
  compile: Compile


SECTIONS: dict[str, type] = get_type_hints(Sections)
HINTS: dict[str, dict[str, Any]] = {
  name: get_type_hints(section, include_extras=True) for name, section in SECTIONS.items()
}
SECTION_OF: dict[str, str] = {key: name for name, hints in HINTS.items() for key in hints}


def hint_of(key: str) -> Any:
  """The type of a key."""
  return HINTS[SECTION_OF[key]][key]
