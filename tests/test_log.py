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
