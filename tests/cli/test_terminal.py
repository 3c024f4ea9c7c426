"""That a command at work says so: by a line where no bar can move."""

import io
import re
import time

import pytest
from rich.console import Console

from polyfuse.cli import _terminal
from polyfuse.cli._terminal import activity


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(_terminal, "SILENCE", 0.05)
    with activity(Console(file=io.StringIO()), "measuring", 3) as shown:
        time.sleep(0.2)
        shown.update("gated_rms_norm", advance=2)
        time.sleep(0.2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "0 s: measuring 0/3" in lines
    assert lines[-1] == "0 s: gated_rms_norm 2/3"
    time.sleep(0.15)
    assert capsys.readouterr().err == ""  # it ends with the block


def test_an_error_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(_terminal, "SILENCE", 0.05)
    with pytest.raises(ValueError, match="no"), activity(Console(file=io.StringIO()), "measuring"):
        raise ValueError("no")
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(_terminal, "SILENCE", 0.05)
    file = Terminal()
    with activity(Console(file=file, width=80, force_terminal=True), "[measuring]", 3) as shown:
        shown.update(advance=1)
        time.sleep(0.3)
    assert re.search(r"\[measuring\].*1/3", file.getvalue())
    assert capsys.readouterr().err == ""
