"""A folder is a checkpoint when every byte is as the manifest says, and not otherwise."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from maxtext.checkpoints import manifest as manifests
from maxtext.checkpoints.arrays import Array, difference
from maxtext.checkpoints.manifest import Damage

ARRAYS = (
  Array("params/a", (4, 8), "float32", "[fsdp -] on fsdp 4", "params.a"),
  Array("params/b", (), "bfloat16", "[]", "params.b"),
)


@pytest.fixture
def folder(tmp_path):
  step = tmp_path / "40"
  (step / "state" / "d").mkdir(parents=True)
  (step / "state" / "d" / "data").write_bytes(random.Random(0).randbytes(3000))
  (step / "state" / "empty").touch()
  (step / "data.json").write_text('{"offset": 3}')
  manifests.write(step, 40, ARRAYS, {"data": "data.json"})
  return step


def check(folder) -> None:
  manifest = manifests.read(folder)
  manifests.fingerprint(folder, manifest)
  manifests.check_content(folder, manifest)


def test_what_was_written_is_read(folder):
  check(folder)
  manifest = manifests.read(folder)
  assert (manifest.step, manifest.arrays, manifest.extra) == (40, ARRAYS, {"data": "data.json"})
  assert set(manifest.files) == {"state/d/data", "state/empty", "data.json"}
  assert manifest.size == 3000 + 13


@pytest.mark.parametrize("name", ["manifest.json", "data.json", "state/d/data"])
def test_every_flipped_bit_is_damage(folder, name):
  file = folder / name
  good = file.read_bytes()
  bits = range(8 * len(good))
  for bit in random.Random(1).sample(bits, 300) if len(bits) > 300 else bits:
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bad)
    with pytest.raises(Damage):
      check(folder)
  file.write_bytes(good)
  check(folder)


@pytest.mark.parametrize("name", ["manifest.json", "data.json", "state/d/data"])
def test_a_shorter_a_longer_and_a_missing_file_are_damage(folder, name):
  file = folder / name
  good = file.read_bytes()
  for content in (b"", good[:-1], good[: len(good) // 2], good + b"\n"):
    file.write_bytes(content)
    with pytest.raises(Damage):
      check(folder)
  file.unlink()
  with pytest.raises(Damage, match=name):
    check(folder)


def test_a_folder_in_place_of_a_file_is_damage(folder):
  (folder / "data.json").unlink()
  (folder / "data.json").mkdir()
  with pytest.raises(Damage, match=r"data\.json"):
    check(folder)


def test_a_copy_under_another_number_is_damage_and_under_a_name_is_not(folder):
  with pytest.raises(Damage, match="a copy of step 40"):
    manifests.read(folder.rename(folder.with_name("50")))
  check((folder.parent / "50").rename(folder.with_name("best")))


def test_a_newer_format_is_named_and_not_called_damage(folder):
  body = json.loads((folder / "manifest.json").read_text())
  body["format"] = 2
  (folder / "manifest.json").write_bytes(manifests._seal(body))
  with pytest.raises(Damage, match="format 2, this version reads format 1"):
    manifests.read(folder)


def test_a_manifest_written_again_is_the_same_bytes(folder):
  first = (folder / "manifest.json").read_bytes()
  (folder / "manifest.json").unlink()
  manifests.write(folder, 40, ARRAYS, {"data": "data.json"})
  assert (folder / "manifest.json").read_bytes() == first


def test_a_difference_names_an_array_and_counts():
  other = (
    Array("params/a", (8, 8), "float32", "", "params.a"),
    Array("params/c", (2,), "float32", "", "params.c"),
  )
  assert difference(ARRAYS, ARRAYS) is None
  assert difference(ARRAYS, other) == (
    "params/a is float32 [4 8] in the checkpoint and float32 [8 8] in this model; "
    "3 of 3 arrays differ"
  )
  assert "params/b, bfloat16 [] in the checkpoint, is not in this model" in difference(
    ARRAYS, ARRAYS[:1]
  )
  assert "params/b, bfloat16 [] in this model, is not in the checkpoint" in difference(
    ARRAYS[:1], ARRAYS
  )


def test_steps_are_listed_without_jax_orbax_or_numpy():
  code = (
    "import sys; from maxtext.checkpoints.lookup import locate; import maxtext.inspect; "
    "print({'jax', 'orbax', 'numpy', 'tensorstore'} & set(sys.modules))"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (run.stdout, run.stderr) == ("set()\n", "")
