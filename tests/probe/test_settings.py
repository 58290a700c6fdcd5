"""Settings of a probing refuse values that no probing can use, and name them."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import prolora
from prolora.errors import InvalidOption
from prolora.probe import FitSettings, fit_lora
from prolora.probe.settings import Probing, read_prompts


def test_fit_lora_takes_every_setting_with_its_default():
    parameters = inspect.signature(fit_lora).parameters
    for field in fields(FitSettings):
        assert parameters[field.name].default == field.default, field.name


def test_no_text_of_probing_names_an_option_of_the_command_line():
    """Errors reach people who call it from Python or from another program."""
    package = Path(prolora.__file__).parent
    rooms = package / "probe", package / "workflow" / "by_probing"
    named = [
        f"{file.relative_to(package)}: {found}"
        for room in rooms
        for file in sorted(room.rglob("*.py"))
        for found in re.findall(r"(?<![\w-])--[a-z][a-z-]+", file.read_text("utf-8"))
    ]
    assert not named


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 2.5),
        ("rank", 0),
        ("rank", math.nan),
        ("rank", "32"),
        ("start", "one"),
        ("steps", 0),
        ("steps", 1.5),
        ("probes", -1),
        ("batch", True),
        ("damping", math.inf),
        ("max_memory", "2GiB"),
    ],
)
def test_a_fit_setting_out_of_range_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidOption, match=name):
        FitSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", "a cat"),
        ("prompts", (1, 2)),
        ("prompts", None),
        ("images", 0),
        ("steps", 2.0),
        ("fit_steps", -3),
        ("size", 100),
        ("size", 0),
        ("guidance", math.nan),
        ("target_guidance", math.nan),
        ("target_steps", 0),
        ("start", "one"),
    ],
)
def test_a_probing_out_of_range_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidOption, match=name):
        Probing(**{name: value})


def test_values_in_range_are_taken():
    assert FitSettings(rank=0.95, max_memory=1).share_memory(2) == 0
    assert FitSettings(rank=8.0).share_memory(2) is None
    assert Probing(("a cat",), size=64, guidance=1).size == 64


def test_a_file_without_prompts_is_refused(tmp_path):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n \n")
    with pytest.raises(InvalidOption, match="has no prompts"):
        read_prompts(empty)
    with pytest.raises(InvalidOption, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
    empty.write_text("a cat\n\n a dog \n")
    assert read_prompts(empty) == ("a cat", "a dog")
