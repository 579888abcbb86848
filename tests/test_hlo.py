"""What compiled steps send between devices, counted from their text with the trips of loops."""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from maxtext import config, hlo, program
from maxtext.compiled.report import wire_bytes

ROOT = Path(__file__).parents[1]
LAYERS, WEIGHTS = 3, 7  # in a layer: four of attention, three of the mlp
COMMON = (
  f"run_name=hlo dtype=float32 vocab_size=320 base_emb_dim=32 base_num_query_heads=4 "
  f"base_num_kv_heads=2 base_num_decoder_layers={LAYERS} steps=10 per_device_batch_size=1 "
  "max_target_length=48"
).split()
MOE = "decoder_block=mixtral num_experts=4 base_moe_mlp_dim=64"
DENSE = "base_mlp_dim=64"


def ways(**sizes):
  return " ".join(f"ici_{a}_parallelism={n}" for a, n in ({"fsdp": 1} | sizes).items())


def named(rules, **sizes):
  return f"custom_mesh_and_rule={rules} {ways(**sizes)}"


# What devices send each other in a step, by layout: kind, mesh axes, times.
GOLDEN: dict[str, tuple[str, dict[str, int]]] = {
  "fsdp": (
    f"{DENSE} {ways(fsdp=8)}",
    {
      "all-gather fsdp": 44,
      "all-reduce fsdp": 5,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
    },
  ),
  "fsdp, accumulated": (
    f"{DENSE} {ways(fsdp=8)} gradient_accumulation_steps=2",
    {
      "all-gather fsdp": 87,
      "all-reduce fsdp": 10,
      "all-to-all fsdp": 4,
      "reduce-scatter fsdp": 44,
    },
  ),
  "data": (
    f"{DENSE} {ways(data=8)}",
    {
      "all-reduce data": 4,
    },
  ),
  "tensor": (
    f"{DENSE} {ways(data=4, tensor=2)}",
    {
      "all-reduce data": 4,
      "all-reduce tensor": 18,
    },
  ),
  "fsdp tensor": (
    f"{DENSE} {ways(fsdp=4, tensor=2)}",
    {
      "all-gather fsdp": 44,
      "all-reduce fsdp": 6,
      "all-reduce tensor": 19,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
    },
  ),
  "data fsdp tensor": (
    f"{DENSE} {ways(data=2, fsdp=2, tensor=2)}",
    {
      "all-gather fsdp": 44,
      "all-reduce data": 4,
      "all-reduce data fsdp": 4,
      "all-reduce fsdp": 4,
      "all-reduce tensor": 18,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
    },
  ),
  "context": (
    f"{DENSE} {ways(fsdp=2, context=4)}",
    {
      "all-gather context": 19,
      "all-gather fsdp context": 44,
      "all-reduce context": 4,
      "all-reduce fsdp": 4,
      "all-reduce fsdp context": 2,
      "all-to-all fsdp context": 2,
      "reduce-scatter context": 6,
      "reduce-scatter fsdp context": 22,
    },
  ),
  "ring": (
    f"{DENSE} {ways(fsdp=2, context=4)} context_parallel_strategy=ring",
    {
      "all-gather context": 5,
      "all-gather fsdp context": 44,
      "all-reduce context": 4,
      "all-reduce fsdp": 4,
      "all-reduce fsdp context": 2,
      "all-to-all fsdp context": 2,
      "collective-permute context": 84,
      "reduce-scatter fsdp context": 22,
    },
  ),
  "ulysses": (
    f"{DENSE} {ways(fsdp=4, context=2)} context_parallel_strategy=ulysses",
    {
      "all-gather context": 2,
      "all-gather fsdp context": 44,
      "all-reduce context": 4,
      "all-reduce fsdp": 4,
      "all-reduce fsdp context": 2,
      "all-to-all context": 36,
      "all-to-all fsdp context": 2,
      "reduce-scatter fsdp context": 22,
    },
  ),
  "experts": (
    f"{MOE} {ways(fsdp=4, expert=2)}",
    {
      "all-gather expert": 6,
      "all-gather fsdp": 18,
      "all-gather fsdp expert": 32,
      "all-reduce expert": 2,
      "all-reduce fsdp": 2,
      "all-reduce fsdp expert": 8,
      "all-to-all expert": 24,
      "all-to-all fsdp expert": 2,
      "reduce-scatter fsdp": 9,
      "reduce-scatter fsdp expert": 16,
    },
  ),
  "rules pure_fsdp": (
    f"{DENSE} {named('pure_fsdp', data=2, fsdp=4)}",
    {
      "all-gather fsdp": 44,
      "all-reduce data": 4,
      "all-reduce data fsdp": 4,
      "all-reduce fsdp": 2,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
    },
  ),
  "rules 2d_fsdp": (
    f"{DENSE} {named('2d_fsdp', fsdp=4, fsdp_transpose=2)}",
    {
      "all-gather fsdp": 44,
      "all-gather fsdp_transpose": 44,
      "all-reduce fsdp": 4,
      "all-reduce fsdp fsdp_transpose": 4,
      "all-reduce fsdp_transpose": 2,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
      "reduce-scatter fsdp_transpose": 23,
    },
  ),
  "rules context": (
    f"{DENSE} {named('context', fsdp=2, context=2, tensor=2)}",
    {
      "all-gather context": 19,
      "all-gather fsdp context": 44,
      "all-reduce context": 4,
      "all-reduce fsdp": 4,
      "all-reduce fsdp context": 3,
      "all-reduce tensor": 19,
      "all-to-all fsdp context": 2,
      "reduce-scatter context": 6,
      "reduce-scatter fsdp context": 22,
    },
  ),
  "rules megatron_sp": (
    f"{DENSE} {named('megatron_sp', fsdp=4, tensor=2)}",
    {
      "all-gather fsdp": 44,
      "all-gather tensor": 26,
      "all-reduce fsdp": 6,
      "all-reduce tensor": 22,
      "all-to-all fsdp": 2,
      "reduce-scatter fsdp": 22,
    },
  ),
  "rules expert": (
    f"{MOE} {named('expert', fsdp=4, expert=2)}",
    {
      "all-gather expert": 6,
      "all-gather fsdp": 18,
      "all-gather fsdp expert": 32,
      "all-reduce expert": 2,
      "all-reduce fsdp": 2,
      "all-reduce fsdp expert": 8,
      "all-to-all expert": 24,
      "all-to-all fsdp expert": 2,
      "reduce-scatter fsdp": 9,
      "reduce-scatter fsdp expert": 16,
    },
  ),
  "rules expert_as_context": (
    f"{MOE} {named('expert_as_context', fsdp=4, expert=2)}",
    {
      "all-gather expert": 25,
      "all-gather fsdp": 18,
      "all-gather fsdp expert": 32,
      "all-reduce expert": 9,
      "all-reduce fsdp": 8,
      "all-reduce fsdp expert": 2,
      "all-to-all expert": 24,
      "all-to-all fsdp expert": 2,
      "reduce-scatter expert": 6,
      "reduce-scatter fsdp": 9,
      "reduce-scatter fsdp expert": 16,
    },
  ),
  "stage fsdp": (  # the third layer stands outside the stages
    f"{DENSE} {ways(fsdp=4)} ici_pipeline_parallelism=2 pipeline_parallel_layers=2",
    {
      "all-gather fsdp": 16,
      "all-gather stage": 4,
      "all-reduce fsdp": 6,
      "all-reduce stage": 2,
      "all-reduce stage fsdp": 1,
      "all-to-all fsdp": 2,
      "collective-permute stage": 17,
      "reduce-scatter fsdp": 29,
    },
  ),
  "rules pipeline_moe": (
    f"{MOE} {named('pipeline_moe', fsdp=2, expert=2)} ici_pipeline_parallelism=2 "
    "pipeline_parallel_layers=2",
    {
      "all-gather expert": 8,
      "all-gather fsdp": 6,
      "all-gather fsdp expert": 12,
      "all-gather stage": 4,
      "all-reduce expert": 4,
      "all-reduce fsdp": 4,
      "all-reduce fsdp expert": 9,
      "all-reduce stage": 4,
      "all-reduce stage fsdp expert": 1,
      "all-to-all expert": 32,
      "all-to-all fsdp expert": 2,
      "collective-permute stage": 18,
      "reduce-scatter fsdp": 12,
      "reduce-scatter fsdp expert": 21,
    },
  ),
}


@functools.cache
def compiled(layout, *more):
  keys = [*GOLDEN[layout][0].split(), *more]
  built = program.build(config.load([*COMMON, *keys], {}), jax.devices()[:8])
  rows = built.batch(built.config.training.global_batch(8))
  text = built.step.lower(built.state, rows).compile().as_text()
  return built, hlo.collectives(text, built.layout.mesh.shape)


def counted(layout, *more):
  _, sent = compiled(layout, *more)
  return {" ".join((kind, *axes)): times for kind, axes, times, _ in hlo.totals(sent)}


SLOW = [name for name in GOLDEN if name not in ("fsdp", "data fsdp tensor")]
LAYOUTS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in GOLDEN]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_it_should_and_no_more(layout):
  """The counts are those of the programs as they were when each layout was held to one device."""
  assert counted(layout) == GOLDEN[layout][1]


@pytest.mark.parametrize(
  "layout",
  [
    "fsdp tensor",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("data fsdp tensor", "context")),
  ],
)
def test_types_that_say_the_layout_have_as_much_sent(layout):
  assert counted(layout, "shard_mode=explicit") == GOLDEN[layout][1]


def test_a_weight_is_gathered_once_each_way_and_its_gradient_added_up_once():
  """Besides those of layers, the unembedding is gathered once for both, and so are the rows that
  are asked for of the embedding.
  """
  count = counted("fsdp")
  assert count["all-gather fsdp"] == 2 * WEIGHTS * LAYERS + 2
  assert count["reduce-scatter fsdp"] == WEIGHTS * LAYERS + 1
  assert count["all-to-all fsdp"] == 2  # rows of the embedding, there; and their gradients, back


def test_tensor_parallelism_adds_up_twice_a_layer_each_way():
  """After attention and the mlp; on the way back, before each, of queries, keys and values at once.
  Besides, what the softmax of split logits needs, rows of a split embedding, and the last layer.
  """
  _, sent = compiled("data fsdp tensor")
  layers = [one for one in sent if one.axes == ("tensor",) and one.times == LAYERS]
  assert [one.kind for one in layers] == ["all-reduce"] * 4
  assert [len(one.shapes) for one in layers] == [1, 1, 2, 3]
  assert counted("data fsdp tensor")["all-reduce tensor"] == 4 * LAYERS + 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_logits_are_gathered(layout):
  built, sent = compiled(layout)
  length, vocabulary = built.config.training.max_target_length, built.spec.vocab
  tokens = {length // n for n in (1, 2, 4, 8)}  # no weight has a dimension of such a size
  split = {vocabulary // n for n in (1, 2, 4, 8)}
  for one in sent:
    if one.kind == "all-gather":
      assert not any(tokens & {*shape} and split & {*shape} for shape in one.shapes), one


def test_stages_send_each_other_rows_at_every_tick_and_layers_once():
  """With repeats that stages do not divide: what the compiler would gather of all layers."""
  keys = [key for key in COMMON if "layers" not in key and "per_device" not in key]
  keys += f"{DENSE} {ways(fsdp=4)} ici_pipeline_parallelism=2 num_pipeline_repeats=3".split()
  keys += ["base_num_decoder_layers=6", "per_device_batch_size=2", "remat_policy=full"]
  built = program.build(config.load(keys, {}), jax.devices()[:8])
  rows, schedule = built.batch(built.config.training.global_batch(8)), built.pipeline
  text = built.step.lower(built.state, rows).compile().as_text()
  sent = [x for x in hlo.collectives(text, built.layout.mesh.shape) if x.axes == ("stage",)]
  layers = [p for p in built.plan.declared.values() if p.axes[0] == "layers"]
  matrix = min(math.prod(p.shape) for p in layers if len(p.shape) > 2)
  assert not [x for x in sent if x.kind in ("all-gather", "all-to-all") and x.size >= matrix]
  permutes = [x.times for x in sent if x.kind == "collective-permute"]
  # to the next stage, and to the places of what waits; on the way back as well
  assert permutes.count(schedule.ticks) == 5
  # blocks of weights in each repeat, there and back; and rows after all ticks
  assert permutes.count(1) == len(permutes) - 5 == 20
  # no weight of a stage is kept at every tick
  found = re.findall(rf"f32\[{schedule.ticks},([\d,]+)\]", text)
  assert found
  here = lambda p: (n // 4 if a == "embed" else n for a, n in zip(p.axes[1:], p.shape[1:]))
  local = {tuple(here(p)) for p in layers if len(p.shape) > 2}
  assert not {tuple(map(int, one.split(",")))[-len(w) :] for one in found for w in local} & local


CONTROL = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
place = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
step = lambda x: place(jax.numpy.sin(place(x, ("x", "y"), None)), None, "x")
jax.jit(step).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile()
"""


def written(program):
  """What this program writes to standard error on eight devices, with XLA's warnings."""
  env = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
  run = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
  )
  return run.stderr


@pytest.mark.slow
def test_no_layout_has_the_partitioner_gather_what_it_cannot_move():
  warning = "Involuntary full rematerialization"
  assert warning in written(CONTROL)  # it says so where it does
  every = "from tests.test_hlo import GOLDEN, compiled\nfor layout in GOLDEN: compiled(layout)"
  assert warning not in written(every)


TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %r = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r), dynamic_slice_sizes={2,4}
}

%inner (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %permute = bf16[4]{0} collective-permute(%x), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  ROOT %t = (s32[], bf16[4]) tuple(%i, %permute)
}

%begins (p: f32[4]) -> f32[32] {
  ROOT %g = f32[32]{0} all-gather(%p), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="3"}
}

%beside (p: f32[4]) -> f32[32] {
  ROOT %g = f32[32]{0} all-gather(%p), replica_groups=[1,8]<=[8], frontend_attributes={chain_id="3"}
}

%condition (p: (s32[], bf16[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %loop = (s32[], bf16[4]) while(%p), condition=%condition, body=%inner
  %scattered = f32[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %async-collective-start = f32[32]{0} fusion(%z), kind=kCustom, calls=%begins
  %async_collective_fusion = f32[32]{0} fusion(%z), kind=kCustom, calls=%beside
  ROOT %t = (s32[], bf16[4]) tuple(%i, %y)
}

%small (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%large (p: f32[4]) -> f32[4] {
  %g = f32[4,4]{1,0} all-gather(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %r = f32[4]{0} slice(%g), slice={[0:4]}
}

%clone (p: f32[4]) -> f32[32] {
  ROOT %g = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], bf16[4]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[4]{0} conditional(%q, %p, %p), branch_computations={%small, %large}
  %started = ((f32[4]), f32[32], s32[]) async-start(%p), calls=%clone
  %done = f32[32]{0} async-done(%started)
  %b = (f32[2], f32[4]) all-gather-start(%p), replica_groups=mesh['a'=2,'b'=4],\
 device_ids=([4,2]T(1,0)) {'a'}
  %ended = f32[4]{0} all-gather-done(%b)
  %alone = f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %o = f32[4]{0} add(%ended, %c)
}
"""


def test_what_runs_is_counted_with_the_trips_of_its_loops_and_over_the_axes_it_runs_over():
  sent = hlo.collectives(TEXT, {"fsdp": 4, "tensor": 2})
  assert [(one.kind, one.axes, one.times, one.size) for one in sent] == [
    ("collective-permute", ("fsdp",), 15, 4 * 2),
    ("reduce-scatter", ("fsdp",), 5, 2 * 4 * 4),
    ("all-gather", ("fsdp", "tensor"), 5, 32 * 4),
    ("all-gather", ("tensor",), 1, 16 * 4),
    ("all-gather", ("fsdp", "tensor"), 1, 32 * 4),
    ("all-gather", ("tensor",), 1, 4 * 4),
  ]


IN_RINGS = """HloModule rings

ENTRY %main (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  ROOT %sum = f32[4]{0} reduce-scatter(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}
"""


def test_what_runs_among_a_few_devices_of_an_axis_sends_as_much_as_among_so_many():
  (one,) = hlo.collectives(IN_RINGS, {"fsdp": 8})
  assert (one.axes, one.ways, wire_bytes(one)) == (("fsdp",), 4, 16 * 3)


RAGGED = """HloModule ragged

ENTRY %main (x: bf16[8,4], room: bf16[32,4], n: s32[4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %room = bf16[32,4]{1,0} parameter(1)
  %n = s32[4]{0} parameter(2)
  %there = bf16[32,4]{1,0} ragged-all-to-all(%x, %room, %n), replica_groups={{0,1,2,3}}
  ROOT %back = bf16[8,4]{1,0} ragged-all-to-all(%there, %x, %n), replica_groups={{0,1,2,3}}
}
"""


def test_rows_that_go_into_a_buffer_with_room_for_the_worst_case_are_counted_without_the_room():
  there, back = hlo.collectives(RAGGED, {"expert": 4})
  assert there.size == back.size == 8 * 4 * 2 and there.axes == ("expert",)
