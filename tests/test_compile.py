"""`maxtext.compile` compiles the step that training runs, for devices that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from maxtext import compile as compiling
from maxtext import config, hlo, program, topology
from maxtext.compiled import executable, noting, origins, plot, report, reported, schedule, words
from maxtext.errors import ConfigError
from maxtext.estimate import advice
from maxtext.estimate.chips import CHIPS

ROOT = Path(__file__).parents[1]
KEYS = (
  "run_name=seen dataset_type=synthetic vocab_size=320 base_emb_dim=32 base_num_query_heads=4 "
  "base_num_kv_heads=2 base_mlp_dim=64 base_num_decoder_layers=3 per_device_batch_size=1 "
  "max_target_length=48 steps=1 ici_fsdp_parallelism=4 ici_tensor_parallelism=2 "
  "enable_checkpointing=false"
).split()

HASTY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def run(folder: Path, module: str, *keys: str, code: int = 0) -> str:
  """What a command prints, whose programs XLA writes into the folder `dump`."""
  flags = f"{HASTY} --xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text"
  done = subprocess.run(
    [sys.executable, "-m", module, *KEYS, f"base_output_directory={folder}", *keys],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == code, done.stderr[-2000:]
  return done.stdout


def optimised(folder: Path) -> str:
  """The step as XLA compiled it, but for where it was written; names are numbered as they come."""
  (path,) = (folder / "dump").glob("*.jit_placed.*cpu_after_optimizations.txt")
  text = re.sub(r", metadata=\{[^}]*\}", "", path.read_text())
  text, names = text[text.index("\n\n%") :], dict[str, str]()
  number = lambda name: names.setdefault(name[0], f"name{len(names)}")
  return re.sub(r"(?<![\w.])[A-Za-z_][\w-]*(\.[\w-]+)+", number, text)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, str]:
  """A folder with a compile's programs and report, and what it printed."""
  folder = tmp_path_factory.mktemp("compiled")
  keys = "compile_topology=cpu-8", f"report_file={folder / 'report.json'}"
  return folder, run(folder, "maxtext.compile", *keys)


def test_what_is_compiled_is_the_step_that_training_runs(seen, tmp_path):
  run(tmp_path, "maxtext.train", "hardware=cpu", "devices=8")
  ours, trained = optimised(seen[0]), optimised(tmp_path)
  assert ours.count("all-gather") > 10
  assert ours == trained


def test_a_report_says_what_a_step_takes_and_sends_for_people_and_programs(seen):
  folder, printed = seen
  made = json.loads((folder / "report.json").read_text())
  assert made["fits"] and made["run"]["mesh"] == {"fsdp": 4, "tensor": 2}
  memory = made["memory"]
  given = memory["parameters"] + memory["optimizer"] + memory["batch"]
  assert given == pytest.approx(memory["arguments"], rel=0.02)  # a column is not read
  assert memory["arguments"] + memory["temporaries"] <= memory["peak"] < memory["chip"]
  sent = {(one["kind"], *one["axes"]): one for one in made["sent"]}
  assert sent["reduce-scatter", "fsdp"]["times"] == 22  # as test_hlo.py counts it
  assert sent["all-gather", "fsdp"]["wire"] == sent["all-gather", "fsdp"]["size"] * 3 // 4
  assert len(made["largest"]) == 10
  assert "8 x cpu, mesh fsdp 4 x tensor 2" in printed
  assert len(printed.splitlines()) < 45


def test_a_step_is_compiled_for_a_tpu_with_its_kernels_and_cycles_or_found_too_large(tmp_path):
  pytest.importorskip("libtpu")

  def compiled(topology: str, *keys: str, code: int = 0):
    path = tmp_path / "report.json"
    keys = (*keys, "max_target_length=512", f"compile_topology={topology}", f"report_file={path}")
    command = [sys.executable, "-m", "maxtext.compile", "dataset_type=synthetic", *keys]
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return json.loads(path.read_text()), done.stdout

  wide = "base_emb_dim=256 head_dim=64 vocab_size=1024 remat_policy=full".split()
  made, _ = compiled("v5p-8", *wide, "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2")
  assert made["run"]["device_kind"] == "TPU v5"
  assert made["work"]["kernels"] == 4 * 4  # in each layer one each way, again, and one for keys
  assert made["time"]["mfu"] < 1 and made["time"]["cycles"] > 0
  sent = {(one["kind"], *one["axes"]): one for one in made["sent"]}
  assert {("all-reduce", "tensor"), ("reduce-scatter", "fsdp")} <= set(sent)
  weights = sent["all-gather", "fsdp"]
  assert weights["beside"] > 0.4 * weights["size"]  # by the chip's options; none without them
  large = "model_name=llama3.1-8b", "per_device_batch_size=8", "remat_policy=none"
  made, printed = compiled("v5e-64", *large, code=1)
  assert not made["fits"] and made["memory"]["peak"] > made["memory"]["chip"]
  assert "remat_policy=" in made["advice"][0] and "it does not fit" in printed


def test_a_step_is_compiled_for_gpus_by_their_own_compiler_which_is_said_to_be_less(tmp_path):
  pytest.importorskip("jax_plugins.xla_cuda12", reason="needs the extra cuda")
  environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  keys = [key for key in KEYS if not key.startswith("ici_")]
  keys += ["compile_topology=h100-16", "ici_fsdp_parallelism=8", "ici_tensor_parallelism=2"]
  command = [sys.executable, "-m", "maxtext.compile", *keys, f"report_file={tmp_path / 'report'}"]
  done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  made = json.loads((tmp_path / "report").read_text())
  assert made["run"]["devices"] == 16 and "H100" in made["run"]["device_kind"]
  assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "tensor")} <= {
    (one["kind"], *one["axes"]) for one in made["sent"]
  }
  assert made["memory"]["temporaries"] > 0 and made["time"] is None
  assert made["part"] in done.stdout and "compiled for in part" in made["part"]


def test_gpus_whose_compiler_is_not_installed_are_refused_in_one_line():
  if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12"):
    pytest.skip("the extra cuda is installed")
  with pytest.raises(ConfigError, match=r"compile_topology.*h100-8.*maxtext\[cuda\]") as error:
    topology.devices(topology.parse("h100-8"), 1)
  assert "\n" not in str(error.value)


def test_gpus_have_no_slices():
  with pytest.raises(ConfigError, match="compile_topology_num_slices.*use 1"):
    topology.devices(topology.parse("h100-8"), 2)


def test_the_largest_arrays_are_named_by_line_and_axes(seen):
  made = json.loads((seen[0] / "report.json").read_text())["largest"]
  for one in (one for one in made if one["source"]):
    file, line = one["source"].split(":")
    assert (ROOT / "maxtext" / file).read_text().splitlines()[int(line) - 1].strip()
  stream = [one for one in made if one["array"].endswith("[2, 48, 32]")]
  assert {one["axes"] for one in stream} <= {
    "activation_batch activation_norm_length activation_embed"
  }
  assert any(one["axes"] == "layers embed mlp" for one in made) or stream


def test_an_array_has_the_axes_of_the_parameters_of_its_shape_if_they_are_the_same():
  def named(width: str) -> origins.Origins:
    keys = [key for key in KEYS if not key.startswith("base_mlp_dim")]
    built = program.build(config.load([*keys, width], {}), jax.devices())
    return origins.Origins("", built.layout, built.plan.declared)

  like = named("base_mlp_dim=80")
  line = hlo.Line("gradient", "", "fusion", "")
  assert like.axes(line, (3, 8, 40)) == "layers embed mlp"  # a device's part: fsdp 4 x tensor 2
  assert like.axes(line, (1, 32, 80)) == "embed mlp"  # gathered, of one layer
  assert like.axes(line, (32, 40)) == "embed mlp"  # over fsdp alone
  assert like.axes(line, (32,)) == like.axes(line, (3, 5, 7)) == ""
  like = named("base_mlp_dim=32")
  assert like.axes(line, (32, 32)) == ""  # mlp embed, embed mlp, or of attention


@pytest.mark.parametrize(
  "extra",
  ["remat_policy=full", pytest.param("scan_layers=false", marks=pytest.mark.slow)],
)
def test_memory_that_is_walked_through_is_what_the_compiler_needs(extra):
  """To a tenth: XLA packs buffers into one block, with gaps, and shares what need not be copied."""
  larger = "base_emb_dim=64", "max_target_length=128", "attention=dot_product"
  keys = [key for key in KEYS if not key.startswith(("base_emb", "max_target"))]
  keys += [extra, *larger]
  built = noting(program.build(config.load(keys, {})))
  made = report.of(built, built.traced.lower().compile(), 0.0)
  assert made.memory.walked == pytest.approx(made.memory.peak, rel=0.1)
  assert max(size for _, size in made.moments) == made.memory.walked
  assert "it fits" in "\n".join(words.lines(made))


PAIRED = """\
HloModule paired

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %begun = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %beside = f32[8]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"30"}
  %ended = f32[8]{0} all-gather-done(%begun)
  %waited = f32[8]{0} all-reduce(%ended), replica_groups={{0,1,2,3}}
  %idle = (f32[2]{0}, f32[8]{0}) all-gather-start(%waited), replica_groups={{0,1,2,3}}
  ROOT %late = f32[8]{0} all-gather-done(%idle)
}

ENTRY %main (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %called = f32[8]{0} call(%y), to_apply=%body
}
"""


FILLED = """\
HloModule filled

FileNames
1 "/house/maxtext/layers/local.py"
2 "/house/maxtext/layers/moe.py"
3 "/house/maxtext/training/step.py"

FileLocations
1 {file_name_id=1 line=7 end_line=7}
2 {file_name_id=2 line=8 end_line=8}
3 {file_name_id=3 line=9 end_line=9}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

%updated (a: f32[4,8], b: f32[8], i: s32[]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(2)
  %b = f32[8]{0} parameter(1)
  %made = f32[8]{0} negate(%b), metadata={op_name="kept" stack_frame_id=3}
  %row = f32[1,8]{1,0} bitcast(%made), metadata={op_name="update" stack_frame_id=1}
  ROOT %put = f32[4,8]{1,0} dynamic-update-slice(%a, %row, %i, %i)
}

%zeros (z: f32[]) -> f32[4,8] {
  %z = f32[] parameter(0)
  ROOT %many = f32[4,8]{1,0} broadcast(%z), dimensions={}
}

%body (x: (s32[], f32[4,8], f32[8])) -> (s32[], f32[4,8], f32[8]) {
  %x = (s32[], f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%x), index=0
  %all = f32[4,8]{1,0} get-tuple-element(%x), index=1
  %sum = f32[8]{0} get-tuple-element(%x), index=2
  %next = f32[4,8]{1,0} fusion(%all, %sum, %n), kind=kLoop, calls=%updated
  %added = f32[8]{0} add(%sum, %sum), metadata={op_name="sum" stack_frame_id=1}
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[8]{0}) tuple(%n, %next, %added)
}

%head (y: (s32[], f32[4,8], f32[8])) -> pred[] {
  %y = (s32[], f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (s: f32[]) -> f32[] {
  %s = f32[] parameter(0)
  %zero = s32[] constant(0)
  %begun = f32[4,8]{1,0} fusion(%s), kind=kLoop, calls=%zeros, metadata={op_name="broadcast.1"}
  %room = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %given = (s32[], f32[4,8]{1,0}, f32[8]{0}) tuple(%zero, %begun, %room)
  %loop = (s32[], f32[4,8]{1,0}, f32[8]{0}) while(%given), condition=%head, body=%body
  ROOT %same = f32[] negate(%s)
}
"""


def test_arrays_that_a_loop_fills_are_called_by_what_it_writes_and_who_had_it_made():
  layout = program.build(config.load(KEYS, {}), jax.devices()).layout
  source = origins.Origins(FILLED, layout, {}).source
  live = {one.line.name: one.named for one in schedule.profile(FILLED).live}
  found = {name: (origins.name_of(line), source(line)) for name, line in live.items()}
  assert found["begun"] == ("kept", "layers/moe.py:8")  # not local.py, which runs what others make
  assert found["room"] == ("sum", "training/step.py:9")


def test_what_the_layers_keep_for_their_gradients_is_called_by_the_lines_that_make_it():
  keys = *KEYS, "dtype=float32", "remat_policy=none"
  built = noting(program.build(config.load(keys, {}), jax.devices()))
  made = report.of(built, built.traced.lower().compile(), 0.0)
  kept = [one for one in made.largest if one.array.startswith("f32[3, 2, 48, ")]
  assert len(kept) > 3 and len({one.name for one in kept}) > 1
  assert all(one.source.startswith(("layers/", "kernels/")) for one in kept), kept


BETWEEN_SLICES = """\
HloModule slices

ENTRY %main (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  %sent = (f32[8]{0}, u32[], token[]) send(%y), _xla_megascale_transfer_type="ALL_REDUCE"
  %got = (f32[8]{0}, u32[], token[]) recv(%y), _xla_megascale_transfer_type="ALL_REDUCE"
  %beside = f32[8]{0} fusion(%y), kind=kLoop, backend_config={"estimated_cycles":"9"}
  %done = (f32[8]{0}, token[]) recv-done(%got)
  ROOT %all = f32[8]{0} get-tuple-element(%done), index=0
}
"""


def test_what_hosts_send_between_slices_is_counted_once_over_the_axes_of_slices():
  (one,) = hlo.collectives(BETWEEN_SLICES, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 1})
  assert (one.kind, one.axes, one.size, one.beside) == ("all-reduce", ("data",), 32, 9)
  assert 64 <= schedule.profile(BETWEEN_SLICES).peak < 80  # what comes, what is beside, handles


def test_a_collective_overlaps_what_is_computed_between_its_two_halves():
  found = hlo.collectives(PAIRED, {"fsdp": 4})
  assert [(one.kind, one.beside) for one in found] == [
    ("all-gather", 30),
    ("all-reduce", None),
    ("all-gather", None),
  ]


@pytest.mark.parametrize(
  "name, shape, devices",
  [
    ("v4-512", "4x8x8", 256),
    ("v5litepod-16", "4x4", 16),
    ("v5p-64", "2x4x4", 32),
    ("v6e-8", "2x4", 8),
    ("tpu7x-8", "2x2x1", 8),
    ("v5p-4x4x8", "4x4x8", 128),
    ("h100-16", "", 16),
    ("cpu-8", "", 8),
  ],
)
def test_devices_are_known_by_their_common_names(name, shape, devices):
  found = topology.parse(name)
  assert (found.topology, found.devices) == (shape, devices)


@pytest.mark.parametrize(
  "name, advice",
  [
    ("v5p-100", "v5p-64, v5p-128"),
    ("v5q-8", "'v5p-8'"),
    ("a100-8", "name h100-8"),
    ("v5e", "did you mean 'v5e-256'"),
    ("cpu", "did you mean 'cpu-8'"),
    ("cpu-0", "did you mean 'cpu-8'"),
    ("other", "kinds are cpu, h100, .*as cpu-8"),
  ],
)
def test_devices_that_there_are_none_of_are_refused(name, advice):
  with pytest.raises(ConfigError, match=f"compile_topology.*{advice}"):
    compiling.load([*KEYS, f"compile_topology={name}"])


def test_axes_that_no_whole_dimensions_of_a_slice_make_up_are_refused_in_one_line():
  pytest.importorskip("libtpu")
  sizes = "ici_fsdp_parallelism=32", "ici_tensor_parallelism=2"
  keys = "dataset_type=synthetic", "compile_topology=v5p-128", *sizes
  environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", "maxtext.compile", *keys]
  done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
  assert done.returncode == 2 and not done.stdout
  words = "allow_split_physical_axes.*4 x 4 x 4 chips.*fsdp 32 x tensor 2: make.*set this to true"
  assert re.search(words, done.stderr.splitlines()[-1]) and "NotImplemented" not in done.stderr


def test_without_a_topology_there_is_nothing_to_compile_for():
  with pytest.raises(ConfigError, match="compile_topology"):
    compiling.load(KEYS)


def test_slices_without_a_topology_and_options_that_are_none_are_refused():
  for key in ("compile_topology_num_slices=2", "compile_xla_flags=fast"):
    with pytest.raises(ConfigError, match=key.partition("=")[0]):
      config.load([*KEYS, key], {})


ALONE = [
  *[key for key in KEYS if not key.startswith(("ici_", "run_name"))],
  "ici_fsdp_parallelism=1",
  "attention=dot_product",
]


def alone(*keys):
  """A program on one device."""
  return program.build(config.load([*ALONE, *keys], {}), jax.devices()[:1])


def test_a_compiled_step_is_loaded_for_what_it_was_compiled_for_and_nothing_else(tmp_path):
  path, built = str(tmp_path / "step"), alone()
  lowered = built.traced.lower()
  compiled = lowered.compile()
  executable.save(path, built, lowered, compiled)
  batch = {name: jnp.ones(x.shape, x.dtype) for name, x in built.batch(1).items()}
  again = alone("run_name=other", "log_period=7")
  step = executable.load(path, again, again.traced.lower())
  loss = step(again.init(), batch)[1]["loss"]
  assert loss == compiled(built.init(), batch)[1]["loss"]
  other = alone("learning_rate=0.5")
  with pytest.raises(ConfigError, match="another program .learning_rate=0.001, here 0.5"):
    executable.load(path, other, other.traced.lower())
  whole = (tmp_path / "step").read_bytes()
  middle = len(whole) // 2
  for damaged in (whole[: -len(whole) // 3], whole[:middle] + bytes(64) + whole[middle + 64 :]):
    (tmp_path / "step").write_bytes(damaged)
    with pytest.raises(ConfigError, match="compiled_trainstep_file: .* damaged; compile it anew"):
      executable.load(path, built, lowered)
  (tmp_path / "step").write_text("nothing")
  with pytest.raises(ConfigError, match="is no compiled step"):
    executable.load(path, built, lowered)


def test_a_step_has_the_options_of_its_chips_and_the_runs_own_above_them():
  flag = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"
  options = lambda *keys: config.load([*KEYS, *keys], {}).compile.options
  assert options()("TPU v5") == topology.GATHER_BESIDE and flag in topology.GATHER_BESIDE
  assert set(topology.GATHER_BESIDE) < set(options()("TPU v6 lite")) and options()("cpu") == {}
  own = options(f"compile_xla_flags=--{flag}=false --xla_more=2")
  assert own("TPU v5") == {**topology.GATHER_BESIDE, flag: "false", "xla_more": "2"}
  assert own("cpu") == {flag: "false", "xla_more": "2"}


def test_training_on_other_devices_than_those_named_is_refused():
  section = config.load([*KEYS, "compile_topology=v5p-16"], {}).compile
  with pytest.raises(ConfigError, match="v5p-16 is 8 x TPU v5, and here are 8 x cpu"):
    topology.demand(section, jax.devices(), 1)


def test_what_does_not_fit_ends_in_the_report_and_in_one_line(capsys, tmp_path):
  built = alone(f"report_file={tmp_path / 'report.json'}")
  word = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34.5G."
  with pytest.raises(ConfigError, match="more memory than a device has .Out of memory"):
    with reported(built, lambda: None):
      raise jax.errors.JaxRuntimeError(word)
  printed = capsys.readouterr().out
  assert "it does not fit: Out of memory while trying to allocate 34.5G." in printed
  assert "parameters 0." in printed
  made = json.loads((tmp_path / "report.json").read_text())
  assert not made["fits"] and made["memory"]["peak"] == int(34.5 * 2**30)
  with pytest.raises(jax.errors.JaxRuntimeError, match="another"), reported(built, lambda: None):
    raise jax.errors.JaxRuntimeError("INTERNAL: another")


def test_memory_over_time_is_drawn_up_to_its_peak(seen):
  page = (seen[0] / "report.html").read_text()
  (outline,) = re.findall(r"<polygon points='([^']*)'", page)
  heights = [float(point.split(",")[1]) for point in outline.split()]
  (peak,) = re.findall(r"<circle cx='[\d.]+' cy='([\d.]+)'", page)
  assert len(heights) == plot.BINS + 2 and min(heights) == float(peak)


def test_a_part_of_the_time_has_the_most_of_its_moments():
  moments = [(0, 1), (1, 5), (1.5, 2), (plot.BINS - 0.5, 3), (plot.BINS, 7)]
  found = plot.binned(moments)
  assert found[:3] == [1, 5, 2] and set(found[3:-1]) == {2} and found[-1] == 7


@pytest.mark.parametrize(
  "flag, problem",
  [
    ("--xla_foo=1", "this compiler has no such option"),
    ("--xla_cpu_use_fusion_emitters=abc", "this option cannot take the value"),
  ],
)
def test_an_option_that_the_compiler_does_not_take_is_refused_in_one_line(flag, problem):
  built = alone(f"compile_xla_flags={flag}")
  with pytest.raises(ConfigError, match=f"^compile_xla_flags: {flag}: {problem}") as error:
    executable.compile_step(built, built.traced.lower())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["compiled_trainstep_file", "report_file"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled(key, tmp_path):
  load = lambda path: compiling.load([*KEYS, "compile_topology=cpu-8", f"{key}={path}"])
  with pytest.raises(ConfigError, match=f"{key}: .*is a folder; name a file"):
    load(tmp_path)
  with pytest.raises(ConfigError, match=f"{key}: .*there is no folder .*; make it"):
    load("/proc/x/y.json")
  load(tmp_path / "written")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "word",
  [
    "Ran out of memory on HBM, the total memory required (34.39G) exceeds available HBM (15.75G).",
    "Ran out of memory in memory space hbm. Used 34.39G of 15.75G hbm.",
  ],
)
def test_a_device_has_what_its_compiler_says_that_it_has(word):
  error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {word}")
  memory = report.exhausted(alone(), error, 0.0).memory
  assert (memory.chip, memory.peak) == (int(15.75 * 2**30), round(34.39 * 2**30))


ROOMY = "base_emb_dim=256 base_mlp_dim=1024 max_target_length=1024 per_device_batch_size=8".split()


def test_what_would_fit_names_each_choice_once_and_fewer_rows_last():
  loaded = config.load([*KEYS[:2], "vocab_size=512", *ROOMY, "remat_policy=full"], {})
  now = 400 * 2**20
  found = advice.remedies(loaded, 512, 8, dataclasses.replace(CHIPS["v5e"], memory=now), now)
  choices = [line.partition(": ")[0] for line in found]
  assert "remat_policy=full" not in " ".join(choices)
  layouts = [" ".join(re.findall(r"(?:ici|num)_\w+=\d+", choice)) for choice in choices]
  assert len(choices) == len({*choices}) and len([*filter(None, layouts)]) <= 2
  assert choices[-1] == "per_device_batch_size=4.0" and "of 1/2 of the tokens" in found[-1]
  assert advice.remedies(loaded, 512, 8, dataclasses.replace(CHIPS["v5e"], memory=1), now) == []


def test_where_nothing_would_fit_a_report_says_what_changes_that():
  made = report.Report({}, 0.0, advice=(report.NOTHING,), problem="too large")
  assert "none of the choices that were tried: fewer rows" in [*words._verdict(made)][-1]


def test_a_step_of_several_cpu_devices_is_not_kept():
  with pytest.raises(ConfigError, match="several CPU devices"):
    executable.check(program.build(config.load(KEYS, {})))
