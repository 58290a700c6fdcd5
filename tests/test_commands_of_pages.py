"""Each command of the page that people find by their program's message runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest
from mini import write_case
from odd_files import make_lora
from safetensors.torch import save_file
from typer.testing import CliRunner

from prolora.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "lora-key-not-loaded.md"
COMMANDS = re.findall(r"```bash\n(.+?)\n```", PAGE.read_text("utf-8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page names."""
    _, source, target = write_case(tmp_path)
    source.rename(tmp_path / "trained-on")
    target.rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs_as_it_is_written(folder, command):
    if "convert" in command:  # names for a program are known of published families
        save_file(make_lora("sdxl", "diffusers"), "lora.safetensors")
    program, *words = shlex.split(command)
    result = CliRunner().invoke(app, words)
    assert program == "prolora" and result.exit_code in (0, 3), result.output
    written = re.search(r"-o (\S+)", command)
    assert written is None or (folder / written[1]).is_file()


def test_the_page_has_a_command_for_each_program():
    sections = PAGE.read_text("utf-8").split("\n## ")[1:]
    assert len(sections) == len(COMMANDS) == 6
    assert all(section.count("```bash") == 1 for section in sections)
