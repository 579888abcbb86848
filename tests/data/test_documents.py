"""Reading files, and what is held out."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxtext.data import documents
from maxtext.data.documents import Document, hold_out
from maxtext.errors import DataError
from maxtext.log import log


def texts(path):
  return [document.text for document in documents.read(str(path), "text")]


def test_a_folder_is_read_whole_in_the_order_of_its_paths(tmp_path):
  for name in ("b.txt", "a/z.md", "a/c/d.py", "e.jsonl"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps({"text": name}) if "jsonl" in name else name)
  assert texts(tmp_path) == ["a/c/d.py", "a/z.md", "b.txt", "e.jsonl"]


def test_hidden_and_other_files_are_left_out(tmp_path):
  (tmp_path / ".git").mkdir()
  for name in ("a.txt", ".hidden.txt", ".git/b.txt", "c.png"):
    (tmp_path / name).write_text(name)
  assert texts(tmp_path) == ["a.txt"]


def test_a_glob_names_files_at_any_depth(tmp_path):
  for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/d.md"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  assert texts(tmp_path / "**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
  assert texts(tmp_path / "x/d.md") == ["x/d.md"]


def test_a_file_with_glob_characters_in_its_name_is_itself(tmp_path):
  (tmp_path / "a[1].txt").write_text("itself")
  assert texts(tmp_path / "a[1].txt") == ["itself"]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), st.booleans())
def test_jsonl_gives_any_text_back(tmp_path_factory, values, escaped):
  file = tmp_path_factory.mktemp("lines") / "a.jsonl"
  lines = [json.dumps({"n": 1, "text": value}, ensure_ascii=escaped) for value in values]
  file.write_bytes("\r\n".join(lines).encode() + b"\n\n")
  assert texts(file) == values


def test_text_is_kept_as_it_is_but_for_a_byte_order_mark(tmp_path):
  (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo \u2028é\n".encode())
  assert texts(tmp_path) == ["one\r\ntwo \u2028é\n"]


BROKEN = {
  "empty.txt": (b"", "empty.txt: the document is empty"),
  "blank.md": (b" \n\t\n", "blank.md: the document is empty"),
  "latin.txt": (b"fine\nna\xefve\n", "latin.txt:2: byte 0xef is not UTF-8"),
  "cut.py": ("é".encode()[:1], "cut.py:1: byte 0xc3 is not UTF-8"),
  "none.jsonl": (b"\n", "none.jsonl: the file is empty"),
  "bad.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2: not JSON"),
  "gap.jsonl": (b'{"text": "a"}\n\n{"text": "b"}\n', "gap.jsonl:2: the line is empty; delete it"),
  "list.jsonl": (b'["a"]', "list.jsonl:1: not an object"),
  "other.jsonl": (b'{"txt": "a", "id": 3}', "other.jsonl:1: no field 'text', did you mean 'txt'"),
  "number.jsonl": (b'{"text": 3}', "number.jsonl:1: 'text' is a int, not text"),
  "void.jsonl": (b'{"text": "a"}\n{"text": " "}', "void.jsonl:2: the document is empty"),
  "half.jsonl": (b'{"text": "a\\ud800"}', "half.jsonl:1: 'text' has half of a surrogate pair"),
  "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name):
  content, message = BROKEN[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as caught:
    texts(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_empty_files_among_others_are_left_out_and_counted(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(log, "propagate", True)
  for name in ("__init__.py", "sub.py"):
    (tmp_path / name).write_text("\n")
  with pytest.raises(DataError, match="all 2 files there are empty"):
    texts(tmp_path)
  (tmp_path / "code.py").write_text("x = 1\n")
  with caplog.at_level("INFO", "maxtext"):
    assert texts(tmp_path) == ["x = 1\n"]
  assert f"{tmp_path}: 2 empty files are left out" in caplog.messages


def test_a_path_that_holds_nothing_is_named(tmp_path):
  with pytest.raises(DataError, match="no such file or folder"):
    texts(tmp_path / "missing")
  with pytest.raises(DataError, match="no file matches"):
    texts(tmp_path / "*.txt")
  with pytest.raises(DataError, match="the folder is empty"):
    texts(tmp_path)
  (tmp_path / "a.csv").write_text("a")
  for path in (tmp_path, tmp_path / "a.csv", tmp_path / "*"):
    with pytest.raises(DataError, match="no file there is .txt, .jsonl, .md or .py, as a.csv"):
      texts(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "a.txt").chmod(0)
  with pytest.raises(DataError, match="a.txt: cannot be read"):
    texts(tmp_path)


def some(values):
  return [Document(value, f"{n}.txt") for n, value in enumerate(values)]


several = st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=2, max_size=30)
fractions = st.floats(0.001, 0.5)


@given(several, fractions)
def test_no_text_is_on_both_sides_and_none_is_lost(values, fraction):
  if len(set(values)) == 1:
    values.append(values[0] + "!")
  train, held = hold_out(some(values), fraction)
  assert not {d.text for d in train} & {d.text for d in held}
  assert sorted(d.name for d in train + held) == sorted(d.name for d in some(values))
  assert train and held


@given(st.lists(st.integers(), min_size=2, max_size=60, unique=True), fractions)
def test_the_share_held_out_is_eval_fraction(numbers, fraction):
  train, held = hold_out(some(map(str, numbers)), fraction)
  assert len(held) == max(1, round(fraction * len(numbers)))


@given(st.lists(st.integers(), min_size=3, max_size=60, unique=True), fractions, st.randoms())
def test_neither_order_nor_names_decide_what_is_held_out(numbers, fraction, random):
  _, held = hold_out(some(map(str, numbers)), fraction)
  random.shuffle(numbers)
  _, again = hold_out(some(map(str, numbers)), fraction)
  assert {d.text for d in held} == {d.text for d in again}


@given(st.lists(st.integers(0, 5), min_size=8, max_size=40), fractions)
def test_a_work_is_held_out_whole(works, fraction):
  whole = [Document(f"text {n}", f"{n}", work=f"work {w}") for n, w in enumerate(works)]
  if len(set(works)) == 1:
    whole.append(Document("more", "more", work="another"))
  train, held = hold_out(whole, fraction)
  assert not {d.work for d in train} & {d.work for d in held}


def test_one_document_gives_its_last_lines():
  text = "".join(f"line {n}\n" for n in range(100))
  (train,), (held,) = hold_out(some([text]), 0.1)
  assert train.text + held.text == text
  assert train.text.endswith("\n")
  assert 0.05 < len(held.text) / len(text) < 0.11


@pytest.mark.parametrize("values", [["same"] * 3, ["x"]])
def test_a_corpus_that_cannot_be_split_is_refused(values):
  with pytest.raises(DataError, match="eval_fraction=0"):
    hold_out(some(values), 0.05)


def test_nothing_is_held_out_at_zero():
  whole = some(["a", "b"])
  assert hold_out(whole, 0) == (whole, [])
