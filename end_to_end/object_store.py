"""Files at s3:// and gs:// from local servers: read, globbed, absent, denied; each refusal a line;
and a run that is kept there, killed, continued from another host's empty disk, and damaged.

  pip install 'moto[server]' s3fs gcp-storage-emulator gcsfs
  python end_to_end/object_store.py

That of s3:// checks who asks from a number of requests on, so that the last case is a real denial.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from end_to_end.runs import CONFIG, module

DOCUMENTS = 40
CASES = {  # what is read -> how its run ends, and what its last line says
  "shelf/train/*.jsonl": (0, ""),
  "shelf/train/part-0.jsonl": (0, ""),
  "shelf/train/part-9.jsonl": (3, "part-9.jsonl: no file there matches"),
  "shelf/absent/*.jsonl": (3, "*.jsonl: no file there matches"),
  "nowhere/part-0.jsonl": (3, "part-0.jsonl: no file there matches"),
}
RUN = (
  *("base_emb_dim=16", "base_mlp_dim=32", "base_num_decoder_layers=1", "max_target_length=32"),
  *("per_device_batch_size=4", "enable_tensorboard=false", "devices=1", "hardware=cpu"),
  *("jax_cache_dir=", "run_name=kept", "steps=40", "checkpoint_period=4", "log_config=false"),
)
DENIED = "s3://shelf/train/part-0.jsonl"
SERVERS = {  # protocol -> what Python runs for it, before the port; and what its client needs
  "s3": (("-m", "moto.server", "-H", "127.0.0.1", "-p"), ("moto", "s3fs")),
  "gs": (
    ("-m", "gcp_storage_emulator", "start", "--in-memory", "--host=127.0.0.1", "--port"),
    ("gcp_storage_emulator", "gcsfs"),
  ),
}


@contextlib.contextmanager
def served(protocol: str) -> Iterator[str]:
  """A server of our own, which the environment names to clients, and its address."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, *SERVERS[protocol][0], str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  address = f"http://127.0.0.1:{port}"
  os.environ |= {
    "AWS_ENDPOINT_URL": address,
    "STORAGE_EMULATOR_HOST": address,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, which the server does not speak
  }
  try:
    for _ in range(120):
      with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        break
      time.sleep(0.5)
    else:
      sys.exit(f"the server of {protocol}:// did not begin")
    yield address
  finally:
    server.kill()
    server.wait()


def prepare(pattern: str, place: Path) -> tuple[int, str]:
  """Read all documents of a pattern: the exit code and the last line."""
  words = [
    *("dataset_type=grain", f"grain_train_files={pattern}", "tokenizer_type=byte"),
    *("eval_fraction=0", f"dataset_cache_dir={place}/cache"),
  ]
  made = subprocess.run(
    [sys.executable, "-m", "maxtext.prepare", str(place / "out"), *words],
    capture_output=True,
    text=True,
  )
  assert "Traceback" not in made.stderr, made.stderr
  return made.returncode, (made.stdout + made.stderr).strip().splitlines()[-1]


def main() -> None:
  os.environ |= {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "none"}
  os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
  lacking = []
  for protocol, (_, packages) in SERVERS.items():
    lacking += (lacks := [name for name in packages if importlib.util.find_spec(name) is None])
    if not lacks:
      with served(protocol) as address:
        read(protocol)
        keep(protocol)
        if protocol == "s3":
          deny(address)
  if lacking:
    print(f"SKIP: not installed: {', '.join(lacking)}")
    return
  print("PASS: what a store has is read, what it keeps is whole, and what it refuses is a line")


def read(protocol: str) -> None:
  system(protocol).mkdir("shelf")
  for part in range(2):
    lines = (json.dumps({"text": f"document {part} {n}"}) for n in range(DOCUMENTS // 2))
    system(protocol).pipe(f"shelf/train/part-{part}.jsonl", "\n".join(lines).encode())
  for pattern, (code, said) in CASES.items():
    check(f"{protocol}://{pattern}", code, said)


def keep(protocol: str) -> None:
  """A run in a bucket is one in a folder, though killed, and continued where nothing of it is."""
  base = f"{protocol}://shelf/runs"
  with tempfile.TemporaryDirectory() as place:
    there = lambda cache: (f"base_output_directory={base}", f"run_cache_dir={place}/{cache}")
    train = lambda *keys: module("maxtext.train", CONFIG, *RUN, *keys, environment=dict(os.environ))
    train(f"base_output_directory={place}").ends(0)
    killed = train(*there("one"))
    holds(killed.until(lambda: f"saved {base}/kept/checkpoints/8" in killed.output), killed.tail())
    killed.kill()
    output = train(*there("another")).ends(0)
    holds(f"resuming {base}/kept after" in output, output)
    holds(arrays(f"{base}/kept") == arrays(f"{place}/kept"), "the arrays differ")
    lines = system(protocol).cat_file("shelf/runs/kept/metrics.jsonl").splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "learning/loss" in row]
    holds(steps == list(range(40)), f"metrics of steps {steps}")
    damaged = "shelf/runs/kept/checkpoints/40/data.json"
    content = system(protocol).cat_file(damaged)
    system(protocol).pipe_file(damaged, bytes([content[0] ^ 1]) + content[1:])
    said = (
      f"{base}/kept/checkpoints/40 is damaged: data.json is not as it was written; using step 36"
    )
    output = module("maxtext.inspect", f"{base}/kept", environment=dict(os.environ)).ends(0)
    holds(said in output, output)
    absent = f"base_output_directory={protocol}://nowhere/runs"
    output = train(absent, f"run_cache_dir={place}/none").ends(2)
    holds("there is no such bucket or object" in output.splitlines()[-1], output)
  print(f"{base}/kept: killed and continued, no bit differs; damage is named, and passed over")


def deny(address: str) -> None:
  """From now on nobody may do anything at the server of s3://."""
  plain = {"Content-Type": "text/plain"}
  request = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", plain)
  urllib.request.urlopen(request).close()
  check(DENIED, 3, "access is denied")
  check(DENIED.replace("part-0", "*"), 3, "access is denied")
  with tempfile.TemporaryDirectory() as place:
    keys = ("base_output_directory=s3://shelf/runs", f"run_cache_dir={place}")
    output = module("maxtext.train", CONFIG, *RUN, *keys, environment=dict(os.environ)).ends(2)
  holds("access is denied" in output.splitlines()[-1], output)
  print(output.splitlines()[-1])


def arrays(run: str) -> list[str]:
  """A line for each array of a run's newest checkpoint, with its sha256."""
  lines = (
    module("maxtext.inspect", run, "hash=true", environment=dict(os.environ)).ends(0).splitlines()
  )
  return [line for line in lines if "\t" in line]


def system(protocol: str) -> Any:
  import fsspec

  return fsspec.filesystem(protocol, use_listings_cache=False)


def holds(claim: bool, otherwise: str) -> None:
  if not claim:
    sys.exit(f"FAIL: {otherwise}")


def check(pattern: str, code: int, said: str) -> None:
  with tempfile.TemporaryDirectory() as place:
    ended, last = prepare(pattern, Path(place))
  count = DOCUMENTS if "*" in pattern else DOCUMENTS // 2
  wanted = said or f"{count} documents"
  if ended != code or wanted not in last:
    sys.exit(f"FAIL: {pattern}: {ended}: {last}")
  print(f"{pattern}: {last}")


if __name__ == "__main__":
  main()
