"""What the threads of each process hear of the others, without any process: a board in memory."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from maxtext.hosts import watch as watches
from maxtext.hosts.group import _verdict
from maxtext.hosts.places import Place
from maxtext.hosts.relay import Relay
from maxtext.hosts.watch import NEWS, Watch


class Board:
  """Stands for the coordination service: notes that all share, and who is missing."""

  def __init__(self):
    self.notes, self.gone = {}, []

  def write(self, key, text):
    self.notes[key] = text

  def below(self, folder):
    notes = dict(self.notes)
    return {k.removeprefix(f"{folder}/"): v for k, v in notes.items() if k.startswith(f"{folder}/")}

  def missing(self):
    return list(self.gone)


@pytest.fixture
def board(monkeypatch):
  """A board on which everything happens within milliseconds."""
  monkeypatch.setattr(watches, "EVERY", 0.005)
  monkeypatch.setattr(watches, "GRACE", 0.01)
  return Board()


@pytest.fixture
def started(board):
  """Watches of three processes; what would end one is noted in its `ends`."""
  made = []
  for number in range(3):
    watch = Watch(Place("host0:1", 3, number, "a test"), 8)
    watch.ends = []
    watch.end = lambda line, code, watch=watch: (watch.leave(), watch.ends.append((line, code)))
    made.append(watch)
  for watch in made:
    watch.start(board)
  yield made
  for watch in made:
    watch.leave()


def soon(holds):
  end = time.monotonic() + 10
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.002)


@pytest.mark.parametrize("asking", [0, 2])
def test_all_processes_stop_after_one_step_however_far_each_has_come(started, asking):
  stops = [None] * 3

  def train(number):
    time.sleep(0.01 * number)
    for finished in range(10, 10_000):
      time.sleep(0.001 * (number + 1))  # each at its own pace, as nothing else holds them
      name = "SIGTERM" if number == asking and finished >= 15 else ""
      if started[number].stop_at(name, finished):
        stops[number] = finished
        return

  threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert len(set(stops)) == 1 and stops[0] > 15


def test_the_answer_for_a_step_is_the_same_however_often_and_late_it_is_asked_for(started):
  for watch, finished in zip(started, (4, 5, 4), strict=True):
    assert not watch.stop_at("SIGTERM" if watch is started[0] else "", finished)
  soon(lambda: all(watch.stopped_by for watch in started))
  assert [watch.stop_at("", 5) for watch in started] == ["", "", ""]
  assert [watch.stop_at("", 6) for watch in started] == ["SIGTERM"] * 3


def test_who_has_left_is_not_waited_for(started, board):
  board.write(f"{NEWS}/left/2", "")
  started[2].leave()
  board.gone = [2]
  started[0].stop_at("SIGINT", 3)
  started[1].stop_at("", 3)
  soon(lambda: started[0].stopped_by and started[1].stopped_by)
  assert not started[0].ends and not started[1].ends


def test_a_death_ends_the_others_with_75_and_its_name(started, board):
  started[1].leave()
  board.gone = [1]
  soon(lambda: started[0].ends and started[2].ends)
  for line, code in (started[0].ends[0], started[2].ends[0]):
    assert line.startswith("process 1 of 3 has died") and code == 75


def test_a_failure_ends_the_others_with_its_code_and_its_line(started, board):
  started[1].leave()
  board.write(f"{NEWS}/failed/1", '{"line": "data.txt:3: broken", "code": 3}')
  soon(lambda: started[0].ends and started[2].ends)
  assert started[2].ends[0] == ("process 1 of 3 ended: data.txt:3: broken", 3)


def test_a_difference_names_every_value_and_who_has_it():
  differing = {1: {"steps": "5"}, 2: {"steps": "5", "seed": None}, 3: {"steps": "6"}}
  assert _verdict({"steps": "4", "seed": "0"}, differing) == [
    "steps: 4 on process 0, 5 on process 1 and 1 more, 6 on process 3; give all processes the same",
    "seed: 0 on process 0, nothing on process 2; give all processes the same",
  ]


@pytest.fixture
def relayed():
  """A client and a coordinator that a relay joins, and whether that has lost the coordinator."""
  lost = threading.Event()
  with socket.create_server(("127.0.0.1", 0)) as server:
    relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", lost.set)
    assert relay.start(5)
    server.accept()[0].close()  # that was to see whether it answers
    host, port = relay.address.split(":")
    client = socket.create_connection((host, int(port)), 5)
    coordinator = server.accept()[0]
    yield client, coordinator, lost
    client.close()
    coordinator.close()


def test_the_relay_carries_both_ways(relayed):
  client, coordinator, _ = relayed
  client.sendall(b"question")
  assert coordinator.recv(99) == b"question"
  coordinator.sendall(b"answer")
  assert client.recv(99) == b"answer"


def test_a_coordinator_that_ends_is_noticed_and_its_client_is_not_told(relayed):
  client, coordinator, lost = relayed
  coordinator.close()
  assert lost.wait(5)
  client.settimeout(0.1)
  with pytest.raises(TimeoutError):
    client.recv(1)


def test_a_client_that_ends_is_no_loss(relayed):
  client, coordinator, lost = relayed
  client.close()
  assert coordinator.recv(1) == b""
  coordinator.close()
  assert not lost.wait(0.2)


def test_a_coordinator_that_never_comes_is_waited_for_so_long():
  assert not Relay("127.0.0.1:1", lambda: None).start(0.3)
