"""Reads a run's configuration, and complains of all that is wrong with it at once."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxtext import hosts
from maxtext.config import arguments, checks, documents, places, sources, tokenizer
from maxtext.config.checks import Purpose
from maxtext.config.complaints import ENVIRONMENT, Complain, Complaint, Lost, lines
from maxtext.config.config import RULES, Config
from maxtext.config.decoder import BlockFile, spec
from maxtext.config.devices import on_devices
from maxtext.config.documents import EMPTY, Node
from maxtext.config.run import FORCED
from maxtext.config.sections import HINTS, SECTIONS, hint_of
from maxtext.config.sources import BASE, Setting
from maxtext.config.values import Unfit, brief, coerce, shown
from maxtext.errors import ConfigError, ConfigErrors, closest


def load(
  argv: Sequence[str],
  environ: Mapping[str, str] = os.environ,
  purpose: Purpose = "train",
  model: Path | None = None,
) -> Config:
  """The configuration of `[config.yml] [key=value ...]`, for a `model` of the Hugging Face hub if
  its folder is given; to train, load_parameters_path may name it.

  To decode, what only training reads (data, batches) need not be there. Raises ConfigErrors.
  """
  found: list[Complaint] = [*_of_flags(environ)]
  name, history = trace(argv, environ, found.append, purpose, model)
  values, failed = typed(history, found.append)
  block = _block(values, history, found.append)
  values["run_name"] = values["run_name"] or _generated_name(name)
  config = Config(**_sections(values), block=block, history=history)
  if not any(isinstance(complaint, Lost) for complaint in found):
    found += checks.settle(config, _problems(config, environ, purpose), failed)
    found += _of_devices(config, environ, purpose, failed)
  if not found:
    found += _of_block(config)
  if found:
    raise ConfigErrors(lines(found))
  return config


def trace(
  argv: Sequence[str],
  environ: Mapping[str, str],
  complain: Complain,
  purpose: Purpose = "train",
  model: Path | None = None,
) -> tuple[str | None, dict[str, tuple[Setting, ...]]]:
  """The named file, and per key every place that sets it, in ascending precedence."""
  name, settings = arguments.split(argv, complain)
  history: dict[str, tuple[Setting, ...]] = {}
  loads = purpose in ("train", "read")
  for setting in sources.gather(name, settings, environ, complain, loads, model):
    history[setting.key] = (*history.get(setting.key, ()), setting)
  return name, history


def typed(
  history: Mapping[str, tuple[Setting, ...]], complain: Complain
) -> tuple[dict[str, Any], set[str]]:
  """Each key's value, and the keys that have a wrong one somewhere."""
  failed: set[str] = set()
  read: dict[str, list[tuple[Setting, Any]]] = {}
  for key, settings in history.items():
    read[key] = []
    for setting in settings:
      try:
        read[key].append((setting, coerce(hint_of(key), setting.node)))
      except Unfit as e:
        failed.add(key)
        complain(Complaint(setting.where, setting.typed, str(e)))
  values = {key: found[-1][1] for key, found in read.items()}
  values[RULES] = _merged_rules(read[RULES], values["override_logical_axis_rules"], complain)
  return values, failed


def _merged_rules(
  read: list[tuple[Setting, dict[str, tuple[str, ...]]]], override: bool, complain: Complain
) -> dict[str, tuple[str, ...]]:
  """The rules merged by name; with `override`, what they do not name is not split."""
  known = read[0][1]
  merged: dict[str, tuple[str, ...]] = {}
  if override:
    merged = dict.fromkeys(known, ())
  for setting, rules in read:
    for name in rules:
      if name not in known:
        near = closest(name, known) or f"; there are {', '.join(known)}"
        complain(Complaint(setting.where, setting.typed, f"{shown(name)} is no logical axis{near}"))
    if setting.level != BASE or not override:
      merged |= rules
  return merged


def _block(
  values: dict[str, Any], history: Mapping[str, tuple[Setting, ...]], complain: Complain
) -> BlockFile:
  """The decoder block file; for a file of one's own, `decoder_block` becomes its whole path."""
  name, setting = values["decoder_block"], history["decoder_block"][-1]
  path, problem = _block_path(name, setting.folder)
  if path is None:
    complain(Lost(setting.where, setting.typed, problem))
    return BlockFile(name, Path(name), EMPTY)
  root = _whole(path, complain)
  own = path.parent != documents.PACKAGED / "decoder_blocks"
  values["decoder_block"] = str(path.resolve()) if own else path.stem
  if not values["blocks"]:
    return BlockFile(name, path, root)
  return _with_own_blocks(BlockFile(name, path, root), history["blocks"][-1])


def _with_own_blocks(file: BlockFile, own: Setting) -> BlockFile:
  """The file with a run's own blocks on top; all of it stands where these do."""
  place, _, line = own.where.rpartition(":")
  blocks = Node({"blocks": own.node}, own.node.line)
  if not line.isdigit():
    place, blocks = own.where, blocks.on_line(0)
  root = file.root.on_line(blocks.line).under(blocks)
  return BlockFile(file.name, place, root)


def _block_path(name: str, folder: Path | None) -> tuple[Path | None, str]:
  """Where a decoder block is, by its name or by its path from `folder`; else what is wrong."""
  known = documents.names("decoder_blocks")
  if "/" in name or name.endswith((".yml", ".yaml")):
    return documents.find(name, folder), f"{shown(name)}: {documents.missing(name)}"
  offer = f"({', '.join(known)}, or the path of a .yml file)"
  problem = f"{shown(name)} is no decoder block{closest(name, known)} {offer}"
  return documents.PACKAGED / "decoder_blocks" / f"{name}.yml" if name in known else None, problem


def _whole(path: Path, complain: Complain, after: tuple[Path, ...] = ()) -> Node:
  """A block file's tree, on top of that of the file which it is `like`; what stands there counts as
  standing on that line.
  """
  root = sources.read(path, complain)
  entries = dict(root.entries)
  if (like := entries.pop("like", None)) is None:
    return root
  root, chain = dataclasses.replace(root, value=entries), (*after, path.resolve())
  name = like.value if isinstance(like.value, str) else ""
  base, problem = _block_path(name, path.parent)
  if base is not None and base.resolve() in chain:
    base, problem = None, f"{shown(name)} is like this file itself; name another"
  if base is None:
    complain(Lost(f"{documents.shown(path)}:{like.line}", "like", problem))
    return root
  return _whole(base, complain, chain).on_line(like.line).under(root)


def _generated_name(file: str | None) -> str:
  stem = re.sub(r"[^A-Za-z0-9._+=-]+", "-", Path(file).stem if file else "run").strip("-.")
  return f"{stem[:60] or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"


def _sections(values: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: section(**{key: values[key] for key in HINTS[name]}) for name, section in SECTIONS.items()
  }


def _problems(
  config: Config, environ: Mapping[str, str], purpose: Purpose
) -> Iterator[checks.Problem]:
  for name in SECTIONS:
    section = getattr(config, name)
    if hasattr(section, "complaints"):
      yield from section.complaints()
  yield from checks.of_run(config, purpose, environ)
  yield from places.of_places(config, purpose)
  yield from tokenizer.unopened(config, purpose)


def _of_devices(
  config: Config, environ: Mapping[str, str], purpose: Purpose, failed: set[str]
) -> Iterator[Complaint]:
  """What is wrong with the environment's word on other processes, or on the devices of all."""
  try:
    place = hosts.find(environ, config.hosts, config.run.hardware)
  except ConfigError as error:
    yield Complaint(ENVIRONMENT, error.where, error.problem)
    return
  devices = config.run.known_devices(environ)
  if devices is not None and purpose in ("train", "read"):
    whole = devices * (place.count if place else 1)
    yield from checks.settle(config, on_devices(config, whole), failed)


def _of_flags(environ: Mapping[str, str]) -> Iterator[Complaint]:
  """A number of devices in XLA_FLAGS that XLA would end the process for, after a page of help."""
  for value in re.findall(rf"{FORCED}=?(\S*)", environ.get("XLA_FLAGS", "")):
    if not re.fullmatch(r"[1-9]\d{0,5}", value):
      problem = f"{brief(f'{FORCED}={value}', 90)} is not a number of devices; write {FORCED}=8"
      yield Complaint(ENVIRONMENT, "XLA_FLAGS", problem)


def _of_block(config: Config) -> Iterator[Complaint]:
  """What is wrong with the decoder block file, or with the sizes it is given."""
  block, settings = config.block, config.sources
  _, problems = spec(block, config.architecture, config.architecture.vocab_size or 1)
  for line, path, problem, key in problems:
    at = f"{block.place}:{line}" if line else block.place
    if key and settings[key].level != BASE:
      yield Complaint(settings[key].where, settings[key].typed, f"{problem} ({path}, {at})")
    else:
      yield Complaint(at, path, problem)
