"""Models of the hub become checkpoints and are again what they were, bit by bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.torch import load_file

from maxtext import config, conversion, convert
from maxtext.checkpoints import hub, safetensors
from maxtext.checkpoints.arrays import Array
from maxtext.checkpoints.convert import load_hf
from maxtext.checkpoints.hub.loading import load
from maxtext.checkpoints.hub.model import open_model
from maxtext.checkpoints.manager import Checkpoints
from maxtext.checkpoints.stores import NewStore
from maxtext.config.values import render
from maxtext.errors import CheckpointError, ConfigError
from maxtext.program import build
from tests import twins
from tests.test_families import CASES
from tests.twins import expected, random_tokens, torch, transformers

TIED = "llama, yarn, tied"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """case -> (the folder as transformers writes it, the twin)."""
  made: dict[str, tuple[Path, object]] = {}

  def save(case: str):
    if case not in made:
      model = twins.twin(*CASES[case])
      folder = tmp_path_factory.mktemp("hub") / "model"
      model.save_pretrained(folder)
      made[case] = folder, model
    return made[case]

  return save


@pytest.fixture
def model(saved, tmp_path):
  """A folder with a model of one's own to spoil."""
  return Path(shutil.copytree(saved(TIED)[0], tmp_path / "model"))


def tensors(folder: Path) -> dict[str, np.ndarray]:
  return {name: tensor.read() for name, tensor in open_model(folder).tensors.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  """To the bit."""
  kinds = lambda found: {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()}
  return kinds(a) == kinds(b)


FAST = ("llama, yarn, tied", "gemma3", "phi3", "gpt2")
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FAST]


@pytest.mark.parametrize("case", [*FAST, *SLOW])
def test_every_family_comes_back_to_the_bit(saved, case, tmp_path):
  """Through the files of a checkpoint; and its config.json says the same model."""
  folder, _ = saved(case)
  conversion.from_hf(folder, tmp_path / "run")
  conversion.to_hf(tmp_path / "run", tmp_path / "back")
  assert same(tensors(tmp_path / "back"), tensors(folder))
  there, back = open_model(folder), open_model(tmp_path / "back")
  assert back.family is there.family and there.keys.items() <= back.keys.items()
  assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "back").iterdir())


def test_transformers_takes_the_fields_that_are_written_for_llama4():
  """It wants whole numbers where our keys have fractions."""
  described = twins.plain(twins.configuration(*CASES["llama4"]))
  keys = hub.keys(described) | {"max_target_length": 8, "dataset_type": "synthetic"}
  loaded = config.load([f"{key}={render(v)}" for key, v in keys.items()], {}, purpose="decode")
  _, written = conversion.named(loaded, loaded.decoder())
  opened = transformers.Llama4TextConfig(**written)
  assert opened.floor_scale == described["floor_scale"]


def test_each_tensor_comes_back_in_the_dtype_it_had(model, tmp_path):
  """As a router's bias in float32 beside weights in bfloat16; transformers reads them too."""
  wide = {"model.norm.weight": np.float32, "model.layers.1.mlp.up_proj.weight": np.float16}
  held = {n: x.astype(wide.get(n, ml_dtypes.bfloat16)) for n, x in tensors(model).items()}
  rewrite(model, dict(sorted(held.items(), key=lambda pair: -pair[1].itemsize)))
  conversion.from_hf(model, tmp_path / "run")
  conversion.to_hf(tmp_path / "run", tmp_path / "back")
  assert same(tensors(tmp_path / "back"), held)
  assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  read = load_file(tmp_path / "back" / "model.safetensors")
  assert {name: x.shape for name, x in read.items()} == {n: x.shape for n, x in held.items()}
  conversion.from_hf(model, tmp_path / "rounded", ["weight_dtype=bfloat16"])
  conversion.to_hf(tmp_path / "rounded", tmp_path / "less")
  assert {x.dtype for x in tensors(tmp_path / "less").values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_dtype_in_many_files_comes_back(saved, dtype, tmp_path):
  """And transformers opens what is written, every tensor in its place."""
  _, twin = saved(TIED)
  kind = getattr(torch, dtype)
  half = transformers.AutoModelForCausalLM.from_config(twin.config).to(kind)
  half.save_pretrained(tmp_path / "hub", max_shard_size="60KB")
  assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
  conversion.from_hf(tmp_path / "hub", tmp_path / "run")
  conversion.to_hf(tmp_path / "run", tmp_path / "back", dtype, shard=100_000)
  assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
  assert same(tensors(tmp_path / "back"), tensors(tmp_path / "hub"))
  opened, found = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "back", output_loading_info=True, dtype="auto"
  )
  assert opened.dtype == kind and not found["missing_keys"] and not found["unexpected_keys"]
  for name, value in half.state_dict().items():
    assert torch.equal(value, opened.state_dict()[name]), name


def test_of_a_model_that_sees_images_the_text_part_is_read(tmp_path):
  name, settings = CASES["gemma3"]
  text = twins.configuration(name, settings)
  vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
  vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
  both = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision)
  twin = transformers.Gemma3ForConditionalGeneration(both)
  twin.save_pretrained(tmp_path / "hub")
  conversion.from_hf(tmp_path / "hub", tmp_path / "run")
  conversion.to_hf(tmp_path / "run", tmp_path / "back")
  found, told = tensors(tmp_path / "back"), open_model(tmp_path / "back").keys
  assert told == hub.keys(twins.plain(text))
  for part, value in twin.model.language_model.state_dict().items():
    np.testing.assert_array_equal(found.pop(f"model.{part}"), value.numpy())
  assert not found


def test_stock_orbax_reads_what_is_converted(saved, tmp_path):
  folder, twin = saved(TIED)
  conversion.from_hf(folder, tmp_path / "run")
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.restore(tmp_path / "run" / "checkpoints" / "0" / "state")
  there = twin.state_dict()["model.embed_tokens.weight"].numpy()
  np.testing.assert_array_equal(np.asarray(tree["params"]["embedding"]), there)
  assert tree["step"] == 0


@pytest.mark.parametrize(
  "case",
  [
    "gemma3",
    *(pytest.param(c, marks=pytest.mark.slow) for c in (TIED, "gemma2", "gpt2", "qwen3_next")),
  ],
)
def test_a_loaded_model_computes_and_decodes_as_its_twin(saved, case):
  """Windows are shorter than the text, which a cache goes through token by token."""
  folder, twin = saved(case)
  model = load_hf(str(folder), dtype="float32")
  tokens = random_tokens(length=7)
  twins.assert_equal(np.asarray(model(tokens)), expected(twin, tokens))
  found = twin.generate(
    torch.tensor(tokens), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
  )
  assert model.generate(tokens, 30) == found[:, 7:].tolist()


def test_positions_count_in_each_segment_if_nothing_says_otherwise(saved):
  folder, twin = saved(TIED)
  model, tokens = load_hf(str(folder)), random_tokens(length=12)
  segments = np.array([[1] * 5 + [2] * 7, [0] * 3 + [1] * 9])
  found = np.asarray(model(jax.numpy.asarray(tokens), segments=segments))
  for row, begin, end in ((0, 0, 5), (0, 5, 12), (1, 3, 12)):
    right = expected(twin, tokens[row : row + 1, begin:end])
    twins.assert_equal(found[row : row + 1, begin:end], right)


def spoil_missing(folder: Path) -> None:
  held = tensors(folder)
  held.pop("model.layers.2.mlp.up_proj.weight")
  rewrite(folder, held)


def spoil_extra(folder: Path) -> None:
  rewrite(folder, {**tensors(folder), "model.layers.0.rel.weight": np.zeros((2, 2), np.float32)})


def spoil_shape(folder: Path) -> None:
  rewrite(folder, {**tensors(folder), "model.norm.weight": np.zeros(47, np.float32)})


def spoil_head(folder: Path) -> None:
  rewrite(folder, {**tensors(folder), "lm_head.weight": np.zeros((96, 48), np.float32)})


def spoil_end(folder: Path) -> None:
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-5])


def spoil_header(folder: Path) -> None:
  (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")


def spoil_weights(folder: Path) -> None:
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_index(folder: Path) -> None:
  places = dict.fromkeys(tensors(folder), "model.safetensors") | {"model.norm.weight": 3}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def spoil_dtype(folder: Path) -> None:
  file = folder / "model.safetensors"
  held = file.read_bytes()
  assert held.count(b'"dtype":"F32"') > 9
  length = int.from_bytes(held[:8], "little")
  header = json.loads(held[8 : 8 + length])
  header["model.norm.weight"]["dtype"] = "F8_E4M3"
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + held[8 + length :])


def spoil_config(**fields: object):
  def spoil(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

  return spoil


def rewrite(folder: Path, held: dict[str, np.ndarray]) -> None:
  shapes = {name: array.shape for name, array in held.items()}
  dtypes = {name: array.dtype for name, array in held.items()}
  safetensors.write(folder / "model.safetensors", shapes, dtypes, held.values())


@pytest.mark.parametrize(
  "spoil, words",
  [
    (spoil_missing, r"model.layers.2.mlp.up_proj.weight \[80 48\] is missing; 1 of 38 tensors"),
    (spoil_extra, "model.layers.0.rel.weight is of no use to a llama model"),
    (spoil_shape, r"model.norm.weight has shape \[47\], and \[48\] by config.json"),
    (spoil_head, "lm_head.weight differs from model.embed_tokens.weight"),
    (spoil_end, "model.safetensors is truncated: it has"),
    (spoil_header, "its header is not whole"),
    (spoil_weights, "has pytorch_model.bin, which is not read"),
    (spoil_dtype, "model.norm.weight is F8_E4M3, and only F64, F32, F16, BF16 are read"),
    (spoil_config(model_type="mamba"), "model_type 'mamba' is not known"),
    (spoil_config(rope_parameters={"rope_type": "axial"}), "rope_type 'axial' is none of"),
    (spoil_config(hidden_size=None), "hidden_size is missing"),
    (spoil_config(quantization_config={"quant_method": "fp8"}), r"quantization_config \(fp8\)"),
    (spoil_config(model_type=["llama"]), r"model_type \['llama'\] is no name"),
    (spoil_index, "model.norm.weight has 3, which names no file"),
  ],
)
def test_what_is_wrong_with_a_model_is_named_and_nothing_stays(model, spoil, words, tmp_path):
  spoil(model)
  with pytest.raises(CheckpointError, match=words):
    conversion.from_hf(model, tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_fails_on_the_way_leaves_nothing_behind(model, tmp_path, monkeypatch):
  """A disk that is full, in the middle of it, both ways."""
  conversion.from_hf(model, tmp_path / "run")

  def full(*_: object) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(conversion, "_carry", full)
  for convert_it, source in ((conversion.from_hf, model), (conversion.to_hf, tmp_path / "run")):
    with pytest.raises(CheckpointError, match="out cannot be written: No space left on device"):
      convert_it(source, tmp_path / "out")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_what_tensorstore_cannot_write_is_said_in_the_systems_words(tmp_path, monkeypatch):
  """With a limit of a file's size in place of a full disk."""
  store = NewStore(tmp_path, [Array("params/a", (4096,), "float32", "", "params.a")], {})
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      store.write("params/a", np.ones(4096, np.float32))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


STOPPED = """
import os, sys, time
from maxtext import conversion, convert

number = int(sys.argv.pop())

class Asked:
  def __del__(self):  # where an exception would be lost
    os.kill(os.getpid(), number)
    time.sleep(60)

conversion._carry = lambda *_: Asked() and None
convert.cli()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_stopped_leaves_nothing_behind(model, tmp_path, number):
  out = str(tmp_path / "out")
  command = [sys.executable, "-c", STOPPED, "from_hf", str(model), out, str(int(number))]
  run = subprocess.run(command, capture_output=True, text=True, timeout=50)
  assert run.returncode == 128 + number and "Traceback" not in run.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_in_it_is_not_written_to(model, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("mine")
  with pytest.raises(ConfigError, match="out exists; name a folder that does not, or is empty"):
    conversion.from_hf(model, tmp_path / "out")
  assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_the_command_line_says_what_it_is_not_given(model, tmp_path):
  for argv, words in (
    (["form_hf", "a", "b"], "no such command, did you mean 'from_hf'"),
    (["from_hf", str(model)], "give HF_DIR and OUT"),
    (["to_hf", "a", "b", "dtype=int8"], "'int8' is none of float32"),
    (["to_hf", "a", "b", "max_shard_size=5"], "'5' is no size"),
    (["to_hf", "a", "b", "debug=maybe"], "debug: 'maybe' is not true or false"),
    (["to_hf", "a", "b", "dtype=float32", "dtype=float16"], "give each option once"),
    (["to_hf", "a", "b", "dtyp=float32"], "'dtyp' is no option, did you mean 'dtype'"),
  ):
    with pytest.raises(ConfigError, match=words):
      convert.main(argv)


def test_processes_end_with_the_codes_of_the_contract(model, tmp_path):
  def run(*argv: object) -> tuple[int, str]:
    done = subprocess.run(
      [sys.executable, "-m", "maxtext.convert", *map(str, argv)], capture_output=True, text=True
    )
    return done.returncode, done.stderr

  out = tmp_path / "run"
  assert run("from_hf", model, out, "base_emb_dim=64")[0] == 2
  spoil_end(model)
  code, said = run("from_hf", model, out)
  assert code == 4 and "truncated" in said and said.count("\n") == 1
  assert not out.exists()


def test_an_architecture_of_its_own_is_refused_with_both_values(model):
  words = f"load_parameters_path={model}"
  loaded = config.load([words, "dataset_type=synthetic", "base_emb_dim=48"])
  assert loaded.architecture.base_emb_dim == 48 and loaded.architecture.rope_type == "yarn"
  with pytest.raises(ConfigError, match="base_emb_dim: '64' here, but 48 in .*config.json"):
    config.load([words, "dataset_type=synthetic", "base_emb_dim=64"])
  with pytest.raises(ConfigError, match="base_emb_dim: '2048' here, but 48 in .*config.json"):
    config.load([words, "dataset_type=synthetic", "model_name=smollm2-1.7b"])


def test_a_model_is_born_split_over_devices(model):
  """As it is on one, in the dtype that is asked for."""
  settings = ["dataset_type=synthetic", "max_target_length=64", "per_device_batch_size=1"]
  words = [f"load_parameters_path={model}", *settings, "weight_dtype=bfloat16"]
  layouts = (["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"], ["ici_fsdp_parallelism=1"])
  found = []
  for sizes, count in zip(layouts, (8, 1), strict=True):
    program = build(config.load([*words, *sizes], {}), jax.devices()[:count])
    params = load(open_model(model), program.state.params, program.stages)
    assert {p: x.sharding for p, x in params.items()} == program.shardings.params
    found.append({path: np.asarray(value) for path, value in params.items()})
  assert found[0]["embedding"].dtype == ml_dtypes.bfloat16 and same(*found)


def test_a_trained_state_is_written_whatever_mesh_and_files_it_has(model, tmp_path):
  """Saved on eight devices by Orbax, in one database."""
  settings = ["dataset_type=synthetic", "max_target_length=64", "per_device_batch_size=1"]
  sizes = ["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"]
  loaded = config.load([f"load_parameters_path={model}", *settings, *sizes], {})
  program = build(loaded, jax.devices())
  state = program.begin(load(open_model(model), program.state.params, program.stages))
  with Checkpoints(tmp_path / "run" / "checkpoints", loaded.checkpoint) as checkpoints:
    checkpoints.save(3, state, {"config": loaded.resolved()}, force=True)
  conversion.to_hf(tmp_path / "run", tmp_path / "back")
  assert same(tensors(tmp_path / "back"), tensors(model))


PEAK = """
import resource, sys
from maxtext import conversion
peaks = []
for name in ("small", "large"):
  conversion.to_hf(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name} out")
  peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_memory_of_what_is_written_of_a_run_does_not_grow_with_the_model(tmp_path):
  """Beyond a small model's, which has imported all there is: its largest tensor a few times."""
  sizes = {
    "small": "base_emb_dim=32 base_num_query_heads=2 base_num_kv_heads=2 base_mlp_dim=64",
    "large": "base_emb_dim=512 base_num_query_heads=8 base_num_kv_heads=8 base_mlp_dim=1536",
  }
  for name, keys in sizes.items():
    words = ["dataset_type=synthetic", "max_target_length=8", "vocab_size=512", "opt_type=sgd"]
    words += ["base_num_decoder_layers=24", "per_device_batch_size=1", *keys.split(" ")]
    loaded = config.load(words, {})
    state = build(loaded, jax.devices()[:1]).init()
    with Checkpoints(tmp_path / name / "checkpoints", loaded.checkpoint) as checkpoints:
      checkpoints.save(1, state, {"config": loaded.resolved()}, force=True)
  whole, largest = sum(x.nbytes for x in state.params.values()), 4 * 512 * 1536
  command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  grown = int(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
  # chunks that are kept, and buffers of the threads that read and check files
  assert whole > 300e6 and grown < 5 * largest + 64e6


def test_a_model_that_no_family_computes_is_refused(model, tmp_path):
  """Its first difference is named."""
  conversion.from_hf(model, tmp_path / "run")
  loaded = config.load([str(tmp_path / "run" / "config.yml"), "attn_logits_soft_cap=5"], {})
  with pytest.raises(CheckpointError, match="as llama, .*soft_cap is 5.0 here and None there"):
    conversion.named(loaded, loaded.decoder(96))
