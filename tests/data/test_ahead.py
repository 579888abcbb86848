"""Reading ahead in a thread."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from maxtext.data.ahead import Ahead


class Count:
  """0, 1, 2 ... up to `end`, then what `error` is."""

  def __init__(self, end=10**9, error=StopIteration):
    self.next, self.end, self.error = 0, end, error

  def __next__(self):
    if self.next >= self.end:
      raise self.error("the end")
    self.next += 1
    return self.next - 1

  def get_state(self):
    return {"next": self.next}

  def set_state(self, state):
    self.next = state["next"]


def settle(source, least):
  """Wait until the thread has made as much as it may."""
  until = time.monotonic() + 10
  while source.next < least and time.monotonic() < until:
    time.sleep(0.001)


def test_it_reads_ahead_but_not_further_than_asked():
  source = Count()
  ahead = Ahead(source, 2)
  assert next(ahead) == 0
  settle(source, 4)
  time.sleep(0.05)
  assert source.next == 4  # one taken, two waiting, one in the thread's hand


def test_the_state_is_that_of_the_last_item_taken():
  source = Count()
  ahead = Ahead(source, 3)
  assert ahead.get_state() == {"next": 0}
  next(ahead), next(ahead)
  settle(source, 6)
  assert ahead.get_state() == {"next": 2}


def test_after_closing_or_setting_the_state_it_goes_on_from_there():
  ahead = Ahead(Count(), 2)
  assert [next(ahead), next(ahead)] == [0, 1]
  ahead.close()
  assert next(ahead) == 2
  ahead.set_state({"next": 7})
  assert ahead.get_state() == {"next": 7}
  assert next(ahead) == 7


@pytest.mark.parametrize("error", [StopIteration, ValueError])
def test_an_error_comes_after_the_items_before_it_and_every_time(error):
  ahead = Ahead(Count(3, error), 2)
  assert [next(ahead) for _ in range(3)] == [0, 1, 2]
  for _ in range(2):
    with pytest.raises(error, match="the end"):
      next(ahead)
  assert ahead.get_state() == {"next": 3}


@pytest.mark.parametrize("how", ["close", "forget", "end"])
def test_no_thread_is_left(how):
  before = threading.active_count()
  ahead = Ahead(Count(3), 2)
  next(ahead)
  if how == "close":
    ahead.close()
  elif how == "end":
    assert [*iter(lambda: next(ahead, None), None)] == [1, 2]
  else:
    del ahead
    gc.collect()
  assert threading.active_count() == before


def test_the_interpreter_ends_quietly_while_the_thread_is_at_work():
  code = """
from maxtext.data.pipeline import train_batches
from tests.data.cases import corpus_of, numbered, section
batches = [
  train_batches(corpus_of(numbered([40] * 2000)), section(packer, num_epoch=-1), 512, 64)
  for packer in ("first_fit", "concat_then_split")
]
for each in batches:
  next(each)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
