"""Models of the Hugging Face hub as checkpoints, and checkpoints as models of the hub."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxtext import config as configs
from maxtext import program
from maxtext.adoption import adopted
from maxtext.checkpoints import hub, manifest
from maxtext.checkpoints.arrays import Array, shape_text
from maxtext.checkpoints.aside import aside, check_free
from maxtext.checkpoints.folder import read_extra
from maxtext.checkpoints.hub.family import INERT, Family
from maxtext.checkpoints.hub.model import Fitted, open_model, write_config
from maxtext.checkpoints.hub.same import difference
from maxtext.checkpoints.hub.writing import write_tensors
from maxtext.checkpoints.lookup import locate
from maxtext.checkpoints.safetensors import DTYPES
from maxtext.checkpoints.stores import NewStore, Store
from maxtext.checkpoints.tables import AHEAD, Shapes, Slot, slots
from maxtext.config import Config
from maxtext.data.huggingface import CONFIG as TOKENIZER_CONFIG
from maxtext.data.huggingface import GENERATION
from maxtext.data.kinds import KINDS
from maxtext.data.tokenizers import Tokenizer
from maxtext.errors import CheckpointError, ConfigError, DataError
from maxtext.log import log
from maxtext.specs import DecoderSpec

HUB = "hub"  # what a converted checkpoint holds beside its parameters: the config.json it had
TENSORS = "tensors"  # and the dtype that each of its tensors had
KEPT = INERT - {"dtype", "transformers_version", "_sliding_window_pattern", "_name_or_path"}
SHARD = 5 * 10**9  # bytes of a file of tensors
TOKENIZER = (  # files that are carried along as they are
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer.tiktoken",
  TOKENIZER_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  GENERATION,
)


def from_hf(source: str | Path, out: str | Path, words: Sequence[str] = ()) -> None:
  """Make a run's folder `out` of a model of the hub, with a checkpoint of step 0.

  `words` are key=value of its configuration. The host holds a tensor at a time. Raises UserError,
  and then leaves nothing behind.
  """
  check_free(out := Path(out).expanduser().absolute())
  model = open_model(source)
  config = adopted(model.path, words, str(model.dtype), out)
  spec = config.decoder()
  declared = program.plan(config, spec).declared
  fitted = model.fitted({path: each.shape for path, each in declared.items()}, program.stages(spec))
  arrays = [
    _array(("params", path), each.shape, np.dtype(each.dtype)) for path, each in declared.items()
  ]
  arrays.append(_array(("step",), (), np.dtype(np.int32)))
  chunks = {f"params/{path}": each for path, each in _chunks(slot for slot, _ in fitted).items()}
  with aside(out) as folder:
    step = folder / "checkpoints" / "0"
    store = NewStore(step, arrays, chunks)
    for slot, tensor in fitted:
      for (path, index, _), piece in zip(slot.parts, slot.split(tensor.read()), strict=True):
        store.write(f"params/{path}", piece.astype(declared[path].dtype, copy=False), index)
    store.write("step", np.zeros((), np.int32))
    files = {"config": "config.yml", HUB: f"{HUB}.json", TENSORS: f"{TENSORS}.json"}
    for place in (folder, step):
      (place / files["config"]).write_text(config.resolved())
    (step / files[HUB]).write_text(json.dumps(dict(model.config)))
    (step / files[TENSORS]).write_text(json.dumps(_held(fitted, declared)))
    _carry(model.path, folder)
    made = manifest.write(step, 0, tuple(arrays), files)
  log.info(f"{out}: a {model.family.model_type} model, {_millions(declared.values())} parameters")
  log.info(f"{len(fitted)} tensors as {config.precision.weight_dtype}, {made.size / 1e6:.1f} MB")


def to_hf(
  checkpoint: str | Path, out: str | Path, dtype: str | None = None, shard: int = SHARD
) -> None:
  """Make a model of the hub in the folder `out` of the newest step of a run, or of one step.

  It is in `dtype` (None: as the parameters are, or after from_hf as each tensor was), in files of
  at most `shard` bytes. The host holds a tensor at a time. Raises UserError, and then leaves
  nothing behind.
  """
  check_free(out := Path(out).expanduser().absolute())
  step, held = locate(checkpoint)
  extra = read_extra(step, held)
  if "config" not in extra:
    raise CheckpointError(f"{step} has no configuration beside its parameters; it is of no run")
  config = configs.load([str(step / held.extra["config"])], {}, purpose="decode")
  arrays = {a.path.removeprefix("params/"): a for a in held.arrays if a.path.startswith("params/")}
  spec = config.decoder(arrays["embedding"].shape[0] if "embedding" in arrays else None)
  shapes = {path: each.shape for path, each in program.plan(config, spec).declared.items()}
  _check_arrays(step, arrays, shapes)
  family, written = named(config, spec, extra.get(HUB, {}).get("model_type"))
  if left := sorted(path for path in shapes if path.startswith(AHEAD)):
    if not any(entry.ours == "token_norm.scale" for entry in family.table):
      log.info(f"{len(left)} parameters of multi-token prediction have no name there; left out")
      shapes = {path: shape for path, shape in shapes.items() if path not in left}
  wanted = _slots(family, shapes, program.stages(spec))
  kind = np.dtype(DTYPES["F32"] if dtype is None else _dtype(dtype))
  if dtype is None:
    kind = np.result_type(*(_dtype(array.dtype) for array in arrays.values()))
  before = extra.get(TENSORS, {}) if dtype is None else {}
  kinds = {s.name: DTYPES[before[s.name]] if s.name in before else kind for s in wanted}
  kind = _usual(wanted, kinds)
  folder = step.parent.parent if step.parent.name == "checkpoints" else step
  store = Store(step)
  with aside(out) as building:
    read = lambda path, index: store.read(arrays[path], index)
    size = write_tensors(building, wanted, read, kinds, shard)
    _carry(folder, building)
    ids = _special(config, folder, extra.get(HUB, {}), building)
    rest = {key: v for key, v in extra.get(HUB, {}).items() if key in KEPT}
    write_config(building, {**rest, **written, **ids, "torch_dtype": str(kind)})
  log.info(f"{out}: {step} as a {family.model_type} model of {family.architecture}")
  log.info(f"{len(wanted)} tensors as {kind}, {size / 1e6:.1f} MB")


def named(
  config: Config, spec: DecoderSpec, kind: str | None = None
) -> tuple[Family, dict[str, Any]]:
  """The family of the hub that computes this, rather one of model_type `kind`; its config.json.

  What is written is read again, and has to be the same model. Raises CheckpointError.
  """
  architecture = config.architecture
  keys = vars(architecture) | architecture.sizes() | architecture.rotary()
  keys["vocab_size"] = spec.vocab
  keys["max_position_embeddings"] = (
    architecture.max_position_embeddings or config.training.max_target_length
  )
  plain = dataclasses.replace(
    config, architecture=dataclasses.replace(architecture, dropout_rate=0, mtp_num_layers=0)
  )
  wanted, reasons = plain.decoder(spec.vocab), []
  for family in hub.families(architecture.decoder_block, kind):
    try:
      written = family.config(keys)
      reason = difference(wanted, _read_again(written))
    except (CheckpointError, ConfigError, KeyError) as error:
      reason = str(error).splitlines()[0]
    if reason is None:
      return family, written
    reasons.append(f"as {family.model_type}, {reason}")
  raise CheckpointError(f"the hub has no family that computes this: {reasons[0]}")


def _read_again(written: dict[str, Any]) -> DecoderSpec:
  """What a config.json describes. Raises CheckpointError or ConfigError."""
  words = ["dataset_type=synthetic", "max_target_length=1"]
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / hub.CONFIG).write_text(json.dumps(written))
    return configs.load(words, {}, purpose="decode", model=Path(folder)).decoder()


def _held(fitted: Sequence[Fitted], declared: Mapping[str, Any]) -> dict[str, str]:
  """The dtypes of tensors, by their names, whose values the parameters hold as they are."""
  exact = lambda slot, kind: np.can_cast(kind, np.dtype(declared[slot.parts[0][0]].dtype))
  return {slot.name: tensor.kind for slot, tensor in fitted if exact(slot, tensor.dtype)}


def _usual(wanted: Sequence[Slot], kinds: Mapping[str, np.dtype]) -> np.dtype:
  """The dtype of most numbers."""
  counts = dict.fromkeys(kinds.values(), 0)
  for slot in wanted:
    counts[kinds[slot.name]] += math.prod(slot.shape)
  return max(counts, key=lambda kind: counts[kind])


def _slots(family: Family, shapes: Shapes, stages: Sequence[tuple[int, int]]) -> list[Slot]:
  try:
    return slots(family.table, shapes, stages)
  except KeyError as error:
    problem = f"the parameter {error.args[0]} has no name in a {family.model_type} model"
    raise CheckpointError(problem) from None


def _check_arrays(step: Path, arrays: dict[str, Array], shapes: Shapes) -> None:
  """Whether a checkpoint has the parameters that its configuration says. Raises CheckpointError."""
  for path in sorted(shapes.keys() | arrays.keys()):
    here = shape_text(shapes[path]) if path in shapes else "not there"
    there = shape_text(arrays[path].shape) if path in arrays else "not there"
    if here != there:
      raise CheckpointError(f"{step}: {path} is {there}, and {here} by its configuration")


def _special(
  config: Config, folder: Path, before: dict[str, Any], out: Path
) -> dict[str, int | list[int]]:
  """The ids of special tokens, of what the model was or else of the run's tokenizer, which are also
  put where nothing says how texts are generated.
  """
  roles = ("bos", "eos", "pad")
  ids = {f"{role}_token_id": before.get(f"{role}_token_id") for role in roles}
  tokenizer = _loaded(config, folder)
  if tokenizer is not None:
    said = {role: getattr(tokenizer, role) for role in roles}
    ids |= {f"{role}_token_id": id for role, id in said.items() if id is not None}
    _name_class(out)
  found = {name: id for name, id in ids.items() if id is not None}
  if not (out / GENERATION).is_file():
    (out / GENERATION).write_text(json.dumps(found, indent=2) + "\n")
  return found


def _name_class(folder: Path) -> None:
  """Say that a tokenizer is all in its tokenizer.json, where no class of transformers is named."""
  file = folder / TOKENIZER_CONFIG
  told = json.loads(file.read_text()) if file.is_file() else {}
  if (folder / "tokenizer.json").is_file() and "tokenizer_class" not in told:
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(told, indent=2) + "\n")


def _loaded(config: Config, folder: Path) -> Tokenizer | None:
  kind = KINDS.get(config.data.tokenizer_type)
  if kind is None or not (folder / kind.file).is_file():
    return None
  try:
    return kind.load(str(folder / kind.file))
  except DataError as error:
    log.warning(f"{error}: its special tokens are not in what was written")
    return None


def _carry(source: Path, out: Path) -> None:
  for name in TOKENIZER:
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)


def _chunks(wanted: Iterator[Slot]) -> dict[str, tuple[int, ...]]:
  """How the parameters are written: each piece that a tensor has of it is a chunk."""
  chunks = {}
  for slot in wanted:
    for path, index, shape in slot.parts:
      leading = 0 if index is None else len(index) if isinstance(index, tuple) else 1
      chunks[path] = (1,) * leading + shape
  return chunks


def _array(keys: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype) -> Array:
  layout = f"[{' '.join('-' * len(shape))}]"
  return Array("/".join(keys), shape, str(dtype), layout, ".".join(keys))


def _dtype(name: str) -> np.dtype:
  known = {str(dtype): dtype for dtype in DTYPES.values()}
  if name not in known:
    raise CheckpointError(f"dtype {name!r} is none of {', '.join(known)}")
  return known[name]


def _millions(declared: Any) -> str:
  return f"{sum(math.prod(each.shape) for each in declared) / 1e6:.1f} M"
