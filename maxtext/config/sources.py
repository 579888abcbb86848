"""Every place that sets a key, from the lowest precedence to the highest.

base.yml < presets < base_config chain < the run's file < environment M_<KEY> < key=value.
A model of the Hugging Face hub has the architecture that its config.json says, and no other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from maxtext.checkpoints import hub
from maxtext.config import complaints, documents
from maxtext.config.complaints import Complain, Complaint, Lost
from maxtext.config.documents import EMPTY, Node
from maxtext.config.sections import SECTION_OF, SECTIONS, hint_of
from maxtext.config.values import Unfit, brief, coerce, render, shown, takes_text, written
from maxtext.errors import CheckpointError, closest

SPELLINGS = {"pattern": "layer_pattern"}  # other names that keys have
BASE, PRESET, CHAIN = 0, 1, 2  # precedence; the files of a chain count up from here
ENVIRONMENT, COMMAND_LINE = 1000, 1001
PRESETS = {  # key that names one -> the folder of its kind, and what one is called
  "model_name": ("models", "model preset"),
  "custom_mesh_and_rule": ("sharding", "set of mesh axes and rules"),
}
DEEPEST = 50  # files of a chain


@dataclasses.dataclass(frozen=True)
class Setting:
  """One place that sets a key, spelt there as `typed`; the highest `level` counts."""

  key: str
  typed: str
  where: str
  level: int
  node: Node
  folder: Path | None = None

  @property
  def text(self) -> str:
    """The value as it is written there."""
    return written(self.node)


File = tuple[Path, Node]


def gather(
  name: str | None,
  typed: Iterable[Setting],
  environ: Mapping[str, str],
  complain: Complain,
  loads: bool = True,
  model: Path | None = None,
) -> list[Setting]:
  """All settings in ascending precedence, given the run's file and what the command line sets, and
  the folder of a `model` of the Hugging Face hub, which load_parameters_path names if it `loads`.
  """
  files = _chain(name, complain) if name else []
  own = [s for i, file in enumerate(files) for s in _of_file(file, CHAIN + i, complain)]
  own = _known([*own, *_of_environment(environ), *typed], complain)
  _refuse_contradictions(own, complain)
  own = [s for key in PRESETS for s in _of_preset(key, own, complain)] + own
  model = model or (_model(own) if loads else None)
  return [*defaults(), *(_of_model(model, own, complain) if model else []), *own]


@functools.cache
def defaults() -> tuple[Setting, ...]:
  """What base.yml sets: every key."""
  path = documents.PACKAGED / "base.yml"
  return tuple(_of_file((path, read(path, _defect)), BASE, _defect))


def _defect(complaint: Complaint) -> None:
  raise AssertionError(f"base.yml itself is wrong: {complaint}")


def of_text(text: str) -> list[Setting]:
  """What the text of a run's resolved configuration sets, as far as its keys still exist."""
  root = documents.parse(text, lambda *_: None)
  file = (Path("config.yml"), root if isinstance(root.value, dict) else EMPTY)
  return _known(_of_file(file, CHAIN, lambda _: None), lambda _: None)


def value_node(key: str, text: str) -> Node:
  """A value from command line or environment: as typed, but lists and mappings are parsed."""
  key = SPELLINGS.get(key, key)
  if key in SECTION_OF and text.startswith(("[", "{")) and not takes_text(hint_of(key)):
    problems: list[str] = []
    node = documents.parse(text, lambda _, problem: problems.append(problem))
    return Node(text) if problems else node
  return Node(text, quoted=not text and key in SECTION_OF and takes_text(hint_of(key)))


def _known(settings: Iterable[Setting], complain: Complain) -> list[Setting]:
  known = []
  for setting in settings:
    key = SPELLINGS.get(setting.key, setting.key)
    if key in SECTION_OF:
      known.append(dataclasses.replace(setting, key=key))
    else:
      complain(Complaint(setting.where, brief(setting.typed), _unknown(setting)))
  return known


def _unknown(setting: Setting) -> str:
  key = setting.key
  if key == "base_config":
    return "belongs in a file; name that file, without a key, as the first argument"
  if setting.level == ENVIRONMENT:
    near = closest(setting.typed.upper(), [f"M_{k.upper()}" for k in SECTION_OF])
    return f"no such key{near}; unset it if it is not meant for this program"
  if key == "hf_access_token":
    return "a secret stands in no configuration and no log; set HF_TOKEN in the environment"
  if key in SECTIONS:
    first = next(k for k, section in SECTION_OF.items() if section == key)
    return f"is a section; set its keys one by one, as {first}=VALUE"
  near = closest(key.lower(), SECTION_OF)
  return f"no such key{near or '; `python -m maxtext.explain` lists them all'}"


def read(path: Path, complain: Complain) -> Node:
  place = documents.shown(path)

  def say(line: int, problem: str) -> None:
    complain(Lost(f"{place}:{line}" if line else place, "", problem))

  return documents.read(path, say)


def _chain(name: str, complain: Complain) -> list[File]:
  """The run's file and those its `base_config` leads to, the deepest first."""
  files: list[File] = []
  where, key, beside = complaints.COMMAND_LINE, "", None
  while name:
    path = documents.find(name, beside)
    if path is None:
      complain(Lost(where, key, f"{shown(name)}: {documents.missing(name)}"))
      break
    if any(path.resolve() == known.resolve() for known, _ in files):
      circle = " -> ".join(documents.shown(p) for p in [*(p for p, _ in files), path])
      complain(Lost(where, key, f"{brief(circle, 160)} is a circle; remove one base_config"))
      break
    if len(files) == DEEPEST:
      complain(Lost(where, key, f"leads through more than {DEEPEST} files; merge some of them"))
      break
    root = read(path, complain)
    files.append((path, root))
    node = root.entries.get("base_config", EMPTY)
    where, key, beside = f"{documents.shown(path)}:{node.line}", "base_config", path.parent
    if not isinstance(node.value, str) and node is not EMPTY:
      complain(Lost(where, key, f"is {node.kind}; name one file, which may name the next"))
    name = "" if not isinstance(node.value, str) or node.null else node.value
  return files[::-1]


def _of_file(file: File, level: int, complain: Complain) -> list[Setting]:
  """A file's settings, flat or grouped under the sections' names."""
  path, root = file
  place, settings = documents.shown(path), list[Setting]()
  first: dict[str, int] = {}

  def add(typed: str, node: Node) -> None:
    where, key = f"{place}:{node.line}", SPELLINGS.get(typed, typed)
    if key in first:
      problem = f"stands on line {first[key]} too, in and outside of its section; keep one of them"
      complain(Complaint(where, brief(typed), problem))
    else:
      first[key] = node.line
      settings.append(Setting(key, typed, where, level, node, path.parent))

  for name, node in root.entries.items():
    if name in SECTIONS and isinstance(node.value, dict):
      for key, inner in node.entries.items():
        if SECTION_OF.get(key, name) != name:
          problem = f"belongs to section {SECTION_OF[key]}, not {name}; move it there"
          complain(Complaint(f"{place}:{inner.line}", key, problem))
        else:
          add(key, inner)
    elif name in SECTIONS and not node.null:
      problem = f"is a section; write its keys below it, indented, not {node.kind}"
      complain(Complaint(f"{place}:{node.line}", name, problem))
    elif name not in SECTIONS and name != "base_config":
      add(name, node)
  return settings


def _of_environment(environ: Mapping[str, str]) -> list[Setting]:
  settings = []
  for name in sorted(n for n in environ if n.startswith("M_")):
    key = name[2:].lower() if name == name.upper() else name
    settings.append(
      Setting(key, name, complaints.ENVIRONMENT, ENVIRONMENT, value_node(key, environ[name]))
    )
  return settings


def _of_preset(key: str, own: list[Setting], complain: Complain) -> list[Setting]:
  """The settings of the preset that `key` names last, which are of one section only."""
  named = next((s for s in reversed(own) if s.key == key), None)
  if named is None or not isinstance(named.node.value, str) or named.node.null or not named.text:
    return []
  folder, what = PRESETS[key]
  name, known = named.node.value, documents.names(folder)
  if name not in known:
    offer = brief(", ".join(known), 120)
    problem = f"{shown(name)} is no {what}{closest(name, known)} (configs/{folder}: {offer})"
    complain(Lost(named.where, named.typed, problem))
    return []
  path = documents.PACKAGED / folder / f"{name}.yml"
  return _known(_of_file((path, read(path, complain)), PRESET, complain), complain)


def _model(own: list[Setting]) -> Path | None:
  """The folder of the hub's model that load_parameters_path names, if it names one."""
  named = next((s for s in reversed(own) if s.key == "load_parameters_path"), None)
  if named is None or not isinstance(named.node.value, str) or named.node.null or not named.text:
    return None
  folder = Path(named.node.value).expanduser()
  return folder if hub.is_model(folder) else None


def _of_model(folder: Path, own: list[Setting], complain: Complain) -> list[Setting]:
  """The architecture of a model, of which `own` settings may say nothing else."""
  file = folder / hub.CONFIG
  place = documents.shown(file)
  try:
    family, config = hub.described(folder)
    keys, _ = family.keys(config)
  except CheckpointError as error:
    complain(Lost(place, "", str(error).removeprefix(f"{hub.CONFIG}: ")))
    return []
  settings = {
    key: Setting(key, key, place, PRESET, value_node(key, render(value)))
    for key, value in keys.items()
  }
  for setting in own:
    there = settings.get(setting.key)
    if there is not None and not _same(there, setting):
      problem = f"{shown(setting.text)} here, but {brief(there.text)} in {place}; leave it away"
      complain(Complaint(setting.where, setting.typed, problem))
  return list(settings.values())


def _refuse_contradictions(own: list[Setting], complain: Complain) -> None:
  """One key with two values on the command line, or there and in the environment."""
  typed: dict[str, Setting] = {}
  for setting in own:
    if setting.level < ENVIRONMENT:
      continue
    other = typed.setdefault(setting.key, setting)
    if not _same(other, setting):
      there = "in the environment" if other.level == ENVIRONMENT else "on the same command line"
      problem = (
        f"{shown(setting.text)} here, but {other.typed}={brief(other.text)} {there}; remove one"
      )
      complain(Complaint(setting.where, setting.typed, problem))


def _same(a: Setting, b: Setting) -> bool:
  if a.node.value == b.node.value:
    return True
  try:
    return coerce(hint_of(a.key), a.node) == coerce(hint_of(b.key), b.node)
  except Unfit:
    return False
