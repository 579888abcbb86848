"""The planner lists the layouts that training accepts, with what they take, and needs no device."""

import itertools
import re
import time

import jax
import pytest

from maxtext import config, estimate, program
from maxtext.errors import ConfigError
from maxtext.estimate import __main__ as command
from maxtext.estimate.chips import CHIPS, peak_flops
from maxtext.estimate.layouts import layouts, model_of
from maxtext.estimate.roofline import Network

TINY = (
  "run_name=plan vocab_size=320 base_emb_dim=48 base_num_query_heads=6 base_num_kv_heads=2 "
  "base_mlp_dim=96 base_num_decoder_layers=2 max_target_length=512 per_device_batch_size=0.5"
).split()
EXPERTS = (
  *("decoder_block=mixtral", "num_experts=4", "base_moe_mlp_dim=96"),
  *(word for word in TINY if "base_mlp" not in word),
)


def listed(keys, devices=8, chip="h100"):
  return layouts(model_of(config.load(keys, {})), devices, CHIPS[chip])


def accepted(keys):
  """Whether training would begin with these settings on eight devices."""
  try:
    loaded = config.load([*keys, "hardware=cpu", "devices=8"], {})
    assert program.build(loaded, jax.devices()[:8]).state
  except ConfigError:
    return False
  return True


@pytest.mark.parametrize("model, axes", [(TINY, ()), (EXPERTS, ("expert",))], ids=["dense", "moe"])
def test_the_layouts_are_those_that_training_accepts(model, axes):
  """Every product of the axes is listed, or is refused by training itself."""
  names = ("data", "stage", "fsdp", "tensor", "context", *axes)
  keys = [config.load(model, {}).mesh.keys(axis)[0] for axis in names]
  found = {tuple(layout.sizes.get(a, 1) for a in names) for layout in listed(model)}
  every = [s for s in itertools.product((1, 2, 4, 8), repeat=len(names)) if _product(s) == 8]
  wanted = {
    sizes
    for sizes in every
    if accepted([*model, *(f"{key}={n}" for key, n in zip(keys, sizes))])
    and sizes[names.index("context")] <= 4  # of 512 tokens, 128 on a device
  }
  assert 3 < len(wanted) < len(every) and found == wanted


def test_an_idle_stage_costs_the_time_that_it_is_idle():
  """Of eight layers in stages, of which eight times the microbatches leave an eighth."""
  keys = [word for word in TINY if "layers" not in word and "per_device" not in word]
  keys += ["base_num_decoder_layers=8", "per_device_batch_size=8", "ici_fsdp_parallelism=2"]
  found = {
    layout.keys.get("num_pipeline_microbatches", 4): layout.seconds.compute
    for layout in listed([*keys, "ici_pipeline_parallelism=4"])
  }
  whole = next(x.seconds.compute for x in listed([*keys, "ici_data_parallelism=4"]))
  # the unembedding is not in stages: idle is a share of the layers' time alone
  idle = {n: time / whole - 1 for n, time in found.items()}
  assert idle[4] == pytest.approx(8 * idle[32]) and 0 < idle[4] < 3 / 4


def _product(sizes):
  total = 1
  for size in sizes:
    total *= size
  return total


def test_what_is_pasted_is_the_layout_whatever_the_file_says():
  keys = [*TINY, "ici_tensor_parallelism=2"]
  for layout in listed(TINY):
    own = [*keys[:-1], *layout.paste.split(), "hardware=cpu", "devices=8"]
    sizes = config.load(own, {}).mesh.sizes(8)
    assert {axis: n for axis, n in sizes.items() if n > 1} == layout.sizes
  assert {layout.sizes.get("tensor") for layout in listed(keys)} == {2}  # what is typed stays


def test_the_state_is_what_training_says_of_the_same_layout():
  layout = next(x for x in listed(TINY) if x.sizes == {"data": 2, "fsdp": 2, "tensor": 2})
  keys = [*TINY, *layout.paste.split()]
  built = program.build(config.load(keys, {}), jax.devices()[:8])
  assert layout.bytes.params == estimate.bytes_per_device(built.state.params)
  counters = estimate.bytes_per_device(built.state.opt_state) - layout.bytes.optimizer
  assert 0 <= counters <= 16


@pytest.mark.parametrize("model, devices", [("llama3.1-405b", 1024), ("deepseek3-671b", 1024)])
def test_the_largest_models_take_seconds(model, devices, capsys):
  began = time.process_time()
  keys = [f"model_name={model}", f"devices={devices}", "chip=v5p", "max_target_length=4096"]
  assert command.main([*keys, "per_device_batch_size=1", "remat_policy=full"]) == 0
  assert time.process_time() - began < 10
  lines = capsys.readouterr().out.splitlines()
  assert model in lines[0] and "v5p" in lines[0]
  assert re.search(r"layouts are legal, \d+ fit", lines[2])
  assert max(map(len, lines)) < 200
  assert lines[-1].removeprefix("best: ") in lines[6]


def test_where_nothing_fits_it_says_what_would(capsys):
  keys = ["model_name=llama3.1-70b", "devices=16", "chip=v5p", "max_target_length=8192"]
  assert command.main([*keys, "per_device_batch_size=1"]) == 1
  lines = capsys.readouterr().out.splitlines()
  assert any("none fits; the nearest needs" in line for line in lines)
  found = [re.fullmatch(r"  (.*): [\d.]+ GiB, fits; (.*)", line) for line in lines]
  changes = [match for match in found if match]
  assert changes
  for match in changes:
    own = {word.split("=")[0] for word in match[1].split()}
    kept = [key for key in [*keys, "per_device_batch_size=1"] if key.split("=")[0] not in own]
    assert command.main([*kept, *match[1].split(), *match[2].split()]) == 0


@pytest.mark.parametrize(
  "words, says",
  [
    ("chip=v5p", "devices: say how many chips there are, as devices=64"),
    ("devices=0", "devices: say how many chips there are"),
    ("devices=8 chip=h10", "chip: 'h10' is no kind of chip, did you mean 'h100'?"),
    ("devices=7", "no layout of 7 chips is legal"),
    ("devices=8 num_slices=3", "8 chips do not make num_slices=3 equal slices"),
  ],
)
def test_what_cannot_be_planned_is_refused(words, says):
  with pytest.raises(ConfigError, match=re.escape(says)):
    command.main([*TINY, *words.split()])


def test_a_slower_network_is_taken_where_devices_are_out_of_reach():
  chip, none = CHIPS["h100"], {}
  sizes = {"fsdp": 8, "tensor": 8}
  assert Network(chip, sizes, none).speed(["tensor"]) == chip.links
  assert Network(chip, sizes, none).speed(["fsdp"]) == chip.network
  pod = CHIPS["v5p"]
  assert Network(pod, {"data": 2, "fsdp": 64}, {"data": 2}).speed(["data"]) == pod.network
  assert Network(pod, {"fsdp": 64}, none).speed(["fsdp"]) == pod.links  # all three dimensions
  assert Network(pod, {"fsdp": 16, "tensor": 4}, none).speed(["tensor"]) == pod.links / 3


@pytest.mark.parametrize(
  "kind, chip", [("TPU v4", "v4"), ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v6e", "v6e")]
)
def test_a_chip_is_the_device_that_jax_names(kind, chip):
  assert peak_flops(kind) == CHIPS[chip].flops
