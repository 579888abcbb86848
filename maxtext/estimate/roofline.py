"""How long a training step takes at best, by what a chip can do: an estimate without any device.

It takes peaks for granted, and that gathers and sums of parameters run beside the products; sums
over parts of a token, and exchanges of tokens, stand between products and wait for nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from maxtext.estimate.chips import Chip
from maxtext.estimate.flops import attention_weights, forward_flops, step_flops
from maxtext.estimate.memory import F32, UNROLLED, Bytes, Model, Parts
from maxtext.layers.schedule import STAGE
from maxtext.layers.stacking import spared
from maxtext.sharding import Declared
from maxtext.specs import BlockSpec, Stage


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Of one step on one device: products, traffic to its memory, what it sends of parameters and
  gradients (`hidden` behind products as far as these last), and of tokens (`exposed`).
  """

  compute: float
  memory: float
  hidden: float
  exposed: float

  @property
  def total(self) -> float:
    return max(self.compute, self.memory, self.hidden) + self.exposed


@dataclasses.dataclass(frozen=True)
class Network:
  """What joins the devices of a mesh: its `sizes` by axis, outermost first, and of these those over
  `slices`.
  """

  chip: Chip
  sizes: Mapping[str, int]
  slices: Mapping[str, int]

  def speed(self, axes: Iterable[str]) -> float:
    """Bytes per second that a device sends to others along these axes, which it does round a ring.

    Those in reach are neighbours on as many dimensions of the torus as their number makes of all.
    """
    names = [m for m in axes if self.sizes.get(m, 1) > 1]
    order = list(self.sizes)
    inner = order[max(map(order.index, names)) + 1 :]
    count = math.prod(self.sizes[m] for m in names)
    span = count * math.prod(self.sizes[m] for m in inner)
    if span > self.chip.reach or any(self.slices.get(m, 1) > 1 for m in names):
      return self.chip.network
    if not self.chip.dimensions:
      return self.chip.links
    near = min(math.prod(self.sizes.values()) // math.prod(self.slices.values()), self.chip.reach)
    along = round(self.chip.dimensions * math.log(count) / math.log(near))
    return self.chip.links * min(max(along, 1), self.chip.dimensions) / self.chip.dimensions

  def ways(self, axes: Iterable[str]) -> int:
    """How many devices these axes join."""
    return math.prod(self.sizes.get(m, 1) for m in axes)

  def seconds(self, axes: Iterable[str], size: float, rounds: int = 1) -> float:
    """To gather `size` bytes from over these axes, or to add up so many; an all-reduce is both."""
    names = tuple(axes)
    ways = self.ways(names)
    return rounds * size * (ways - 1) / ways / self.speed(names) if ways > 1 else 0.0


def seconds(model: Model, parts: Parts, network: Network, held: Bytes, rows: int) -> Seconds:
  """A step of micro-batches of `rows` rows, which holds `held`."""
  training, devices = model.config.training, math.prod(parts.sizes.values())
  passes, length = training.gradient_accumulation_steps, training.max_target_length
  flops = step_flops(model.spec, rows * length, length).total + computed_again(model, rows * length)
  flops += _idle(model, parts, rows * length)
  used = sum(parts.joined(p) * _times(model, p, parts) for p in model.params.values()) * model.width
  state = 2 * (held.params + held.optimizer + held.grads)
  traffic = state + passes * (3 * used + 3 * held.activations)
  return Seconds(
    passes * flops / devices / network.chip.flops,
    traffic / network.chip.bandwidth,
    passes * _parameters(model, parts, network),
    passes * _tokens(model, parts, network, rows * length),
  )


def _times(model: Model, p: Declared, parts: Parts) -> int:
  """How often a device uses a parameter of this kind, or one layer of it, in a pass."""
  if p.axes[0] == "layers":
    return model.through(parts, model.spec.longest)[0]
  return p.shape[0] // parts.ways(p.axes[0]) if p.stacked else 1


def _idle(model: Model, parts: Parts, tokens: int) -> float:
  """FLOPs that all devices could do while they have nothing to do in a pipeline."""
  if (schedule := model.schedule(parts)) is None:
    return 0.0
  stage = model.spec.stages[model.spec.longest]
  alone = dataclasses.replace(model.spec, vocab=1, stages=(stage,), mtp=None)
  own = step_flops(alone, tokens, model.config.training.max_target_length).total
  own += computed_again(dataclasses.replace(model, spec=alone), tokens)
  return own * schedule.bubble / (1 - schedule.bubble)


def computed_again(model: Model, tokens: int) -> float:
  """FLOPs of the forward pass that the backward pass computes again."""
  total, length = 0.0, model.config.training.max_target_length
  for stage in model.spec.stages:
    for block in stage.blocks:
      if model.policy(stage) in (UNROLLED, "none"):
        continue
      saved = spared(model.config.memory)
      alone = dataclasses.replace(model.spec, vocab=1, stages=(Stage((block,)),), mtp=None)
      flops = forward_flops(alone, tokens, length)
      mixing = 2.0 * tokens * attention_weights(block, model.spec.width)
      lost = flops.attention if "attention_out" not in saved else 0.0
      lost += mixing * (("query_proj" not in saved) + ("out_proj" not in saved)) / 2
      lost += (flops.weights - mixing) * 2 / 3 if "mlpwi_1" not in saved else 0.0
      total += lost * stage.repeat
  return total


def _parameters(model: Model, parts: Parts, network: Network) -> float:
  """Seconds to gather parameters for both ways, and to add up their gradients, in float32."""
  total = 0.0
  for name, p in model.params.items():
    if name == "embedding" and not model.spec.tied:
      continue  # rows of it travel, not the table
    experts = parts.rules.get("exp", ()) if "exp" in p.axes else ()
    piped = p.axes[0] == "layers"
    apart = {*experts, *([STAGE] if piped else [])}  # each stage has layers of its own
    tokens = [m for m in parts.tokens if parts.sizes.get(m, 1) > 1 and m not in apart]
    split = [m for axis in p.axes if axis for m in parts.rules.get(axis, ()) if m in tokens]
    rest = [m for m in tokens if m not in split]
    times, here = _times(model, p, parts), parts.here(p)
    whole = parts.joined(p) * times
    total += network.seconds(split, whole * model.width, 2) + network.seconds(split, whole * F32)
    own = p.shape[0] // parts.ways(p.axes[0]) if p.stacked else 1
    total += network.seconds(rest, here * times / own * F32, 2)
    if piped and (schedule := model.schedule(parts)) and schedule.repeats > 1:
      total += 2 * network.seconds((STAGE,), here * F32)  # to their stages, and gradients back
  return total


def _tokens(model: Model, parts: Parts, network: Network, tokens: int) -> float:
  """Seconds to add up what devices have parts of, and to exchange tokens, both ways."""
  here, total = tokens // parts.ways("activation_batch", "activation_length"), 0.0
  for number, stage in enumerate(model.spec.stages):
    times, share = model.through(parts, number)
    blocks = (_block(model, parts, network, block, int(here * share)) for block in stage.blocks)
    total += times * sum(blocks)
  if (schedule := model.schedule(parts)) is not None and schedule.hop == 1:
    rows = here * schedule.stages / schedule.microbatches * model.spec.width * model.width
    total += 2 * schedule.ticks * rows / network.speed((STAGE,))  # to the next stage, and back
  return total


def _block(model: Model, parts: Parts, network: Network, block: BlockSpec, tokens: int) -> float:
  width = model.width * tokens
  wide = parts.rules.get("activation_mlp", ())
  # after attention and the mlp, and before them on the way back: each an all-reduce
  total = network.seconds(wide, 4 * model.spec.width * width, 2)
  long, ways = parts.rules.get("activation_length", ()), parts.ways("activation_length")
  if block.attention is not None and ways > 1:
    heads, spec = parts.ways("activation_kv_heads"), block.attention
    pair = 2 * (spec.kv_heads // heads) * spec.head_dim * width
    if model.config.kernel.context_parallel_strategy == "ulysses":
      both = pair + 2 * spec.heads // parts.ways("activation_heads") * spec.head_dim * width
      total += network.seconds(long, 2 * both)
    else:  # keys and values for both ways, and their gradients back
      total += network.seconds(long, 3 * pair * ways)
  if block.moe is not None and parts.ways("exp") > 1:  # there and back, twice
    total += network.seconds(parts.rules["exp"], 4 * block.moe.active * model.spec.width * width)
  return total
