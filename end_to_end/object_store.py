"""Files at s3:// from a local server: read, globbed, absent, denied; each refusal a line.

  pip install 'moto[server]' s3fs
  python end_to_end/object_store.py

The server checks who asks from a number of requests on, so that the last case is a real denial.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

DOCUMENTS = 40
CASES = {  # what is read -> how its run ends, and what its last line says
  "s3://shelf/train/*.jsonl": (0, ""),
  "s3://shelf/train/part-0.jsonl": (0, ""),
  "s3://shelf/train/part-9.jsonl": (3, "part-9.jsonl: no file there matches"),
  "s3://shelf/absent/*.jsonl": (3, "*.jsonl: no file there matches"),
  "s3://nowhere/part-0.jsonl": (3, "part-0.jsonl: no file there matches"),
}
DENIED = "s3://shelf/train/part-0.jsonl"


def serve() -> tuple[subprocess.Popen[bytes], str]:
  """A server of our own, and its address."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  words = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
  server = subprocess.Popen(
    [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  address = f"http://127.0.0.1:{port}"
  for _ in range(120):
    try:
      urllib.request.urlopen(f"{address}/moto-api/data.json").close()
      return server, address
    except OSError:
      time.sleep(0.5)
  server.kill()
  sys.exit("the server did not begin")


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
  if lacking := [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]:
    print(f"SKIP: not installed: {', '.join(lacking)}")
    return
  os.environ |= {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "none"}
  os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
  server, address = serve()
  os.environ["AWS_ENDPOINT_URL"] = address
  try:
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("shelf")
    for part in range(2):
      lines = (json.dumps({"text": f"document {part} {n}"}) for n in range(DOCUMENTS // 2))
      system.pipe(f"shelf/train/part-{part}.jsonl", "\n".join(lines).encode())
    for pattern, (code, said) in CASES.items():
      check(pattern, code, said)
    # from now on nobody may do anything
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", plain)
    urllib.request.urlopen(request).close()
    check(DENIED, 3, "access is denied")
    check(DENIED.replace("part-0", "*"), 3, "access is denied")
  finally:
    server.kill()
    server.wait()
  print("PASS: what a store has is read, and what it refuses is a line")


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
