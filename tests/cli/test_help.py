"""What the help says: examples for every command, options in panels, exit codes."""

import re

import pytest

from prolora import __version__

COMMANDS = ["transfer", "fit", "check", "demo", "doctor"]


def flatten(text):
    """The text without the frames of its panels and its line breaks."""
    return " ".join(re.sub("[│╭╰─╮╯]", " ", text).split())


def test_the_version_is_told(prolora):
    assert prolora("--version")[:2] == (0, f"prolora {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_short_help_with_an_example(prolora, command):
    code, short, _ = prolora(*command.split(), "-h")
    assert code == 0 and short == prolora(*command.split(), "--help")[1]
    assert re.search(rf"Examples? prolora {command} ?", flatten(short))
    # rich leaves no bracket of its markup behind
    assert "[/" not in short and "[bold" not in short


@pytest.mark.parametrize("command", ["transfer", "fit", "merge", "convert", "extract"])
def test_no_word_of_the_help_is_cut(prolora, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "79")  # what a console of Windows leaves of 80
    _, text, _ = prolora(command, "--help-all" if command in ("transfer", "fit") else "-h")
    assert "…" not in text.replace("FACTOR,…", "") and "--output" in text


def test_the_short_help_of_transfer_fits_a_screen_and_names_the_long_one(prolora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "79")  # what a console of Windows leaves of 80
    _, text, _ = prolora("transfer", "-h")
    options = text.partition("Examples")[0]
    assert len(options.splitlines()) <= 48
    assert "--help-all" in options and "--source" in options and "--max-memory" not in options


def test_the_short_help_of_fit_has_what_most_people_need(prolora, monkeypatch):
    monkeypatch.setenv("COLUMNS", "79")  # what a console of Windows leaves of 80
    short, whole = (prolora("fit", flag)[1] for flag in ("-h", "--help-all"))
    basic = ("source", "target", "prompts", "images", "size", "rank", "max-vram", "output")
    for name in (*basic, "report", "help-all"):
        assert f"--{name} " in short or f"--{name}," in short, name
    assert len(set(re.findall(r"^│ --([\w-]+)", short, re.M)) - {"help"}) <= 10
    for name in ("fit-steps", "force", "target-steps", "guidance", "device"):
        assert f"--{name} " not in short.partition("Examples")[0] and f"--{name} " in whole, name
    for name in ("probes", "held-out", "batch", "seed", "lora-guidance"):
        assert f"--{name}" not in whole  # for studies, in Python
