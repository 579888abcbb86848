"""Process 0 speaks, the others only of errors, and neither ever stops a run."""

import sys

from maxtext import log as logs


def test_process_zero_speaks_in_bare_lines(capsys):
  logs.start()
  logs.log.info("parameters: 10")
  logs.log.debug("not this")
  assert capsys.readouterr().out == "parameters: 10\n"


def test_other_processes_speak_only_of_errors_and_say_who_they_are(capsys):
  logs.start(process=3)
  logs.log.info("parameters: 10")
  logs.log.error("the disk is full")
  assert capsys.readouterr().out == "[3] the disk is full\n"


def test_debug_shows_more(capsys):
  logs.start(debug=True)
  logs.log.debug("cache hit")
  assert capsys.readouterr().out == "cache hit\n"


def test_lines_go_above_what_draws_at_the_foot(capsys):
  logs.start()
  caught = []
  with logs.above(caught.append):
    logs.log.info("one")
  logs.log.info("two")
  assert (caught, capsys.readouterr().out) == (["one"], "two\n")


def test_a_reader_that_went_away_does_not_stop_the_run(capsys, monkeypatch):
  class Closed:
    def write(self, _: str) -> None:
      raise BrokenPipeError(32, "Broken pipe")

  logs.start()
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", Closed())
    logs.log.info("one")
    logs.log.info("two")
  assert capsys.readouterr().err == "standard output: Broken pipe; the run goes on in silence\n"
  logs.start()


class Interrupted:
  """A stream that a signal interrupts while it writes: what handles it logs, too."""

  def __init__(self, stream) -> None:
    self.stream, self.busy, self.interrupt = stream, False, lambda: None

  def write(self, text: str) -> None:
    if self.busy:
      raise RuntimeError("reentrant call inside <_io.BufferedWriter name=1>")
    self.busy, interrupt, self.interrupt = True, self.interrupt, lambda: None
    interrupt()
    self.stream.write(text)
    self.busy = False

  def flush(self) -> None:
    self.stream.flush()


def test_a_line_of_a_handler_of_signals_comes_after_the_one_that_it_interrupts(capsys, monkeypatch):
  logs.start()
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", stream := Interrupted(sys.stdout))
    stream.interrupt = lambda: logs.log.info("SIGTERM: stopping")
    logs.log.info("step 1")
  assert capsys.readouterr() == ("step 1\nSIGTERM: stopping\n", "")


def test_a_line_that_interrupts_others_that_write_is_kept_for_the_next(capsys, monkeypatch):
  logs.start()
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stdout", stream := Interrupted(sys.stdout))
    stream.interrupt = lambda: logs.log.info("SIGTERM: stopping")
    stream.write("a table\n")
    logs.log.info("step 1")
  assert capsys.readouterr() == ("a table\nSIGTERM: stopping\nstep 1\n", "")
