"""How the tests of the command line run it."""

import pytest
from mini import write_case

from prolora import cli
from prolora.cli import console


@pytest.fixture
def case(tmp_path):
    return write_case(tmp_path)


@pytest.fixture
def line(case):
    """The words of a transfer without those that say where to."""
    lora, source, target = case
    return ("transfer", lora, "--source", source, "--target", target)


@pytest.fixture
def prolora(monkeypatch, capsys):
    """Runs a command line; gives exit code, standard output and standard error."""
    # rich keeps the COLUMNS that a console was made with, and pytest-xdist sets it.
    for made in (console.out, console.err):
        monkeypatch.setattr(made, "_width", None)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["prolora", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run
