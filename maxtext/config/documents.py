"""YAML as a tree of text that knows its lines, and where configuration files are looked for.

Scalars stay the text that was written: what a value means is decided where its type is known, so
that `run_name: 007` remains 007, `progress_bar: on` remains on, and `1e-4` is a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

Complain = Callable[[int, str], None]  # (line, problem)

LARGEST = 1 << 20  # bytes; no configuration is larger, and a wrong file often is

_inside = Path(__file__).parents[1] / "configs"  # of an installed package
PACKAGED = _inside if _inside.is_dir() else Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True)
class Node:
  """A text, a list or a mapping. `origin` is the key whose value a `${key}` was replaced by."""

  value: str | list[Node] | dict[str, Node]
  line: int = 0
  quoted: bool = False
  origin: str = ""

  @property
  def null(self) -> bool:
    return not self.quoted and self.value in ("", "~", "null", "Null", "NULL")

  @property
  def entries(self) -> dict[str, Node]:
    """What a mapping maps; nothing where it is none."""
    return self.value if isinstance(self.value, dict) else {}

  @property
  def kind(self) -> str:
    return {str: "text", list: "a list", dict: "a mapping"}[type(self.value)]

  def under(self, over: Node) -> Node:
    """`over` on top of this: mappings merge, all else replaces."""
    if not isinstance(self.value, dict) or not isinstance(over.value, dict):
      return over
    entries = dict(self.value)
    for name, node in over.value.items():
      entries[name] = entries[name].under(node) if name in entries else node
    return dataclasses.replace(over, value=entries)

  def on_line(self, line: int) -> Node:
    """The same tree, all of it on one line."""
    value = self.value
    if isinstance(value, dict):
      value = {name: node.on_line(line) for name, node in value.items()}
    elif isinstance(value, list):
      value = [node.on_line(line) for node in value]
    return dataclasses.replace(self, value=value, line=line)


EMPTY = Node({})


def parse(text: str, complain: Complain) -> Node:
  """The tree of one YAML document; what cannot be read goes to `complain`."""
  try:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return EMPTY if root is None else _Tree(complain).node(root)
  except yaml.MarkedYAMLError as e:
    mark = e.problem_mark or e.context_mark
    problem = e.problem or "it cannot be read"
    if problem.startswith("but"):
      problem = f"{e.context} {problem}"
    complain(mark.line + 1 if mark else 0, f"not YAML: {problem}; {_advice(problem)}")
  except yaml.YAMLError as e:
    reason = getattr(e, "reason", str(e))
    complain(0, f"not YAML: {reason}; a configuration is plain text")
  except _Alias as e:
    complain(e.args[0], "a list or mapping is repeated by an alias (*name); write it out")
  except RecursionError:
    complain(0, "not a configuration: lists or mappings are nested too deeply; one level is enough")
  return EMPTY


def read(path: Path, complain: Complain) -> Node:
  """The tree of a file, whose top is a mapping."""
  try:
    with open(path, "rb") as file:
      data = file.read(LARGEST + 1)
  except IsADirectoryError:
    complain(0, "is a folder; name a file in it, as config.yml")
    return EMPTY
  except (OSError, ValueError) as e:
    complain(
      0, f"cannot be read: {getattr(e, 'strerror', None) or e}; check the path and its permissions"
    )
    return EMPTY
  if len(data) > LARGEST:
    complain(0, "is larger than 1 MB, no configuration is; check the path")
    return EMPTY
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as e:
    complain(0, f"is not UTF-8 text (byte {e.start}); a configuration is a YAML text file")
    return EMPTY
  root = parse(text, complain)
  if not isinstance(root.value, dict):
    complain(root.line, f"the file holds {root.kind}; it must hold lines of `key: value`")
    return EMPTY
  return root


class _Alias(Exception):
  """A list or mapping occurs a second time, on this line."""


@dataclasses.dataclass
class _Tree:
  """From PyYAML's nodes to ours; refuses what a configuration has no use for."""

  complain: Complain
  seen: set[int] = dataclasses.field(default_factory=set)

  def node(self, node: yaml.Node, line: int = 0) -> Node:
    line = line or node.start_mark.line + 1
    if not re.match(r"tag:yaml\.org,2002:(?!python)", node.tag):
      tag = node.tag.replace("tag:yaml.org,2002:", "!!")
      self.complain(line, f"the tag {tag[:60]!r} means nothing here; leave it away")
    if isinstance(node, yaml.ScalarNode):
      return Node(node.value, line, quoted=node.style is not None)
    if id(node) in self.seen:
      raise _Alias(line)
    self.seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
      return Node([self.node(item) for item in node.value], line)
    return Node(self.mapping(node), line)

  def mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    for key, value in node.value:
      line = key.start_mark.line + 1
      if not isinstance(key, yaml.ScalarNode):
        self.complain(
          line, "a list or mapping cannot be a key; put quotes around text that has brackets"
        )
      elif key.value in entries:
        first = entries[key.value].line
        self.complain(
          line, f"{key.value[:60]!r} stands here and on line {first} too; keep one of them"
        )
      else:
        entries[key.value] = self.node(value, line)
    return entries


def _advice(problem: str) -> str:
  if "\\t" in problem:
    return "indent with spaces, not with tabs"
  if "mapping values are not allowed" in problem:
    return "put quotes around a value that contains ': ', and check the indentation"
  if "expected a single document" in problem:
    return "keep one document, without a second ---"
  return "check indentation, brackets and quotes there"


def find(name: str, beside: Path | None = None) -> Path | None:
  """A configuration file: as typed, or `beside` the file that names it, or a packaged one.

  The last is found with or without `configs/` in front and `.yml` behind.
  """
  if not name or "\0" in name:
    return None
  return next((path for path in _places(name, beside) if _exists(path)), None)


def _places(name: str, beside: Path | None) -> Iterator[Path]:
  typed = Path(os.path.expanduser(name))
  yield typed
  if not typed.is_absolute():
    if beside:
      yield beside / typed
    inner = name.removeprefix("configs/")
    yield PACKAGED / inner
    yield PACKAGED / f"{inner}.yml"


def _exists(path: Path) -> bool:
  try:
    return path.exists()
  except OSError:  # a name too long to be one
    return False


def names(folder: str) -> list[str]:
  """What the packaged folder offers: `models` -> llama2-7b, ..."""
  return sorted(path.stem for path in (PACKAGED / folder).glob("*.yml"))


def missing(name: str) -> str:
  """Says that a configuration file is not there, with the nearest one that is."""
  if os.path.islink(os.path.expanduser(name)):
    return "is a link that leads nowhere; give the path of a YAML file"
  if name == "help":
    return "no such file; --help shows what to write"
  known = [str(path.relative_to(PACKAGED.parent)) for path in PACKAGED.rglob("*.yml")]
  known += glob.glob(os.path.join(glob.escape(os.path.dirname(name)), "*.y*ml"))
  stems = {Path(path).stem: path for path in known}  # endings would make all names alike
  near = difflib.get_close_matches(Path(name).stem, stems, n=1, cutoff=0.7)
  offer = f", did you mean {stems[near[0]]!r}?" if near else "; give the path of a YAML file"
  return f"no such file{offer}"


def shown(path: Path) -> str:
  """A path as messages spell it: from the packaged or the working folder, or its long end."""
  for root, prefix in ((PACKAGED, "configs"), (Path.cwd(), "")):
    try:
      return str(Path(prefix) / path.absolute().relative_to(root))
    except (ValueError, OSError):
      continue
  text = str(path)
  return text if len(text) <= 80 else f"...{text[-77:]}"
