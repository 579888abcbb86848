"""`python -m decode RUN_OR_CONFIG prompt="..." key=value`: text from a run's newest checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from maxtext import config as configs
from maxtext import hardware, hosts, resume
from maxtext import log as logs
from maxtext.bucket import is_url
from maxtext.checkpoints import hub
from maxtext.checkpoints.lookup import locate_with_extra
from maxtext.checkpoints.remote import copied
from maxtext.config import Config
from maxtext.data.sections import Data
from maxtext.errors import CheckpointError, ConfigError, DataError, run_cli
from maxtext.log import log

if TYPE_CHECKING:
  from maxtext.data.tokenizers import Tokenizer
  from maxtext.layers.merging import Params
  from maxtext.program import Program
  from maxtext.serve.writer import Writer

USAGE = """\
usage: python -m decode RUN_OR_CONFIG prompt="..." [key=value ...]

Continues a text with the newest checkpoint of a run. RUN_OR_CONFIG is the run's folder, its
checkpoints folder or one checkpoint in it, or a configuration that sets run_name; or the folder of
a model of the Hugging Face hub. The text goes to standard output, everything else to standard
error.
  python -m decode runs/mine prompt="Once upon a time" decode_length=100
  python -m decode runs/mine prompts_file=prompts.txt decode_sampling_strategy=nucleus decode_seed=7
  python -m maxtext.explain decode_sampling_strategy     what a key means
Ends with 0: written; 2: configuration; 3: tokenizer; 4: checkpoint."""

TOGETHER = 16  # prompts of a file that are continued at once
PICTURES = {  # control characters as signs that show them
  **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
  **{0x7F: 0x2421},
  **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def main(argv: list[str]) -> int:
  """Write as the arguments say; returns the exit code of the process. Raises UserError."""
  if not argv or {"-h", "--help"} & set(argv):
    print(USAGE)
    return 0 if argv else 2
  with logs.above(lambda line: print(line, file=sys.stderr, flush=True)):
    folder, words = _run(argv)
    adopts = folder is not None and hub.is_model(folder)
    config = _adopted(folder, words) if adopts else configs.load(words, purpose="decode")
    folder = folder or _folder(config)
    prompts = _prompts(config)
    place = hosts.find(os.environ, config.hosts, config.run.hardware)
    hardware.prepare(config.run, several=place is not None)
    if place is not None:
      logs.keep_native_off()
    logs.start(place.id if place else 0, config.run.debug)
    with hosts.joined(place, config.hosts):
      config = resume.agreed(config)
      hosts.agree({"prompts_file": json.dumps(prompts)})
      _write(config, folder, prompts)
  return 0


def cli() -> NoReturn:
  """Run as a program."""
  run_cli(main)


def _adopted(folder: Path | None, words: list[str]) -> Config:
  """The configuration of a model of the Hugging Face hub. Raises UserError."""
  from maxtext.adoption import adopted

  assert folder is not None
  return adopted(folder.absolute(), words)


def _run(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
  """The folder that is named, if one is, and the arguments with its config.yml in its place."""
  for i, word in enumerate(argv):
    folder = copied(word) if is_url(word) else Path(word).expanduser()
    if hub.is_model(folder):
      return folder, [*argv[:i], *argv[i + 1 :]]
    if folder.is_dir():
      return folder, [*argv[:i], str(_file(folder, "config.yml")), *argv[i + 1 :]]
  return None, list(argv)


def _file(folder: Path, name: str) -> Path:
  """A file of a run, seen from its folder, its checkpoints or one of them. Raises ConfigError."""
  folder = folder.absolute()
  above = {folder.name: folder.parent, folder.parent.name: folder.parent.parent}
  for place in filter(None, (folder, above.get("checkpoints"))):
    if (place / name).is_file():
      return place / name
  raise ConfigError(
    "command line", f"{folder} has no {name}; give a run's folder, as runs/NAME, or a configuration"
  )


def _folder(config: Config) -> Path:
  """The run that a configuration names. Raises ConfigError or CheckpointError."""
  run = config.run
  if not config.sources["run_name"].text:
    problem = "is not set; add run_name=NAME, or give the run's folder, as runs/NAME"
    raise ConfigError("run_name", problem)
  if is_url(run.place):
    return copied(run.place)
  folder = Path(run.place)
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: no such folder; train the run first, or name another")
  return folder


def _prompts(config: Config) -> list[str]:
  """What is to be continued. Raises ConfigError."""
  section, sources = config.decode, config.sources
  above = sources["prompt"].level > sources["prompts_file"].level  # of two, what was said last
  if not section.prompts_file or (section.prompt and above):
    if not section.prompt:
      raise ConfigError("prompt", 'is empty; give a text to continue, as prompt="Once upon a time"')
    return [section.prompt]
  try:
    text = Path(section.prompts_file).expanduser().read_text("utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    why = getattr(error, "strerror", None) or "it is not UTF-8 text"
    raise ConfigError("prompts_file", f"{section.prompts_file} cannot be read: {why}") from None
  prompts = [line for line in text.splitlines() if line.strip()]
  if not prompts:
    raise ConfigError("prompts_file", f"{section.prompts_file} is empty; write one prompt a line")
  return prompts


def _write(config: Config, folder: Path, prompts: list[str]) -> None:
  """Load the model, then print each prompt with what comes after it. Raises UserError."""
  with ThreadPoolExecutor(1) as background:
    # Every byte of a checkpoint is checked, while jax is imported.
    found = background.submit(_source, config, folder)
    from maxtext.program import build_to_decode
    from maxtext.serve.writer import Writer, chat_of

    source = found.result()
  tokenizer, vocabulary = _tokenizer(config.data, folder, source.digest)
  if chat := chat_of(tokenizer, config.decode):
    for prompt in prompts:
      chat(prompt)  # a template may refuse: before a device is asked for
  program = build_to_decode(config, vocabulary)
  writer = Writer(program, tokenizer, config.decode, config.data.add_bos)
  groups, length = _groups(prompts), config.decode.decode_length
  longest, trained = writer.check(prompts, length), _trained(config)
  with ThreadPoolExecutor(1) as background:
    compiling = background.submit(writer.compile, program.state.params, groups[0], length)
    name, params = source.read(program)
    compiling.result()
  log.info(f"{name}, on {_devices(program)}")
  if longest > trained:
    log.info(f"a text has up to {longest} tokens; the model has seen {trained} at once in training")
  begun = time.monotonic()
  count = _print(writer, params, groups, length)
  took = time.monotonic() - begun
  log.info(f"{count} tokens in {took:.1f} s, {count / took:.0f} tokens/s")


@dataclasses.dataclass(frozen=True)
class Source:
  """Where parameters come from, which `read` names; `digest` is their tokenizer's, None if nobody
  has noted it.
  """

  digest: str | None
  read: Callable[[Program], tuple[str, Params]]


def _source(config: Config, folder: Path) -> Source:
  """Of a run's newest checkpoint, or of a model of the hub. Raises CheckpointError, also where the
  checkpoint's model is not that of the configuration.
  """
  if hub.is_model(folder):
    from maxtext.checkpoints.hub.loading import load
    from maxtext.checkpoints.hub.model import open_model

    model = open_model(folder)
    name = f"the {model.family.model_type} model {folder}"
    return Source(None, lambda program: (name, load(model, program.state.params, program.stages)))
  step, manifest, saved = locate_with_extra(folder)
  from maxtext.checkpoints.manager import restore_newest

  resume.check_model(config, saved)
  digest = saved.get("data", {}).get("tokenizer")

  def read(program: Program) -> tuple[str, Params]:
    found, params = restore_newest(folder, step, manifest, program.state.params)
    return f"step {found.step - 1} of {folder}" if found.step else str(folder), params

  return Source(digest, read)


def _trained(config: Config) -> int:
  """How many tokens the model has seen at once."""
  return config.architecture.max_position_embeddings or config.training.max_target_length


def _tokenizer(data: Data, folder: Path, digest: str | None) -> tuple[Tokenizer, int]:
  """The run's tokenizer, and the vocabulary that its model has. Raises DataError.

  `digest` is the tokenizer's that the model has learned from.
  """
  from maxtext.data.corpus import open_corpus
  from maxtext.data.kinds import KINDS, given
  from maxtext.data.tokenizers import ByteTokenizer

  if data.tokenizer_type == "byte":
    return ByteTokenizer(), ByteTokenizer().vocab_size
  kind = KINDS[data.tokenizer_type]
  try:
    file = _file(folder, kind.file)
  except ConfigError:
    log.info(f"{folder} has no {kind.file}: taking the tokenizer from where training had it")
    tokenizer = given(data) or open_corpus(data).tokenizer
    if digest not in (None, tokenizer.digest):
      problem = f"its {kind.file} is gone, and its data give another tokenizer now"
      raise DataError(f"{folder}: {problem}") from None
    return tokenizer, tokenizer.vocab_size
  tokenizer = kind.load(str(file))
  if data.tokenizer_type == "bpe":  # one that was trained may have fewer tokens than asked for
    least = 0 if data.tokenizer_path else data.tokenizer_vocab_size
    return tokenizer, max(tokenizer.vocab_size, least)
  if digest not in (None, tokenizer.digest):
    problem = (
      "is not the tokenizer that the model has learned; put back the one it was trained with"
    )
    raise DataError(f"{file}: {problem}")
  return tokenizer, tokenizer.vocab_size


def _devices(program: Program) -> str:
  """`1 of 8 cpu devices`, or `8 tpu devices (fsdp 8)`."""
  import jax

  mesh, there = program.layout.mesh, jax.device_count()
  split = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  kind = f"{mesh.devices.flat[0].platform} device{'' if there == 1 else 's'}"
  count = f"{mesh.size} {kind}" if mesh.size == there else f"{mesh.size} of {there} {kind}"
  return f"{count} ({split})" if split else count


def _groups(prompts: list[str]) -> list[list[str]]:
  """At most TOGETHER prompts each, equally many, so that one compiled program does for all."""
  count = -(-len(prompts) // TOGETHER)
  size = -(-len(prompts) // count)
  return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def _print(writer: Writer, params: Params, groups: list[list[str]], length: int) -> int:
  """Print the prompts with what comes after them, a single one as it comes -> the new tokens.

  An answer, which is no continuation, has lines of its own.
  """
  between = "\n" if writer.answers else ""
  size, total = len(groups[0]), sum(map(len, groups))
  if total == 1:
    _show(groups[0][0] + between)
    _, counts = writer(params, groups[0], length, lambda _, text: _show(text))
    _show("\n")
    return counts[0]
  written = 0
  for i, group in enumerate(groups):
    filled = group + group[-1:] * (size - len(group))
    texts, counts = writer(params, filled, length, first_row=i * size)
    for row, (prompt, text) in enumerate(zip(group, texts), i * size):
      _show(f"--- {row + 1} of {total}\n{prompt}{between}{text}\n")
    written += sum(counts[: len(group)])
  return written


def _show(text: str) -> None:
  """Print on standard output at once, in the first process. On a terminal control characters are
  shown, not obeyed.
  """
  if not hosts.is_first():
    return
  out = sys.stdout
  if out.isatty():
    text = text.translate(PICTURES)
  known = out.encoding or "utf-8"
  out.write(text.encode(known, "replace").decode(known))
  out.flush()


if __name__ == "__main__":
  cli()
