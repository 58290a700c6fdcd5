"""Each command of README and of the page "lora key not loaded" runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest
from mini import write_case
from odd_files import make_lora
from safetensors.torch import save_file
from typer.testing import CliRunner

from prolora.cli.app import app

ROOT = Path(__file__).parents[1]
FAMILY = ROOT / "examples" / "icon_family" / "weights"
PAGE = ROOT / "docs" / "lora-key-not-loaded.md"
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"```bash\n(.+?)\n```", PAGE.read_text("utf-8"))
TABLE = re.findall(r"\| `(prolora .+?)` \|", README)
TRANSCRIPTS = dict(re.findall(r"```console\n\$ (.+?)\n(.+?)\n```", README, re.DOTALL))


def run(command):
    program, *words = shlex.split(command)
    assert program == "prolora"
    return CliRunner().invoke(app, words, env={"COLUMNS": "80"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page names."""
    _, source, target = write_case(tmp_path)
    source.rename(tmp_path / "trained-on")
    target.rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The shipped models and LoRAs, under the names of README."""
    files = {"source": "source", "sdxl": "source", "pruned": "pruned", "ssd-1b": "pruned"}
    files |= {"flux1": "apart", "tuned": "far", "loras": "loras"}
    files |= {"prompts.safetensors": "prompts.safetensors", "prompts.txt": "prompts.txt"}
    for name, kept in (("lora", "neon"), ("neon", "neon"), ("a", "neon"), ("b", "duotone")):
        files[f"{name}.safetensors"] = f"loras/{kept}.safetensors"
    try:
        for name, path in files.items():
            (tmp_path / name).symlink_to(FAMILY / path)
    except OSError:
        pytest.skip("this system makes no symbolic links without a privilege")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_without_alphas(path):
    """A LoRA for SDXL of rank 4 and alpha 2, which only its header names."""
    tensors = {
        key: x.repeat_interleave(4, int("lora_up" in key)).contiguous()
        for key, x in make_lora("sdxl", "kohya").items()
        if not key.endswith(".alpha")
    }
    trained = {"ss_network_dim": "4", "ss_network_alpha": "2"}
    save_file(tensors, path, trained | {"ss_base_model_version": "sdxl_base_v1-0"})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs_as_it_is_written(folder, command):
    if "convert" in command:  # names for a program are known of published families
        save_file(make_lora("sdxl", "diffusers"), "lora.safetensors")
    result = run(command)
    assert result.exit_code in (0, 3), result.output
    written = re.search(r"-o (\S+)", command)
    assert written is None or (folder / written[1]).is_file()


def test_the_page_has_a_command_for_each_program():
    sections = PAGE.read_text("utf-8").split("\n## ")[1:]
    assert len(sections) == len(COMMANDS) == 6
    assert all(section.count("```bash") == 1 for section in sections)


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.split()[1])
def test_a_command_of_the_readmes_table_runs_as_it_is_written(family, command):
    lora = family / "lora.safetensors"
    if "convert" in command or "extract" in command:  # a link into the family is not written to
        lora.unlink()
    if "convert" in command:
        save_file(make_lora("sdxl", "diffusers"), lora)
    # A fit takes a minute: what its command is refused for, a dry run is refused for.
    result = run(command + " --dry-run" * ("fit" in command))
    assert result.exit_code == 0, result.output
    written = re.search(r"-o (\S+)", command)
    assert written is None or (family / written[1]).exists() != ("fit" in command)


@pytest.mark.parametrize("command", TRANSCRIPTS, ids=lambda command: command.split()[1])
def test_the_readme_shows_what_is_printed(family, command):
    write_without_alphas("style.safetensors")
    printed = run(command).output
    assert [line.rstrip() for line in printed.splitlines()] == TRANSCRIPTS[command].split("\n")


def test_the_readme_has_a_row_for_each_job_and_two_transcripts():
    assert [command.split()[1] for command in TRANSCRIPTS] == ["check", "transfer"]
    assert len(TABLE) == 8
