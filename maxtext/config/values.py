"""From written text to typed values, by the type hint of the setting, and back."""

from __future__ import annotations

import collections.abc
import math
import re
import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from maxtext.bounds import LARGEST, Bound
from maxtext.config.documents import Node
from maxtext.errors import closest

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
FLOAT32 = 3.4e38  # the largest number that survives on the device
LEAST = 1.2e-38  # and the smallest above zero


class Unfit(Exception):
  """A value is not what its setting takes; the text says what it is and what would be right."""


def coerce(hint: Any, node: Node) -> Any:
  """The value of `node` as `hint` wants it; raises Unfit."""
  origin, args = get_origin(hint), get_args(hint)
  if node.value == "" and not node.quoted and origin is not tuple:
    _refuse_nothing(hint)
  if origin is Annotated:
    return _bounded(coerce(args[0], node), hint)
  if origin in (typing.Union, types.UnionType):
    return None if node.null else coerce(_required(hint), node)
  if origin is tuple:
    return _tuple(args[0], node)
  if origin is collections.abc.Mapping:
    return _tree_of_names(node) if args[1] is Any else _mapping(args[1], node)
  if not isinstance(node.value, str):
    raise Unfit(f"is {node.kind}; write {words(hint)}")
  if node.null and hint is str:
    _refuse_nothing(hint, node.value)
  return _scalar(hint, node.value, node.quoted)


def _refuse_nothing(hint: Any, text: str = "") -> typing.NoReturn:
  right = "'' to leave it empty" if hint is str else words(hint)
  raise Unfit(f"{f'{text} means nothing here' if text else 'has no value'}; write {right}")


def _scalar(hint: Any, text: str, quoted: bool) -> Any:
  if hint is str:
    return _text(text)
  if get_origin(hint) is Literal:
    allowed = get_args(hint)
    if text not in allowed:
      raise Unfit(f"{shown(text)} is not known{closest(text, allowed)} ({_listed(allowed, 170)})")
    return text
  read = {int: _int, float: _float, bool: _bool}[hint]
  if not quoted:
    return read(text)
  read(text.strip())  # says what is wrong with the text itself, where something is
  raise Unfit(f"{shown(text)} is text, because of its quotes; write {text.strip()} without them")


def _text(text: str) -> str:
  if "\0" in text:
    raise Unfit(f"{shown(text)} contains the character NUL; leave it out")
  try:
    text.encode()
  except UnicodeEncodeError:
    raise Unfit(f"{shown(text)} is not valid UTF-8; write it in UTF-8") from None
  return text


def _int(text: str) -> int:
  if re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", text):
    if len(text) > 30:
      raise Unfit(f"{shown(text)} is too large; use at most {LARGEST}")
    return int(text)
  inner = text.strip("'\" ")
  if re.fullmatch(r"[-+]?[0-9]+", inner):
    raise Unfit(
      f"{shown(text)} is not written as a number; write {shown(str(int(inner[:30])))[1:-1]}"
    )
  try:
    number = float(text)
  except ValueError:
    raise Unfit(f"{shown(text)} is not a whole number; write digits, as 10") from None
  if abs(number) <= LARGEST and number == int(number):
    raise Unfit(f"{shown(text)} is not written as a whole number; write {int(number)}")
  raise Unfit(f"{shown(text)} is not a whole number; write digits, as 10")


def _float(text: str) -> float:
  try:
    number = float(text)
  except ValueError:
    raise Unfit(f"{shown(text)} is not a number; write {_as_number(text)}") from None
  if text != text.strip() or not text.isascii():
    raise Unfit(f"{shown(text)} is not written as a number; write {number:g}")
  if not math.isfinite(number) or abs(number) > FLOAT32:
    raise Unfit(f"{shown(text)} is not a finite number in float32; write one below 3e38")
  if 0 < abs(number) < LEAST or (not number and re.search("[1-9]", re.split("[eE]", text)[0])):
    raise Unfit(f"{shown(text)} is nothing in float32; write one of at least {LEAST:g}")
  return number


def _as_number(text: str) -> str:
  """What someone may have meant by `0,1`, `'0.1'` or `10%`."""
  near = text.strip("'\" ").replace(",", ".")
  try:
    return f"{float(near[:-1]) / 100:g}" if near.endswith("%") else f"{float(near):g}"
  except ValueError:
    return "digits, as 0.1 or 1e-4"


def _bool(text: str) -> bool:
  if text.lower() not in (*TRUE, *FALSE):
    raise Unfit(f"{shown(text)} is neither true nor false; write one of these")
  return text.lower() in TRUE


def _tuple(hint: Any, node: Node) -> tuple[Any, ...]:
  if isinstance(node.value, dict):
    raise Unfit("is a mapping; write a list, as [a, b]")
  if isinstance(node.value, str):  # one entry needs no brackets
    if node.null or not node.value:
      raise Unfit("has no value; write [] for an empty list")
    if node.value.startswith(("[", "{")) and not node.quoted:
      raise Unfit(f"{shown(node.value)} is not a list; its brackets or quotes are not closed")
    if "," in node.value and not node.quoted:
      raise Unfit(f"{shown(node.value)} is not a list; write [{brief(node.value, 60)}]")
    return (coerce(hint, node),)
  return tuple(coerce(hint, item) for item in node.value)


def _mapping(hint: Any, node: Node) -> dict[str, Any]:
  """A mapping, also written as pairs [[name, value], ...]; an empty value is an empty list."""
  if isinstance(node.value, str):
    raise Unfit(f"{shown(node.value)} is not a mapping; write one, as {{embed: [fsdp]}}")
  entries = _pairs(node.value) if isinstance(node.value, list) else node.value
  values = {}
  for name, item in entries.items():
    try:
      values[name] = () if item.null or item.value == "" else coerce(hint, item)
    except Unfit as e:
      raise Unfit(f"{brief(name, 40)}: {e}") from None
  return values


def _tree_of_names(node: Node) -> dict[str, Any]:
  """A mapping of whatever is written, to any depth."""
  if not isinstance(node.value, dict):
    raise Unfit(
      f"is {node.kind}; write a mapping of names, as {{near: {{attention: {{window: 8}}}}}}"
    )
  return {name: _tree(item) for name, item in node.value.items()}


def _tree(node: Node) -> Any:
  if isinstance(node.value, dict):
    return _tree_of_names(node)
  if isinstance(node.value, list):
    return tuple(map(_tree, node.value))
  if node.quoted or node.null:
    return None if node.null else _text(node.value)
  for read in (_bool, _int, _float):
    try:
      return read(node.value)
    except Unfit:
      continue
  return _text(node.value)


def _pairs(items: list[Node]) -> dict[str, Node]:
  entries: dict[str, Node] = {}
  for item in items:
    pair = item.value if isinstance(item.value, list) else []
    if len(pair) != 2 or not isinstance(name := pair[0].value, str):
      raise Unfit("is a list; write a mapping, as {embed: [fsdp]}, or pairs, as [[embed, [fsdp]]]")
    if name in entries:
      raise Unfit(f"{shown(name)} stands twice; write one entry with all of its axes")
    entries[name] = pair[1]
  return entries


def _bounded(value: Any, hint: Any) -> Any:
  for bound in get_args(hint)[1:]:
    if isinstance(bound, Bound) and not bound.admits(value):
      limit = f"at most {LARGEST}" if value > bound.high == LARGEST else bound.words
      raise Unfit(f"{shown(str(value))[1:-1]} is out of range; use {limit}")
  return value


def _required(hint: Any) -> Any:
  return next(arg for arg in get_args(hint) if arg is not type(None))


def words(hint: Any) -> str:
  """A type in words: `a whole number, at least 1, or null`."""
  origin, args = get_origin(hint), get_args(hint)
  if origin is Annotated:
    limits = [bound.words for bound in args[1:] if isinstance(bound, Bound) and bound.words]
    return ", ".join([words(args[0]), *limits])
  if origin in (typing.Union, types.UnionType):
    return f"{words(_required(hint))}, or null"
  if origin is tuple:
    return "a list, as [a, b]" if args[0] is str else f"a list, as [a, b]; each {words(args[0])}"
  if origin is collections.abc.Mapping:
    return "a mapping of names" if args[1] is Any else "a mapping of names to lists"
  if origin is Literal:
    return f"one of {_listed(args)}"
  return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def render(value: Any) -> str:
  """A value as one line of YAML that `coerce` reads back."""
  if value is None:
    return "null"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float):
    text = repr(value)  # YAML 1.1 readers need the point in 1.0e-05
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
  if isinstance(value, tuple):
    return f"[{', '.join(map(render, value))}]"
  if isinstance(value, dict):
    return f"{{{', '.join(f'{render(k)}: {render(v)}' for k, v in value.items())}}}"
  if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./~][\w./~+-]*", value, re.ASCII):
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**30).rstrip("\n")
  text = str(value)
  plain = {"null", "~", *TRUE, *FALSE, "y", "n"}
  return f"'{text}'" if isinstance(value, str) and text.lower() in plain or text == "." else text


def written(node: Node) -> str:
  """A node as one line, as it was typed."""
  if isinstance(node.value, str):
    return node.value
  if isinstance(node.value, list):
    return f"[{', '.join(map(written, node.value))}]"
  return f"{{{', '.join(f'{name}: {written(item)}' for name, item in node.value.items())}}}"


def shown(text: str) -> str:
  """A value as a message quotes it: one line, of bounded length."""
  return repr(text if len(text) <= 60 else f"{text[:57]}...")


def brief(text: str, most: int = 60) -> str:
  """A name as a message shows it: one line, of bounded length."""
  text = text if text.isprintable() else repr(text)[1:-1]
  return text if len(text) <= most else f"{text[: most - 3]}..."


def takes_text(hint: Any) -> bool:
  """Whether a key takes any text as it stands, with brackets and all."""
  return hint is str


def _listed(names: typing.Iterable[str], most: int = 10_000) -> str:
  return brief(", ".join(map(str, names)), most)
