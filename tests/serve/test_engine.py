"""The engine: what it generates, when it stops, and what it costs."""

import copy

import jax
import numpy as np
import pytest

from maxtext import hlo
from maxtext.caches.slabs import Slab
from maxtext.errors import ConfigError
from maxtext.serve.engine import Engine, bucket
from maxtext.serve.sample import Sampler

PROMPTS = [[3, 4, 5], [7] * 20, [9, 60]]


_engines = {}


@pytest.fixture
def engine(decode):
  """Engines of one model and one way to sample share what they have compiled."""

  def make(model, *stops, **keys):
    key = (model.name, model.layout.mesh.shape_tuple, *keys.items())
    made = _engines.setdefault(key, Engine(model, Sampler(decode(**keys), 64)))
    made = copy.copy(made)
    made.stops = stops
    return made

  return make


SPLIT = {"data": 2, "context_autoregressive": 2, "autoregressive": 2}
WEIGHTED = {"decode_sampling_strategy": "weighted", "decode_seed": 5}


@pytest.mark.parametrize("spec", ["mixed", "linear"])
def test_greedy_takes_the_likeliest_token_of_one_pass(model, engine, spec):
  model = model(spec)
  for prompt, new in zip(PROMPTS, engine(model).generate(model.params, PROMPTS, 20)):
    assert len(new) == 20
    logits = model.logits(prompt + new)[len(prompt) - 1 : -1]
    top = np.sort(logits)[:, -2:]
    assert (top[:, 1] - top[:, 0]).min() > 1e-3  # else float32 noise might decide
    np.testing.assert_array_equal(new, logits.argmax(-1))


def test_what_a_row_gets_does_not_depend_on_its_batch(model, engine):
  model = model("mixed")
  together = engine(model, **WEIGHTED).generate(model.params, PROMPTS, 12)
  for row in (0, 2):
    alone = engine(model, **WEIGHTED).generate(model.params, [PROMPTS[row]], 12, first_row=row)
    assert alone == [together[row]]


@pytest.mark.parametrize(
  "sizes",
  [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 4, "tensor": 2},
    SPLIT,
    pytest.param(SPLIT | {"mode": "explicit"}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_every_mesh_generates_alike_with_fewer_rows_than_devices(model, engine, sizes):
  one, many = model("mixed"), model("mixed", **sizes)
  want = engine(one, **WEIGHTED).generate(one.params, PROMPTS, 12)
  assert engine(many, **WEIGHTED).generate(many.params, PROMPTS, 12) == want


def test_slots_of_a_cache_that_is_split_stay_where_they_are(model, engine):
  many = model("mixed", **SPLIT)
  own = engine(many, **WEIGHTED)
  sizes = own.compile(many.params, PROMPTS, 170)  # 128 slots on a device; nothing else is as long
  sent = hlo.collectives(own._compiled[sizes][1].as_text(), many.layout.mesh.shape)
  shapes = {s for one in sent if "context_autoregressive" in one.axes for s in one.shapes}
  assert sizes.slots == 256 and shapes and not any({128, 256} & set(shape) for shape in shapes)


def test_a_row_ends_with_eos_and_the_others_go_on(model, engine):
  model = model("mixed")
  whole = engine(model).generate(model.params, PROMPTS, 20)
  eos = whole[0][4]
  want = [row[: row.index(eos)] if eos in row else row for row in whole]
  assert len(want[0]) <= 4 and max(map(len, want)) > len(want[0])
  heard = [[], [], []]
  hear = lambda row, id: heard[row].append(id)
  new = engine(model, eos).generate(model.params, PROMPTS, 20, hear)
  assert new == want and heard == want


def test_a_row_ends_with_whichever_of_several_ends_comes_first(model, engine):
  model = model("mixed")
  whole = engine(model).generate(model.params, PROMPTS, 20)
  stops = {whole[0][7], whole[0][4], whole[1][9]}
  want = [row[: next((i for i, id in enumerate(row) if id in stops), None)] for row in whole]
  assert len(want[0]) <= 4 and len(want[1]) <= 9
  assert engine(model, *stops).generate(model.params, PROMPTS, 20) == want


def test_nothing_is_computed_once_all_rows_have_ended(model, engine):
  model = model("mixed")
  prompts = [PROMPTS[1]] * 3
  eos = engine(model).generate(model.params, prompts, 20)[0][0]
  made = engine(model, eos)
  sizes = made.compile(model.params, prompts, 20)
  begin, step = made._compiled[sizes]
  steps = []
  made._compiled = {sizes: (begin, lambda *args: steps.append(0) or step(*args))}
  assert made.generate(model.params, prompts, 20) == [[], [], []]
  assert len(steps) == 1  # given to the device before the first token was looked at


def test_prompts_of_like_lengths_share_a_program(model, engine):
  model = model("grouped")
  made = engine(model)
  assert len({made.compile(model.params, [[5] * length], 8) for length in (1, 9, 16)}) == 1


def test_a_bucket_is_little_larger_than_what_it_holds():
  sizes = {length: bucket(length) for length in range(1, 5000)}
  assert all(length <= size < 1.25 * length + 16 for length, size in sizes.items())
  assert len(set(sizes.values())) <= 32


def test_all_learned_positions_can_be_used_and_none_beyond(model, engine):
  model = model("learned")
  new = engine(model).generate(model.params, [[5] * 40, [6]], 8)
  assert [len(row) for row in new] == [8, 8]
  refused = r"^decode_length: 40 tokens of prompt and 9 new ones .* 48 learned .*; use at most 8$"
  with pytest.raises(ConfigError, match=refused):
    engine(model).generate(model.params, [[6], [5] * 40], 9)
  with pytest.raises(ConfigError, match="use a prompt of fewer than 48 tokens$"):
    engine(model).generate(model.params, [[5] * 48], 1)


def test_an_empty_prompt_is_refused(model, engine):
  model = model("grouped")
  with pytest.raises(ConfigError, match="^prompt: number 2 has no tokens"):
    engine(model).generate(model.params, [[5], []], 1)


def test_a_step_writes_the_cache_in_place_and_reads_a_layer_at_a_time(model, engine):
  model = model("grouped")
  made = engine(model)
  sizes = made.compile(model.params, [[5]], 4000)
  cache = 2 * 2 * sizes.slots * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8 float32
  memory = made._compiled[sizes][1].memory_analysis()
  assert memory.alias_size_in_bytes >= cache
  assert memory.temp_size_in_bytes < 0.75 * cache  # half of it is one layer's keys and values


def test_only_the_last_token_of_a_prompt_is_unembedded(model, engine):
  model = model("grouped")
  made = engine(model)
  sizes = made._sizes([[5] * 40] * 3, 8)
  begin = jax.jit(made._begin, static_argnums=2)
  text = begin.lower(model.params, made._shapes(sizes), sizes.slots).as_text()
  assert "tensor<3x1x64xf32>" in text and "tensor<3x48x64xf32>" not in text


@pytest.mark.parametrize(
  "format, code", [("int8", "int8"), ("int4", "int4"), ("fp8", "float8_e4m3fn")]
)
def test_keys_and_values_may_be_kept_in_fewer_bits(model, decode, format, code):
  keys = {"quantize_kvcache": True, "kv_quant_dtype": format, "kv_quant_axis": "dkv"}
  model, section = model("mixed"), decode(**keys)
  engine = Engine(model, Sampler(section, 64), quant=section.cache_quant)
  sizes = engine._sizes(PROMPTS, 20)
  begin = jax.jit(engine._begin, static_argnums=2)
  caches = jax.eval_shape(
    lambda p, b: begin(p, b, sizes.slots), model.params, engine._shapes(sizes)
  )[0]
  stored = {
    slab.data.dtype.name for slab in jax.tree.leaves(caches, is_leaf=is_slab) if is_slab(slab)
  }
  assert stored == {code, "int32"}  # and marks
  if format == "int8":  # the likeliest token of one pass, or one that is almost as likely
    for prompt, new in zip(PROMPTS, engine.generate(model.params, PROMPTS, 20)):
      logits = model.logits(prompt + new)[len(prompt) - 1 : -1]
      lost = logits.max(-1) - np.take_along_axis(logits, np.array(new)[:, None], -1)[:, 0]
      assert lost.max() < 0.1 * np.abs(logits).max()
  if format == "int4":  # which goes from program to program more than once
    assert [len(new) for new in engine.generate(model.params, PROMPTS, 3)] == [3] * len(PROMPTS)


def is_slab(x):
  return isinstance(x, Slab)


def test_nothing_is_quantised_unless_asked_for(decode):
  assert decode(kv_quant_dtype="int4").cache_quant is None
