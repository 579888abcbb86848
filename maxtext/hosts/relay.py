"""A way to the coordinator that outlives it.

JAX's own client aborts its process, with a stack trace, as soon as the connection to process 0
breaks. It talks to this relay instead, which keeps its end open and says that the other is gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

CHUNK = 1 << 16


class Relay:
  """Listens on this machine for JAX's client and passes on what it says to `coordinator`."""

  def __init__(self, coordinator: str, lost: Callable[[], None]):
    """`lost` is called, in a thread, when the coordinator has ended a connection."""
    host, _, port = coordinator.rpartition(":")
    self._there, self._lost = (host.strip("[]"), int(port)), lost
    self._server = socket.create_server(("127.0.0.1", 0))

  @property
  def address(self) -> str:
    return f"127.0.0.1:{self._server.getsockname()[1]}"

  def start(self, seconds: float) -> bool:
    """Begin to relay once the coordinator answers; false if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      with contextlib.suppress(OSError):
        socket.create_connection(self._there, 5).close()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return True
      time.sleep(0.2)
    return False

  def _accept(self) -> None:
    while True:
      here, _ = self._server.accept()
      try:
        there = socket.create_connection(self._there, 5)
      except OSError:
        self._lost()
        return
      there.settimeout(None)
      for end in (here, there):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      closed = threading.Event()
      for run, ends in ((self._out, (here, there)), (self._back, (there, here))):
        threading.Thread(target=run, args=(*ends, closed), name="relay", daemon=True).start()

  def _out(self, here: socket.socket, there: socket.socket, closed: threading.Event) -> None:
    """From the client to the coordinator, until the client closes."""
    _pass_on(here, there)
    closed.set()
    with contextlib.suppress(OSError):
      there.shutdown(socket.SHUT_RDWR)

  def _back(self, there: socket.socket, here: socket.socket, closed: threading.Event) -> None:
    """From the coordinator to the client, who is not to learn that it has ended."""
    _pass_on(there, here)
    if closed.is_set():
      here.close()
    else:
      self._lost()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
  with contextlib.suppress(OSError):
    while data := source.recv(CHUNK):
      target.sendall(data)
