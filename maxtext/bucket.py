"""Objects of a store (gs://, s3:// ...) by the path below a URL, through fsspec; imported late."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub", "az": "adlfs"}
WRITTEN = ("gs", "s3", "az", "file")  # protocols of stores that a run can be written to
WRITING = ".writing"  # what a file is called meanwhile, where a folder stands for a bucket
AT_ONCE = 8  # objects under way at a time


def is_url(text: str) -> bool:
  return bool(re.match(r"[a-z][a-z0-9+]*://", text))


def lacking(url: str) -> str:
  """Why nothing can be read or written at a URL, before it is asked; empty if nothing is known."""
  protocol, _, rest = url.partition("://")
  if protocol not in WRITTEN:
    known = ", ".join(f"{name}://" for name in WRITTEN)
    return f"runs are kept in a file system or at {known}, not at {protocol}://"
  if not rest.strip("/"):
    return f"names no bucket; write {protocol}://BUCKET/FOLDER"
  packages = [name for name in ("fsspec", PACKAGES.get(protocol, "")) if name]
  lacks = [name for name in packages if importlib.util.find_spec(name) is None]
  return f"needs a package; pip install {' '.join(lacks)}" if lacks else ""


class Bucket:
  """The objects below a URL. What fails is an OSError whose `strerror` says why, in one line."""

  def __init__(self, url: str):
    self.url = url.rstrip("/")
    if reason := lacking(self.url):
      raise OSError(errno.EINVAL, reason, self.url)
    import fsspec

    self._is_folder = self.url.startswith("file://")
    local = {"auto_mkdir": True} if self._is_folder else {}
    with _told(self.url):
      # what another process has written since must be seen
      self._system, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **local)
    self._root = str(root).rstrip("/")

  def below(self, name: str) -> Bucket:
    return Bucket(f"{self.url}/{name}")

  def files(self, name: str = "") -> dict[str, int]:
    """Path below the URL and size in bytes of all objects, or of those in the folder `name`."""
    place = self._at(name) if name else self._root
    with _told(f"{self.url}/{name}".rstrip("/")):
      try:
        found = self._system.find(place, detail=True, withdirs=False)
      except FileNotFoundError:
        return {}
    cut = len(self._root) + 1
    kept = {
      path: info
      for path, info in found.items()
      if info["type"] == "file" and not path.endswith(WRITING)
    }
    return {path[cut:]: int(info["size"]) for path, info in kept.items() if len(path) > cut}

  def read(self, name: str) -> bytes:
    with _told(f"{self.url}/{name}"):
      return bytes(self._system.cat_file(self._at(name)))

  def write(self, name: str, content: bytes) -> None:
    with _told(f"{self.url}/{name}"), self._whole(name) as place:
      self._system.pipe_file(place, content)

  def create(self, name: str, content: bytes) -> bool:
    """Write an object that is not there yet; False where it is."""
    with _told(f"{self.url}/{name}"):
      try:
        self._system.pipe_file(self._at(name), content, mode="create")
      except FileExistsError:
        return False
    return True

  def fetch(self, names: Iterable[str], folder: Path) -> None:
    """Copies of objects below `folder`, each under its name."""

    def one(name: str) -> None:
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with _told(f"{self.url}/{name}"):
        self._system.get_file(self._at(name), str(path))

    with ThreadPoolExecutor(AT_ONCE) as threads:
      list(threads.map(one, names))

  def put(self, names: Iterable[str], folder: Path) -> None:
    """The files of these names below `folder`, each as an object of its name."""

    def one(name: str) -> None:
      with _told(f"{self.url}/{name}"), self._whole(name) as place:
        self._system.put_file(str(folder / name), place)

    with ThreadPoolExecutor(AT_ONCE) as threads:
      list(threads.map(one, names))

  def delete(self, names: Iterable[str]) -> None:
    """Delete objects; those that are not there are no error."""
    for name in names:
      with _told(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
        self._system.rm_file(self._at(name))

  @contextlib.contextmanager
  def _whole(self, name: str) -> Iterator[str]:
    """Where to write an object, which then appears whole or not at all, as stores have it."""
    place = self._at(name)
    yield f"{place}{WRITING}" if self._is_folder else place
    if self._is_folder:
      os.replace(f"{place}{WRITING}", place)

  def _at(self, name: str) -> str:
    return f"{self._root}/{name}"


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
  """What a store's client raises, as an OSError that names the URL."""
  try:
    yield
  except FileNotFoundError:
    what = "there is no such bucket or object"
    raise FileNotFoundError(errno.ENOENT, what, url) from None
  except PermissionError as error:
    what = f"access is denied ({_brief(error)}); give credentials that may list, read and write it"
    raise PermissionError(errno.EACCES, what, url) from None
  except OSError as error:
    if error.strerror and error.errno:
      raise OSError(error.errno, error.strerror, url) from error
    raise OSError(errno.EIO, _brief(error), url) from error
  except Exception as error:  # what a store's client raises is its own
    raise OSError(errno.EIO, f"{type(error).__name__}: {_brief(error)}", url) from error


def _brief(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
