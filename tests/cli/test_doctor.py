"""`prolora doctor`: what runs here, and where it is computed."""

import json
from pathlib import Path

from typer.testing import CliRunner

from prolora.cli.app import app


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_first_line_is_the_verdict():
    assert run().startswith("✔ ") and "computing on" in run().split("prolora  ")[0]
    assert json.loads(run("--json"))["torch sees a GPU"] in (True, False)


def test_the_cache_is_named_with_its_size_also_before_it_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "a" / "b"))
    assert json.loads(run("--json"))["cache"].startswith(f"{tmp_path / 'a' / 'b'}: 0 ")
    assert "free on the disk" in " ".join(run().split())
    assert not (tmp_path / "a").exists()


def test_a_cache_on_a_drive_that_is_missing_is_no_traceback(tmp_path, monkeypatch):
    """Of such a path not even the root is there, on Windows."""
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "a"))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert json.loads(run("--json"))["cache"].startswith(f"{tmp_path / 'a'}: cannot be read: ")


def test_the_shell_can_complete_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert "--install-completion" in result.output
