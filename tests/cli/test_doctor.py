"""`prolora doctor`: what is installed, and what is missing."""

import json
from importlib import metadata

import pytest
from typer.testing import CliRunner

from prolora.cli import doctor
from prolora.cli.app import app

REQUIRES = [
    "torch>=2.4",
    'matplotlib>=3.8; extra == "plot"',
    'surely-not-installed>=1; extra == "plot"',
    'numpy; extra == "hub"',
    'pytest>=8; extra == "test"',
]


@pytest.fixture
def required(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_missing_comes_with_the_command_that_installs_it(required):
    facts = json.loads(run("--json"))
    assert facts["extra plot"] == "no surely-not-installed (pip install 'prolora[plot]')"
    assert facts["extra hub"].startswith("numpy ") and "extra test" not in facts
    assert facts["torch sees a GPU"] in (True, False)


def test_the_first_line_is_the_verdict(required):
    assert run().startswith("✔ ") and "computing on" in run().split("prolora  ")[0]


def test_the_cache_is_named_with_its_size_also_before_it_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "a" / "b"))
    assert json.loads(run("--json"))["cache"].startswith(f"{tmp_path / 'a' / 'b'}: 0 ")
    assert "free on the disk" in " ".join(run().split())
    assert not (tmp_path / "a").exists()


def test_a_source_tree_without_metadata_has_no_extras(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert doctor.list_extras() == []


def test_the_shell_can_complete_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert "--install-completion" in result.output
