"""What a training step holds on each device, by kind, from spec, shapes, mesh and rules alone.

It may hold the most at one of three points: the last block on the way forward, the loss, or a block
on the way back. Parameters, optimizer, gradients and what is kept for the backward pass are there
at all of them; the optimizer then works in place. What each point adds was read from XLA's buffer
assignments, array by array, and tests/test_memory.py holds the sums to the compiler's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import optax

from maxtext.config import Config
from maxtext.kernels import LONG
from maxtext.layers.schedule import STAGE, Schedule
from maxtext.layers.stacking import INPUT, spared
from maxtext.objectives.cross_entropy import PIECES
from maxtext.sharding import Declared, Rules, names_of, split_further
from maxtext.specs import AttentionSpec, BlockSpec, DecoderSpec, DeltaSpec, MlpSpec, Stage

F32 = 4  # bytes
UNROLLED = "unrolled"


@dataclasses.dataclass(frozen=True)
class Parts:
  """Into how many parts `rules` split arrays on a mesh of these `sizes`."""

  rules: Mapping[str, tuple[str, ...]]
  sizes: Mapping[str, int]

  def ways(self, *names: str | None, without: tuple[str, ...] = ()) -> int:
    """The parts of an array with these logical axes; `without` counts some mesh axes as 1."""
    axes = (m for name in names if name for m in self.rules.get(name, ()) if m not in without)
    return math.prod(self.sizes.get(m, 1) for m in axes)

  @property
  def tokens(self) -> tuple[str, ...]:
    """The mesh axes that split tokens, over which parameters are joined in use."""
    return (*self.rules.get("activation_batch", ()), *self.rules.get("activation_length", ()))

  def here(self, p: Declared) -> int:
    """Elements of a parameter on a device."""
    return math.prod(p.shape) // self.ways(*p.axes)

  def moments(self, p: Declared, over_data: bool) -> int:
    """Elements of what an optimizer keeps of a parameter on a device."""
    spec = Rules(self.rules).spec(p.axes, self.sizes, p.shape)
    spec = split_further(spec, self.sizes, p.shape, "data") if over_data else spec
    ways = (self.sizes[m] for entry in spec for m in names_of(entry))
    return math.prod(p.shape) // math.prod(ways)

  def joined(self, p: Declared) -> int:
    """Elements of a parameter, or of one layer of it, as a device uses it; experts stay split."""
    apart = tuple(m for m in self.tokens if "exp" not in p.axes or m not in self.rules["exp"])
    shape, axes = (p.shape[1:], p.axes[1:]) if p.stacked else (p.shape, p.axes)
    return math.prod(shape) // self.ways(*axes, without=apart)

  def summed(self, p: Declared) -> int:
    """Elements of a layer's gradient that are added up over devices which hold the same ones."""
    split = {m for name in p.axes if name for m in self.rules.get(name, ())}
    if all(self.sizes.get(m, 1) == 1 or m in split for m in self.tokens):
      return 0
    return self.here(p) * self.ways(p.axes[0]) // p.shape[0] if p.stacked else 0


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Bytes on a device at the point of a step that has the most, by kind.

  `activations` are kept for the backward pass; `work` is what else is there at that `point`: of a
  block, or of the loss with its logits. In the `host`'s memory is what was moved there, for good or
  until the backward pass.
  """

  params: int
  optimizer: int
  grads: int
  activations: int
  work: int
  point: str
  host: int = 0

  @property
  def total(self) -> int:
    return self.params + self.optimizer + self.grads + self.activations + self.work


@dataclasses.dataclass(frozen=True)
class Model:
  """What of a run decides about memory, whatever the layout.

  `kept` are the bytes that the optimizer keeps per element of each parameter. On a `cpu` XLA
  computes in float32 whatever the dtype, and widens what a loop kept before it is read again.
  """

  config: Config
  spec: DecoderSpec
  params: Mapping[str, Declared]
  kept: Mapping[str, int]
  cpu: bool = False

  @classmethod
  def of(
    cls,
    config: Config,
    spec: DecoderSpec,
    params: Mapping[str, Declared],
    optimizer: optax.GradientTransformation,
    cpu: bool = False,
  ) -> Model:
    """A run's model; nothing is computed and no device is asked for."""
    shapes = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}
    kept = dict.fromkeys(params, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, shapes)):
      if (name := getattr(path[-1], "key", None)) in kept:
        kept[name] += leaf.dtype.itemsize
    return cls(config, spec, params, kept, cpu)

  @property
  def width(self) -> int:
    """Bytes of an activation."""
    return F32 if self.config.precision.dtype == "float32" else 2

  @property
  def working(self) -> int:
    """Bytes of one that is computed with."""
    return F32 if self.cpu else self.width

  def policy(self, stage: Stage) -> str:
    """What a stage keeps. Outside a loop XLA's CPU backend has nothing computed again but norms."""
    memory = self.config.memory
    loop = memory.scan_layers and stage.repeat > 1
    return UNROLLED if self.cpu and not loop else memory.remat_policy

  def wide(self, block: BlockSpec, peers: int) -> list[tuple[MlpSpec, float]]:
    """A block's feed-forward layers, and for how many rows of each a device has room per token.

    With `peers` that have other experts that is as if all their tokens chose its own.
    """
    if (moe := block.moe) is None:
      return [(block.mlp, 1)] if block.mlp is not None else []
    options = self.config.experts
    times: float = peers * min(moe.active, moe.experts // peers)
    if not options.sparse_matmul:
      capacity = options.capacity_factor
      times = min(capacity * moe.active, moe.experts) if capacity > 0 else moe.experts
    return [(moe.expert, times), *([] if moe.shared is None else [(moe.shared, 1)])]

  @property
  def tiled(self) -> bool:
    """Whether attention holds a tile of the scores at a time, and not all."""
    kernel, length = self.config.kernel.attention, self.config.training.max_target_length
    chosen = length * length >= LONG["cpu" if self.cpu else "elsewhere"]
    return chosen if kernel == "autoselected" else kernel != "dot_product"

  def schedule(self, parts: Parts) -> Schedule | None:
    """How microbatches go through the stages, if the mesh has several."""
    stage, ways = self.spec.stages[self.spec.longest], parts.sizes.get(STAGE, 1)
    section = self.config.pipeline
    return None if ways == 1 else section.schedule(ways, stage.repeat, len(stage.blocks))

  def through(self, parts: Parts, number: int) -> tuple[int, float]:
    """How often a device runs the blocks of a stage of the model, and each time for which share of
    its tokens: those in a pipeline at every tick, for a microbatch.
    """
    stage, schedule = self.spec.stages[number], self.schedule(parts)
    if schedule is None or number != self.spec.longest:
      return stage.repeat // parts.ways("layers" if schedule is None else None), 1
    return schedule.ticks * schedule.layers, schedule.stages / schedule.microbatches

  def bytes(self, parts: Parts, rows: int, tiles: int) -> Bytes:
    """Of a step with micro-batches of `rows` rows, and the loss in so many tiles.

    A pipeline keeps what it does at every tick, that of one tick twice, and rows that wait or move;
    with repeats each stage has its layers, and their gradients, beside those it stores.
    """
    here = {name: parts.here(p) for name, p in self.params.items()}
    zero = self.config.mesh.shard_optimizer_over_data
    share = {name: parts.moments(p, zero) for name, p in self.params.items()}
    grads, passes = 0, self.config.training.gradient_accumulation_steps
    sums = F32 if self.config.precision.grad_dtype == "float32" else 2
    for name, p in self.params.items():
      size = p.dtype.itemsize
      if passes > 1:  # the sum of all passes; and a CPU widens parameters once for all of them
        size += sums + (F32 if self.cpu and p.dtype.itemsize < F32 else 0)
      grads += share[name] * (max(size, sums) if passes == 1 else size)
    grads += (here["embedding"] - share["embedding"]) * sums  # whole before it is split
    local = _Local.of(self, parts, rows)
    held, far = (
      sum(self._kept(local, number, hosts) for number in range(len(self.spec.stages)))
      for hosts in (False, True)
    )
    if (schedule := self.schedule(parts)) is not None:
      held += self._kept(local, self.spec.longest, False) // schedule.ticks
      held += 3 * self.working * local.tokens * local.stream
      dealt = (here[name] for name, p in self.params.items() if p.axes[0] == "layers")
      held += 2 * F32 * sum(dealt) if schedule.repeats > 1 else 0
    if (further := self.spec.mtp) is not None:
      alone = Stage((further.block,))
      held += further.layers * local.kept(further.block, self.policy(alone))
      far += further.layers * local.kept(further.block, self.policy(alone), hosts=True)
    points = self._points(local, tiles)
    point = max(points, key=lambda name: points[name])
    whole = Bytes(
      sum(here[name] * p.dtype.itemsize for name, p in self.params.items()),
      sum(share[name] * size for name, size in self.kept.items()),
      grads,
      held,
      points[point],
      point,
      far,
    )
    if not self.config.optimizer.optimizer_memory_host_offload:
      return whole
    whole = dataclasses.replace(whole, host=far + whole.optimizer)
    update = dataclasses.replace(whole, activations=0, work=0, point="update")
    return max(dataclasses.replace(whole, optimizer=0), update, key=lambda held: held.total)

  def _kept(self, local: _Local, number: int, hosts: bool) -> int:
    """Bytes that the blocks of a stage of the model keep, on the device or in the hosts' memory."""
    times, share = self.through(local.parts, number)
    stage, own = self.spec.stages[number], local.part(share)
    return times * sum(own.kept(block, self.policy(stage), hosts) for block in stage.blocks)

  def _points(self, local: _Local, tiles: int) -> dict[str, int]:
    """Bytes that only one point of the step has, by its name."""
    last = self.params.get("unembedding", self.params["embedding"])
    head, tile = local.parts.joined(last), local.tokens * local.vocab // tiles
    joined, narrow = head * self.working, self.width if self.working > self.width else 0
    share, sums = head, 1 if tiles == 1 else 2
    if tiles > 1 and local.parts.here(last) < head:  # made and sent piece by piece
      share = max(head // PIECES, min(head, tile // 2))
    # logits, and what becomes their gradient: which a CPU makes in float32 as well
    softmax = (F32 + self.working) * tile
    product = (F32 + narrow if self.cpu else self.width) * tile + narrow * head + sums * F32 * share
    points = {
      "forward": joined,  # a CPU joins the unembedding ahead of time
      "loss": joined + max(softmax, product, 3 * F32 * share),
      "backward": 0,
    }
    for s, stage in enumerate(self.spec.stages):
      for b, block in enumerate(stage.blocks):
        prefix = f"stages.{s}.blocks.{b}."
        own = [p for name, p in self.params.items() if name.startswith(prefix)]
        weights, summed = map(local.parts.joined, own), map(local.parts.summed, own)
        own_part = local.part(self.through(local.parts, s)[1])
        forward, backward = own_part.block(block, self.policy(stage), list(weights))
        points["forward"] = max(points["forward"], joined + forward)
        points["backward"] = max(points["backward"], backward, 2 * F32 * sum(summed))
    if self.config.training.gradient_accumulation_steps > 1:  # joined once for all passes
      points["backward"] += joined + narrow * head
    return points


@dataclasses.dataclass(frozen=True)
class _Local:
  """A device's part of the activations: its tokens, and its channels of the width."""

  model: Model
  parts: Parts
  tokens: int
  width: int
  stream: int  # what of it a device has between layers, which may be split further
  vocab: int

  @classmethod
  def of(cls, model: Model, parts: Parts, rows: int) -> _Local:
    tokens = rows * model.config.training.max_target_length
    width, ways = model.spec.width // parts.ways("activation_embed"), parts.ways
    finer = max(ways("activation_norm_length") // ways("activation_length"), 1)
    return cls(
      model,
      parts,
      tokens // ways("activation_batch", "activation_length"),
      width,
      width // finer,
      model.spec.vocab // parts.ways("activation_vocab"),
    )

  def part(self, share: float) -> _Local:
    """The same for a share of the tokens."""
    return dataclasses.replace(self, tokens=int(self.tokens * share))

  def kept(self, block: BlockSpec, policy: str, hosts: bool = False) -> int:
    """Bytes that a block keeps for the backward pass, on the device or in the hosts' memory."""
    least, memory = self.model.working, self.model.config.memory
    made = list(self.made(block))
    if hosts and policy in (UNROLLED, "none"):
      return 0
    if policy == UNROLLED:
      made = [m for m in made if m[0] != "norm"]
    elif policy != "none":
      names = spared(memory, "offload" if hosts else "device")
      names += () if hosts or INPUT in spared(memory) else (INPUT,)
      made = [m for m in made if m[0] in names]
    return self.tokens * sum(count * max(size, least) for _, count, size in made)

  def made(self, block: BlockSpec) -> Iterator[tuple[str, int, int]]:
    """(name, elements per token, bytes of one) of all that a block makes and its gradient needs;
    what no policy can name is named ''.
    """
    w, d = self.model.width, self.stream
    norms = 2 * block.pre_norm + block.post_attention_norm + block.post_mlp_norm
    yield INPUT, d, w
    yield "norm", 2 * norms * d, F32
    yield "", norms * d, F32
    yield "", norms * d, w
    yield "out_proj", self.width, w
    if block.attention is not None:
      yield from self._attention(block.attention)
    elif block.delta is not None:
      yield from self._delta(block.delta)
    for mlp, times in self.model.wide(block, self.parts.ways("exp")):
      hidden = int(times * mlp.hidden) // self.parts.ways("activation_mlp")
      gated = len(mlp.activations) == 2
      yield "mlpwi_1", hidden, w
      yield "mlpwi_0", hidden * gated, w
      yield "", (4 if gated else 3) * hidden, w
    if block.post_mlp_norm:
      yield "mlpwo", d, w
    if block.moe is not None:
      yield "", self.width, F32

  def _attention(self, spec: AttentionSpec) -> Iterator[tuple[str, int, int]]:
    w, length = self.model.width, self.model.config.training.max_target_length
    heads, groups = self._heads(spec)
    value = spec.head_dim
    yield "query_proj", heads * spec.head_dim, w
    if (low := spec.latent) is None:
      yield "key_proj", groups * spec.head_dim, w
      yield "value_proj", groups * spec.head_dim, w
    else:
      value, ranks = low.value_dim, low.kv_rank + (low.q_rank or 0)
      yield "key_proj", low.kv_rank, w
      yield "value_proj", low.rope_dim, w
      yield "", 3 * ranks, F32
      yield "", ranks + heads * (spec.head_dim + value), w
    yield "attention_out", heads * value, w
    if self.model.tiled:
      yield "attention_out", heads, F32
    else:
      yield "", 2 * heads * length, F32
      yield "", heads * length, w

  def _delta(self, spec: DeltaSpec) -> Iterator[tuple[str, int, int]]:
    ways, values = self.parts.ways("activation_kv_heads"), spec.value_heads * spec.value_dim
    yield "query_proj", (spec.key_heads * spec.channels + values) // ways, self.model.width
    yield "attention_out", values // ways, F32
    yield "", 6 * spec.key_heads * spec.channels // ways, F32

  def _heads(self, spec: AttentionSpec) -> tuple[int, int]:
    """The query heads and the key heads of a device."""
    ways = self.parts.ways
    return (
      spec.heads // ways("activation_heads"),
      max(spec.kv_heads // ways("activation_kv_heads"), 1),
    )

  def block(self, block: BlockSpec, policy: str, weights: list[int]) -> tuple[int, int]:
    """Bytes of a block on the way forward and on the way back, with the elements of its joined
    weights.

    Forward these and the widest activations are there. On the way back, of the width six arrays, of
    queries, keys and values the copies that tiles are cut from; and of the widest activations the
    kept ones and their gradients or, where none were kept, all that makes them. Experts hold their
    gradients' sums too, and a token's row once per choice.
    """
    model, moe, w = self.model, block.moe, self.model.working
    made = list(self.made(block))
    named = [count for name, count, _ in made if name not in ("", "norm")]
    forward = w * (sum(weights) + max(weights) + self.tokens * 2 * (self.width + max(named)))
    wide = sum(count for name, count, _ in made if name.startswith("mlpwi"))
    all_there = policy in (UNROLLED, "none") or "mlpwi_1" in spared(model.config.memory)
    each = w + model.width if all_there else 3.5 * model.width
    rows = 3 * (self.width + self.stream) + (3 if model.tiled else 1) * self._attended(block)
    rows += (
      0 if moe is None else int(6 * model.wide(block, self.parts.ways("exp"))[0][1]) * self.width
    )
    backward = w * (sum(weights) * (1 if moe is None else 2) + self.tokens * rows)
    backward += w * self.tokens * self._whole_rows(block)
    scores = self._scores(block)
    return forward + scores, backward + max(int(each * self.tokens * wide), scores)

  def _attended(self, block: BlockSpec) -> int:
    """Elements per token of queries, keys and values."""
    made = self.made(block)
    count = sum(n for name, n, _ in made if name in ("query_proj", "key_proj", "value_proj"))
    if block.attention is not None and (low := block.attention.latent) is not None:
      count += self._heads(block.attention)[0] * (block.attention.head_dim + low.value_dim)
    return count

  def _whole_rows(self, block: BlockSpec) -> int:
    """Elements per token of the keys and values of other devices' tokens, and their gradients."""
    ways, spec = self.parts.ways("activation_length"), block.attention
    if ways == 1 or spec is None or self.model.config.kernel.context_parallel_strategy == "ring":
      return 0
    return 2 * (ways - 1) * 2 * self._heads(spec)[1] * spec.head_dim

  def _scores(self, block: BlockSpec) -> int:
    """Bytes of scores, weights and their gradients, of attention that is not tiled."""
    if self.model.tiled or block.attention is None:
      return 0
    length = self.model.config.training.max_target_length
    return 4 * F32 * self.tokens * self._heads(block.attention)[0] * length
