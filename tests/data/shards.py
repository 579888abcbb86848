"""Files of documents in every form that is read, for the tests of streamed data."""

import json

import numpy as np
import pyarrow
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pyarrow import parquet

from maxtext.data.corpus import open_corpus
from maxtext.data.pipeline import train_batches
from tests.data.cases import section

PAGES = {"write_page_checksum": True, "write_statistics": False, "compression": "NONE"}
KINDS = ("arrayrecord", "tfds", "parquet", "arrow", "jsonl", "text")


def texts(count, start=0, seed=0):
  """Different short documents, of 1 to 60 words."""
  random = np.random.default_rng([seed, start])
  return [
    f"{n}: " + " ".join(map(str, random.integers(0, 99, random.integers(1, 60))))
    for n in range(start, start + count)
  ]


def array_record(path, records):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def write(folder, kind, shards):
  """A file for each list of texts (for `text`, each text); the pattern that names them."""
  folder.mkdir(parents=True, exist_ok=True)
  endings = {"arrayrecord": "array_record", "tfds": "array_record", "text": "txt"}
  end = endings.get(kind, kind)
  for number, shard in enumerate(shards):
    path = folder / f"part-{number:03}.{end}"
    if kind == "jsonl":
      path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in shard))
    elif kind == "arrayrecord":
      array_record(path, [json.dumps({"text": text}).encode() for text in shard])
    elif kind == "tfds":
      array_record(path, [example(text=[text.encode()], n=[3, -1]) for text in shard])
    elif kind == "text":
      for place, text in enumerate(shard):
        (folder / f"part-{number:03}-{place:04}.txt").write_text(text)
    else:
      table = pyarrow.table({"text": shard, "n": list(range(len(shard)))})
      if kind == "parquet":
        parquet.write_table(table, path, row_group_size=7, **PAGES)
      else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
          stream.write_table(table, max_chunksize=5)
  return f"{folder}/*.{end}"


def example(**features):
  """A tf.Example, by the protobuf library from the schema that TensorFlow publishes."""
  message = _messages()["Example"]()
  for name, values in features.items():
    feature = message.features.feature[name]
    kind = feature.bytes_list if isinstance(values[0], bytes) else feature.int64_list
    kind.value.extend(values)
  return message.SerializeToString()


def _messages():
  file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3", package="tf")
  kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
  for name, kind in kinds.items():
    message = file.message_type.add(name=name)
    message.field.add(name="value", number=1, label=3, type=kind)
  feature = file.message_type.add(name="Feature")
  feature.oneof_decl.add(name="kind")
  for number, name in enumerate(kinds, 1):
    field = {"BytesList": "bytes_list", "FloatList": "float_list", "Int64List": "int64_list"}[name]
    feature.field.add(
      name=field, number=number, label=1, type=11, type_name=f".tf.{name}", oneof_index=0
    )
  features = file.message_type.add(name="Features")
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  entry.field.add(name="key", number=1, label=1, type=9)
  entry.field.add(name="value", number=2, label=1, type=11, type_name=".tf.Feature")
  features.field.add(
    name="feature", number=1, label=3, type=11, type_name=".tf.Features.FeatureEntry"
  )
  whole = file.message_type.add(name="Example")
  whole.field.add(name="features", number=1, label=1, type=11, type_name=".tf.Features")
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return {"Example": message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))}


def streamed(files, packer="concat_then_split", **changes):
  """The section of a run that reads these files in bytes."""
  changes = {"dataset_type": "grain", "grain_train_files": str(files), "eval_fraction": 0} | changes
  return section(packer, **changes)


def batches(data, rows=4, length=32, **more):
  return train_batches(open_corpus(data), data, rows, length, **more)


def documents(found):
  """The texts in batches of rows of documents one after the other, in bytes, with bos and eos."""
  pairs = [
    (batch["inputs"][row], batch["targets"][row], batch["inputs_segmentation"][row])
    for batch in found
    for row in range(len(batch["inputs"]))
  ]
  if not pairs:
    return []
  inputs = np.concatenate([a[s > 0] for a, _, s in pairs])
  ends = np.concatenate([b[s > 0] for _, b, s in pairs]) == 2
  parts = np.split(inputs, np.flatnonzero(ends) + 1)[:-1]
  return [bytes((part[1:] - 3).astype(np.uint8)).decode() for part in parts]
