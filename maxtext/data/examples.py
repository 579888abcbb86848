"""Records of bytes -> their columns: JSON objects, and tf.Example protos, as TFDS exports them.

An Example begins with the byte 0x0a and a JSON object with `{`: each record says what it is.
"""

from __future__ import annotations

import functools
import json
from typing import Any

# tensorflow/core/example/example.proto, but for its floats.
SCHEMA = """
name: "example" syntax: "proto3"
message_type { name: "Bytes"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Integers"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" field { name: "bytes" number: 1 type_name: ".Bytes" }
  field { name: "integers" number: 3 type_name: ".Integers" } }
message_type { name: "Entry" field { name: "name" number: 1 type: TYPE_STRING }
  field { name: "feature" number: 2 type_name: ".Feature" } }
message_type { name: "Features"
  field { name: "entries" number: 1 label: LABEL_REPEATED type_name: ".Entry" } }
message_type { name: "Example" field { name: "features" number: 1 type_name: ".Features" } }
"""


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
  """{name: a value, or a list of them}, of bytes and integers."""
  from google.protobuf.message import DecodeError

  try:
    entries = _examples().FromString(record).features.entries
  except DecodeError as error:
    raise ValueError(f"not a tf.Example: {error}") from None
  found: dict[str, Any] = {}
  for entry in entries:
    values = [*entry.feature.bytes.value, *entry.feature.integers.value]
    found[entry.name] = values[0] if len(values) == 1 else values
  return found


@functools.cache
def _examples() -> Any:
  """The class of messages, a map being its entries one after the other."""
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

  file = text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto())
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
