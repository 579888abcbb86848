"""What is wrong with the files and folders that a run names, before anything is read or written."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from maxtext.bucket import is_url, lacking
from maxtext.checkpoints import hub
from maxtext.checkpoints.lookup import promising
from maxtext.config.checks import Problem, Purpose
from maxtext.config.config import Config
from maxtext.config.documents import shown as place
from maxtext.config.values import brief, shown
from maxtext.errors import closest

LOADED = ("load_parameters_path", "load_full_state_path")
PATHS = (
  "base_output_directory",
  "run_cache_dir",
  "jax_cache_dir",
  "metrics_file",
  "dataset_path",
  "tokenizer_path",
  "tokenizer_cache_dir",
  "dataset_cache_dir",
  "grain_train_mixture_config_path",
  *LOADED,
  "prompts_file",
  "compiled_trainstep_file",
  "report_file",
)
FOLDERS = ("base_output_directory", "run_cache_dir", "jax_cache_dir", "tokenizer_cache_dir")
REMOTE = ("base_output_directory", *LOADED)  # which may be in a bucket
LONGEST = 255  # bytes of a name, in every usual file system


def of_places(config: Config, purpose: Purpose) -> Iterator[Problem]:
  """Places that cannot be what their key needs; more is known only once they are used."""
  for key in PATHS:
    if "$" in (text := config.values[key]):
      yield key, f"{shown(text)}: nothing is filled in for $; write the path itself, ~ is your home"
    if is_url(text) and key in REMOTE:
      if reason := lacking(text):
        yield key, f"{shown(text)}: {reason}"
    elif "://" in text:
      way = "no object storage here; a mount, such as Cloud Storage FUSE, makes files of it"
      yield key, f"{shown(text)}: {way}; name a path of a file system"
    elif os.path.expanduser(text).startswith("~"):
      yield key, f"{shown(text)}: there is no such user; write the path itself, ~ is your home"
  if purpose == "launch":  # where it is to run there are others
    return
  for key in FOLDERS:
    if (text := config.values[key]) and not is_url(text):
      path, runs = Path(os.path.expanduser(text)), key == "base_output_directory"
      if runs:
        path /= config.run.run_name
      needed = runs and purpose == "train"
      if problem := _blocked(path, "a folder", must_be_written=needed):
        yield key, f"{shown(text)}: {problem}"
  if purpose == "train":
    if text := config.observe.metrics_file:
      path = Path(os.path.expanduser(text))
      problem = "is a folder; name a file" if path.is_dir() else _blocked(path.parent, "a file")
      if problem:
        yield "metrics_file", f"{shown(text)}: {problem}"
    text = os.path.expanduser(config.compile.report_file)
    if text and not re.search(r"\$|://|^~", text) and (problem := unwritable(text)):
      yield "report_file", f"{shown(config.compile.report_file)}: {problem}"
    yield from _started_from(config)
  if purpose in ("train", "read"):
    yield from _read(config)
  elif (text := config.decode.prompts_file) and not os.path.isfile(os.path.expanduser(text)):
    yield "prompts_file", f"{shown(text)}: no such file; name a text file with one prompt a line"


def _blocked(folder: Path, wanted: str, must_be_written: bool = True) -> str:
  """Why `folder` is none and cannot become one, or nothing be written there; empty if it can."""
  if problem := _too_long(folder):
    return problem
  there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
  if there is None:
    return ""
  name = brief(place(there))
  if not os.path.exists(there):
    return f"{name} is a link that leads nowhere; name {wanted}"
  if not os.path.isdir(there):
    return f"{name} is a file, not a folder; name {wanted}"
  if must_be_written and not os.access(there, os.W_OK | os.X_OK):
    return f"{name} cannot be written; name {wanted} that can"
  return ""


def unwritable(text: str) -> str:
  """Why no file can be written there, in a folder that is there; empty if one can."""
  path = Path(os.path.expanduser(text))
  if os.path.isdir(path):
    return "is a folder; name a file"
  if problem := _too_long(path) or _blocked(path.parent, "a file"):
    return problem
  if not os.path.isdir(path.parent):
    return f"there is no folder {brief(place(path.parent))}; make it, or name a file in another"
  there = os.path.exists(path) and not os.access(path, os.W_OK)
  return "cannot be written; name a file that can" if there else ""


def _too_long(path: Path) -> str:
  """Why no file system has such a name; empty if one may."""
  long = any(len(os.fsencode(part)) > LONGEST for part in path.parts)
  return f"has a name of more than {LONGEST} bytes; name a shorter one" if long else ""


def _read(config: Config) -> Iterator[Problem]:
  """Files that training will read and that are plainly absent."""
  data = config.data
  if data.dataset_type == "text" and (path := data.dataset_path) and not _is_there(path):
    offer = "name a file, folder or glob, or leave it empty for the embedded corpus"
    yield "dataset_path", f"{shown(path)}: no such file or folder; {offer}"
  files = "grain_train_files", "grain_eval_files", "hf_train_files", "hf_eval_files"
  for key in (*files, "grain_train_mixture_config_path"):
    for part in filter(None, getattr(data, key).split(";")):
      path = (part.strip().rpartition(",")[0] if ";" in getattr(data, key) else "") or part
      if "://" not in path and not _is_there(path):
        offer = _near(path) or "; name a file, a folder or a quoted glob"
        yield key, f"{shown(path)}: no such file{offer}"


def _started_from(config: Config) -> Iterator[Problem]:
  """Checkpoints that training begins from and that are plainly absent."""
  checkpoint = config.checkpoint
  own = os.path.join(config.run.base_output_directory, config.run.run_name)
  named = {key: path for key in LOADED if (path := getattr(checkpoint, key))}
  for key, path in named.items():
    offer = "name a run's folder, or one of its checkpoints/STEP"
    if is_url(path):  # looked at as it is read
      continue
    if not os.path.isdir(os.path.expanduser(path)):
      yield key, f"{shown(path)}: no such folder; {offer}"
    elif len(named) > 1:  # which is complained of by itself
      continue
    elif hub.is_model(path) and key == "load_full_state_path":
      problem = "a model of the hub has parameters only; name it by load_parameters_path"
      yield key, f"{shown(path)}: {problem}"
    elif not (hub.is_model(path) or promising(path) or promising(own)):  # `own` would go on
      yield key, f"{shown(path)}: there is no checkpoint in it; {offer}"


def _near(path: str) -> str:
  """`, did you mean 'x'?` for a file of the same folder that is named alike."""
  folder, name = os.path.split(os.path.expanduser(path))
  folder = folder or "."
  return closest(name, os.listdir(folder) if os.path.isdir(folder) else [])


def _is_there(path: str) -> bool:
  found = glob.iglob(os.path.expanduser(path), recursive=True)
  return os.path.exists(os.path.expanduser(path)) or any(map(os.path.exists, found))
