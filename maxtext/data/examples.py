"""Records of bytes -> their columns: JSON objects, and tf.Example protos, as TFDS exports them.

An Example begins with the byte 0x0a and a JSON object with `{`: each record says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

BYTES, FLOATS, INTEGERS = 1, 2, 3  # the fields of tf.train.Feature


def columns(record: bytes) -> dict[str, Any]:
  """The columns of a record. Raises ValueError, saying what is wrong with it."""
  if record[:1] == b"\n":
    return _example(record)
  try:
    found = json.loads(record)
  except UnicodeDecodeError as error:
    raise ValueError(f"byte 0x{record[error.start]:02x} at {error.start} is not UTF-8") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not JSON: {error}") from None
  if not isinstance(found, dict):
    raise ValueError(f"not a JSON object, but a {type(found).__name__}")
  return found


def _example(record: bytes) -> dict[str, Any]:
  """{name: a value, or a list of them} of tensorflow/core/example/example.proto."""
  found: dict[str, Any] = {}
  for features in _submessages(record, 1):
    for entry in _submessages(features, 1):
      parts = dict(_fields(entry))
      name, feature = parts.get(1, b""), parts.get(2, b"")
      if not isinstance(name, bytes) or not isinstance(feature, bytes):
        raise ValueError("not a tf.Example: a feature has no name or value")
      values = [value for kind, part in _fields(feature) for value in _values(kind, part)]
      found[name.decode()] = values[0] if len(values) == 1 else values
  return found


def _values(kind: int, part: bytes | int) -> Iterator[Any]:
  if kind in (BYTES, INTEGERS) and isinstance(part, bytes):
    for _, value in _fields(part):
      if kind == BYTES or isinstance(value, int):
        yield value
      else:
        yield from _varints(value)


def _submessages(message: bytes, number: int) -> Iterator[bytes]:
  for field, value in _fields(message):
    if field == number and isinstance(value, bytes):
      yield value


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
  """Field numbers and values of a protocol buffer (protobuf.dev, Encoding)."""
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    wire = tag & 7
    if wire == 0:
      value, at = _varint(message, at)
      yield tag >> 3, _signed(value)
      continue
    if wire == 2:
      size, at = _varint(message, at)
    elif wire in (1, 5):
      size = 8 if wire == 1 else 4
    else:
      raise ValueError(f"not a tf.Example: wire type {wire}")
    if at + size > len(message):
      raise ValueError("not a tf.Example: it is cut short")
    yield tag >> 3, message[at : at + size]
    at += size


def _varints(packed: bytes) -> Iterator[int]:
  at = 0
  while at < len(packed):
    value, at = _varint(packed, at)
    yield _signed(value)


def _varint(message: bytes, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(message):
      raise ValueError("not a tf.Example: it is cut short")
    byte = message[at]
    value |= (byte & 127) << shift
    at += 1
    if byte < 128:
      return value, at
  raise ValueError("not a tf.Example: a number without end")


def _signed(value: int) -> int:
  return value - (1 << 64) if value >> 63 & 1 else value
