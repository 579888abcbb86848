"""From a decoder block file to a DecoderSpec.

A block file gives the fields of DecoderSpec; under `blocks` named blocks, of which a later one may
say `like` an earlier one and only what differs; and the `pattern` of their names, which is cycled
over the layers; `instead` puts other blocks in the place of some. `${key}` stands for an
architecture key's value, after scaling. An optional part
with `if: false` is absent. What has a `case` is the entry that the case names, and a part of which
there are several kinds is of the `kind` it says.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from maxtext.config import documents
from maxtext.config.architecture import MADE, Architecture
from maxtext.config.documents import EMPTY, Node
from maxtext.config.values import Unfit, brief, coerce, render, shown, words
from maxtext.errors import ConfigError, closest
from maxtext.specs import BlockSpec, DecoderSpec, MtpSpec, staged

ELSEWHERE = {  # keys that take effect whatever the block file says
  "decoder_block",
  "global_parameter_scale",
  "base_num_decoder_layers",
  "layer_pattern",
  "blocks",
  "max_position_embeddings",
  "vocab_size",
}
PATTERN = ("pattern", "instead")  # which blocks the layers are
REFERENCE = re.compile(r"\$\{(.*?)\}")

# Line, path within the file, what is wrong, and the architecture key at fault, if one is.
Problem = tuple[int, str, str, str]


@dataclasses.dataclass(frozen=True)
class BlockFile:
  """A decoder block file as it is written, or what a run's own `blocks` make of it: then `path` is
  where these are.
  """

  name: str
  path: Path | str
  root: Node

  @property
  def place(self) -> str:
    """The file as messages spell it."""
    return self.path if isinstance(self.path, str) else documents.shown(self.path)

  @functools.cached_property
  def uses(self) -> set[str]:
    """The architecture keys that take effect with this block."""
    named = {key for text in _texts(self.root) for key in REFERENCE.findall(text)}
    return ELSEWHERE.union(*(MADE.get(key, {key}) for key in named))


def spec(
  file: BlockFile, sizes: Architecture, vocabulary: int
) -> tuple[DecoderSpec | None, list[Problem]]:
  """The decoder that the file describes with these sizes, or all that is wrong with it."""
  reading = _Reading(_values(sizes))
  root = dict(reading.fill(file.root).entries)
  blocks = reading.blocks(root.pop("blocks", Node({}, file.root.line)))
  names = reading.layers(root.pop("pattern", None), root.pop("instead", Node([])), sizes, blocks)
  built = [block for name in names if (block := blocks.get(name)) is not None]
  ready = {"vocab": vocabulary, "stages": staged(built) if built else ()}
  further = reading.further(root.pop("mtp", Node("0")))
  ready["mtp"] = MtpSpec(further, built[-1]) if further and built else None
  made = reading.build(DecoderSpec, Node(root), "", ready)
  return (None if reading.problems else made), reading.problems


def in_effect(file: BlockFile, sizes: Architecture) -> set[str]:
  """Of the architecture keys that the file names, those that some layer of this decoder is made
  with, or what is around the layers.
  """
  reading, around = _Reading(_values(sizes)), dict(file.root.entries)
  trees = reading.trees(around.pop("blocks", EMPTY))
  parts = (reading.fill(around[name]) if name in around else None for name in PATTERN)
  written, instead = parts
  names = reading.layers(written, instead or Node([]), sizes, trees)
  if reading.problems:  # which say what is wrong
    return file.uses
  texts = [*_texts(Node(around))]
  texts += [text for name in {*names} for text in _texts(trees[name])]
  made = dict(MADE)
  if sizes.base_moe_mlp_dim is not None:
    del made["base_moe_mlp_dim"]
  return {
    key for text in texts for each in REFERENCE.findall(text) for key in made.get(each, (each,))
  }


def _values(sizes: Architecture) -> dict[str, Any]:
  hidden = ELSEWHERE - {"base_num_decoder_layers"}
  values = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(sizes)}
  values |= sizes.sizes() | sizes.rotary() | sizes.latent() | sizes.routing()
  return {key: value for key, value in values.items() if key not in hidden}


def _texts(node: Node) -> Iterator[str]:
  if isinstance(node.value, str):
    yield node.value
  else:
    for item in node.value.values() if isinstance(node.value, dict) else node.value:
      yield from _texts(item)


@dataclasses.dataclass
class _Reading:
  """One pass over a block file; `problems` gathers what is wrong."""

  values: Mapping[str, Any]
  problems: list[Problem] = dataclasses.field(default_factory=list)
  wrong: int = 0  # values that could not be read, whether or not there was more to say of them

  def fill(self, node: Node) -> Node:
    """The tree with each `${key}` replaced by its value."""
    if isinstance(node.value, dict):
      return dataclasses.replace(node, value={k: self.fill(v) for k, v in node.value.items()})
    if isinstance(node.value, list):
      return dataclasses.replace(node, value=[self.fill(item) for item in node.value])
    if (key := REFERENCE.fullmatch(node.value)) and key[1] in self.values:
      return _filled(self.values[key[1]], node.line, MADE.get(key[1], (key[1],))[0])
    for name in REFERENCE.findall(node.value):
      if name in self.values:
        self._add(node, brief(node.value), "must stand alone; write only ${" + name + "}")
      else:
        self._add(node, brief(node.value), f"no such architecture key{closest(name, self.values)}")
    return node

  def blocks(self, node: Node) -> dict[str, BlockSpec | None]:
    """Each named block, built once; None for one with problems."""
    built = {
      name: self.build(BlockSpec, tree, f"blocks.{brief(name)}")
      for name, tree in self.trees(node).items()
    }
    return {name: built.get(name) for name in node.entries}

  def trees(self, node: Node) -> dict[str, Node]:
    """What each named block consists of, with what it has from the one it is like."""
    if not isinstance(node.value, dict) or not node.value:
      self._add(node, "blocks", "is missing; name each block and what it consists of")
      return {}
    trees: dict[str, Node] = {}
    for name, tree in node.value.items():
      entries = dict(tree.entries)
      if like := entries.pop("like", None):
        tree = dataclasses.replace(tree, value=entries)
        if isinstance(like.value, str) and like.value in trees:
          tree = trees[like.value].under(tree)
        else:
          near = closest(str(like.value), trees)
          self._add(
            like, f"blocks.{brief(name)}.like", f"{shown(str(like.value))}: no earlier block{near}"
          )
          continue
      trees[name] = tree
    return trees

  def layers(
    self, written: Node | None, instead: Node, sizes: Architecture, blocks: Mapping[str, Any]
  ) -> list[str]:
    """The name of every layer's block, given the file's pattern and the changes of it."""
    own = sizes.layer_pattern
    node = _filled(own, written.line if written else 0, "layer_pattern") if own else written
    pattern, count = self.pattern(node, blocks), sizes.sizes()["base_num_decoder_layers"]
    names = [pattern[i % len(pattern)] for i in range(count)] if pattern else []
    return names if own else self.exchanged(names, instead, blocks)

  def pattern(self, node: Node | None, blocks: Mapping[str, Any]) -> list[str]:
    """The names of one cycle; a file with one block needs none."""
    if not blocks or (node is None and len(blocks) == 1):
      return list(blocks)
    try:
      names = coerce(tuple[str, ...], node or EMPTY)
    except Unfit:
      names = ()
    if not names:
      self._add(
        node or EMPTY, "pattern", "is missing; write the blocks' names in order, as [local, global]"
      )
    for name in names:
      if name not in blocks:
        self._add(node or EMPTY, "pattern", f"{shown(name)}: no such block{closest(name, blocks)}")
    return list(names)

  def exchanged(self, names: list[str], changes: Node, blocks: Mapping[str, Any]) -> list[str]:
    """The layers' names after every change: `{every: 4, a: b}` puts b in the place of a in the last
    of every 4 layers, `{first: 4, a: b}` in the first 4; a number below 1 in none.
    """
    for change in changes.value if isinstance(changes.value, list) else [changes]:
      swap = dict(change.entries)
      ways = [way for way in ("every", "first") if way in swap]
      if len(ways) != 1:
        self._add(
          change, "instead", "is a list of changes such as {every: 4, a: b} or {first: 1, a: b}"
        )
        continue
      number = self._value(int, swap.pop(ways[0]), f"instead.{ways[0]}") or 0
      new = {name: str(node.value) for name, node in swap.items()}
      for name in sorted({*new, *new.values()} - {*blocks}):
        self._add(change, "instead", f"{shown(name)}: no such block{closest(name, blocks)}")
      layers = range(len(names))
      if ways == ["every"]:
        layers = range(number - 1, len(names), number) if number > 0 else range(0)
      else:
        layers = layers[: max(number, 0)]
      names = [new.get(name, name) if i in layers else name for i, name in enumerate(names)]
    return names

  def further(self, node: Node) -> int:
    """How many blocks, like the last layer's, predict tokens further ahead."""
    number = self._value(int, node, "mtp") or 0
    if number < 0:
      self._add(node, "mtp", f"{number} is not at least 0 (0: no multi-token prediction)")
    return max(number, 0)

  def build(
    self, cls: type, node: Node, path: str, ready: Mapping[str, Any] = types.MappingProxyType({})
  ) -> Any:
    """A `cls` from a mapping and from `ready` values; None where something is wrong."""
    if not isinstance(node.value, dict):
      self._add(node, path, f"is {node.kind}; write a mapping of its parts")
      return None
    before, hints, values = self.wrong, get_type_hints(cls), dict(ready)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in ready}
    prefix = f"{path}." if path else ""
    for name, part in node.value.items():
      if name in fields:
        values[name] = self._value(hints[name], part, prefix + name)
      else:
        offer = closest(name, fields) or f"; there are {', '.join(fields)}"
        self._add(part, prefix + brief(name), f"no such part{offer}")
    unknown = any(name not in fields for name in node.value)  # most likely the one that is missed
    for name, field in fields.items():
      if name not in values and not unknown and _required(field):
        self._add(node, prefix + name, f"is missing; write {_words(hints[name])}")
    if self.wrong > before:
      return None
    try:
      return cls(**values)
    except ConfigError as e:
      self._add(_at(node, e.where), prefix + e.where, e.problem)
      return None

  def _value(self, hint: Any, node: Node, path: str) -> Any:
    if isinstance(node.value, str) and REFERENCE.search(node.value):  # `fill` has said why
      self.wrong += 1
      return None
    if "case" in node.entries:
      chosen = self._case(node, path)
      return None if chosen is None else self._value(hint, chosen, path)
    optional = get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [a for a in get_args(hint) if a is not type(None)] if optional else [hint]
    if not dataclasses.is_dataclass(kinds[0]):
      try:
        return coerce(hint, node)
      except Unfit as e:
        self._add(node, path, str(e))
        return None
    if optional and node.null:
      return None
    if optional and "if" in node.entries:
      entries = dict(node.entries)
      if self._value(bool, entries.pop("if"), f"{path}.if") is False:
        return None
      node = dataclasses.replace(node, value=entries)
    cls = kinds[0] if len(kinds) == 1 else self._kind(kinds, node, path)
    return None if cls is None else self.build(typing.cast(type, cls), node, path)

  def _case(self, node: Node, path: str) -> Node | None:
    """The entry that `case` names."""
    entries = dict(node.entries)
    case = entries.pop("case")
    if isinstance(case.value, str) and case.value in entries:
      return entries[case.value]
    if isinstance(case.value, str) and REFERENCE.search(case.value):
      self.wrong += 1
    else:
      offer = closest(str(case.value), entries) or f"; there are {brief(', '.join(entries))}"
      self._add(case, path, f"{_named(case)}: no such case{offer}")
    return None

  def _kind(self, kinds: list[type], node: Node, path: str) -> type | None:
    """The class of which a mapping says to be."""
    known = {get_args(get_type_hints(cls)["kind"])[0]: cls for cls in kinds}
    kind = node.entries.get("kind")
    if not isinstance(node.value, dict):
      self._add(node, path, f"is {node.kind}; write a mapping of its parts")
    elif kind is None:
      self._add(node, f"{path}.kind", f"is missing; write one of {', '.join(known)}")
    elif not isinstance(kind.value, str) or kind.value not in known:
      offer = closest(str(kind.value), known) or f"; there are {', '.join(known)}"
      self._add(kind, f"{path}.kind", f"{_named(kind)}: no such kind{offer}")
    else:
      return known[kind.value]
    return None

  def _add(self, node: Node, path: str, problem: str) -> None:
    self.wrong += 1
    last = path.rpartition(".")[2]
    for line, other, *rest in self.problems:  # of a block that this one is like
      if (line, other.rpartition(".")[2], *rest) == (node.line, last, problem, node.origin):
        return
    self.problems.append((node.line, path, problem, node.origin))


def _filled(value: Any, line: int, origin: str) -> Node:
  if isinstance(value, tuple):
    return Node([_filled(item, line, origin) for item in value], line, origin=origin)
  text = value if isinstance(value, str) else render(value)
  return Node(text, line, quoted=isinstance(value, str), origin=origin)


def _named(node: Node) -> str:
  return shown(node.value) if isinstance(node.value, str) else node.kind


def _at(node: Node, where: str) -> Node:
  """The node at a dotted path below `node`, or as far along it as there is one."""
  for name in where.split("."):
    node = node.entries.get(name, node)
  return node


def _required(field: dataclasses.Field) -> bool:
  return field.default is field.default_factory is dataclasses.MISSING


def _words(hint: Any) -> str:
  return "a mapping of its parts" if dataclasses.is_dataclass(hint) else words(hint)
