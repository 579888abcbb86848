"""What a run costs, from its spec and shapes alone: parameters, FLOPs, bytes per device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from maxtext.estimate.chips import peak_flops
from maxtext.estimate.flops import (
  Flops,
  expert_flops,
  forward_flops,
  matmul_parameters,
  parameter_count,
  step_flops,
)
from maxtext.estimate.memory import Bytes, Model, Parts
from maxtext.estimate.roofline import computed_again
from maxtext.program import HOST, Program
from maxtext.specs import DecoderSpec

__all__ = [
  "Bytes",
  "Estimate",
  "Flops",
  "Model",
  "Parts",
  "bytes_per_device",
  "compiled_bytes",
  "computed_again",
  "expert_flops",
  "forward_flops",
  "matmul_parameters",
  "model_of",
  "of_step",
  "parameter_count",
  "peak_flops",
  "step_flops",
]


def model_of(built: Program) -> Model:
  """What decides about the memory of a run."""
  cpu = built.layout.mesh.devices.flat[0].platform == "cpu"
  return Model.of(built.config, built.spec, built.plan.declared, built.optimizer, cpu)


def of_step(built: Program) -> Bytes:
  """What a training step should take of each device."""
  mesh = built.layout.mesh
  rows = built.config.training.micro_batch(mesh.size)
  parts = Parts(built.layout.rules.table, mesh.shape)
  return model_of(built).bytes(parts, rows, built.objective.tiles)


def bytes_per_device(arrays: Any) -> int:
  """What a tree of arrays, or of shapes with shardings, occupies on one device, and not on its
  host.
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(arrays)
    if leaf.sharding.memory_kind != HOST
  )


def compiled_bytes(compiled: Any) -> int | None:
  """The most that a compiled program holds on one device at a time; None where XLA does not say."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  whole = analysis.argument_size_in_bytes + kept + analysis.temp_size_in_bytes
  peak = analysis.peak_memory_in_bytes
  # XLA's CPU backend leaves what a step computes on the way out of its peak
  return (peak if peak > whole - analysis.temp_size_in_bytes // 2 else whole) or None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A run before it starts: `flops` of one step on all devices, bytes on each; `step` are those of
  a whole step, as they are reckoned.
  """

  parameters: int
  flops: Flops
  parameter_bytes: int
  optimizer_bytes: int
  step: Bytes | None = None

  @classmethod
  def of(cls, spec: DecoderSpec, tokens: int, length: int, params: Any, opt_state: Any) -> Estimate:
    """Of steps of `tokens` tokens in sequences of `length`; the trees are shapes with shardings."""
    return cls(
      parameter_count(spec),
      step_flops(spec, tokens, length),
      bytes_per_device(params),
      bytes_per_device(opt_state),
    )

  def lines(
    self, device_kind: str, mesh: Mapping[str, int], step_bytes: int | None = None
  ) -> Iterator[str]:
    """What a run prints once; `step_bytes` is the compiled step's peak where it is known."""
    devices = math.prod(mesh.values())
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)
    yield f"parameters: {self.parameters:,}"
    yield f"devices: {devices} x {device_kind}" + (f", mesh {axes}" if axes else "")
    tera, share = self.flops.total / 1e12, self.flops.weights / self.flops.total
    peak = peak_flops(device_kind)
    against = f"peak {peak / 1e12:,.1f} TFLOP/s" if peak else "peak not known, so no MFU"
    yield (
      f"TFLOPs per step: {tera:.4g} (weights {share:.1%}, attention {1 - share:.1%}), "
      f"per device {tera / devices:.4g}; {against}"
    )
    state = self.parameter_bytes + self.optimizer_bytes
    line = (
      f"memory per device: state {_binary(state)} (parameters {_binary(self.parameter_bytes)}, "
      f"optimizer {_binary(self.optimizer_bytes)})"
    )
    yield line + (f", peak of a step {_binary(step_bytes)}" if step_bytes else "")
    if (step := self.step) is not None:
      yield (
        f"of a step: gradients {_binary(step.grads)}, activations {_binary(step.activations)}, "
        f"{step.point} {_binary(step.work)}; estimated peak {_binary(step.total)}"
        + (f", and {_binary(step.host)} in the hosts' memory" if step.host else "")
      )


def _binary(size: int) -> str:
  """Bytes in GiB, or in MiB below a tenth of one."""
  return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
