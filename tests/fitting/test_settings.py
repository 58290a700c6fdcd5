"""Settings of a fit refuse values that no fit can use, and name them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import prolora
from prolora import FitOptions
from prolora.errors import InvalidOption
from prolora.fitting.settings import FitSettings, read_prompts


def test_no_text_of_a_fit_names_an_option_of_the_command_line():
    """Errors reach people who call it from Python or from another program."""
    package = Path(prolora.__file__).parent
    rooms = (package / "fitting",)
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
        ("prompts", "a cat"),
        ("prompts", (1, 2)),
        ("prompts", None),
        ("images", 0),
        ("steps", 2.0),
        ("steps", 0),
        ("fit_steps", -3),
        ("fit_steps", 1.5),
        ("size", 100),
        ("size", 0),
        ("guidance", math.nan),
        ("target_guidance", math.nan),
        ("target_steps", 0),
        ("rank", 2.5),
        ("rank", 0),
        ("rank", math.nan),
        ("rank", "32"),
        *(("look", look) for look in (-0.1, 1.1, math.nan, "both", None)),
        ("probes", -1),
        ("batch", True),
        ("seed", -1),
        ("seed", "one"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any):
    for kind in (FitSettings, FitOptions):
        with pytest.raises(InvalidOption, match=name):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_encoder", "project"),
        ("format", "zip"),
        ("dtype", "int8"),
        ("max_memory", "much"),
        ("max_memory", math.nan),
    ],
)
def test_an_option_of_what_is_written_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidOption, match=name):
        FitOptions(**{name: value})


def test_values_in_range_are_taken():
    assert FitSettings(rank=0.95).rank == 0.95 and FitSettings(rank=8.0).rank == 8
    assert FitOptions(max_memory="2GiB").memory_limit == 2 << 30
    assert FitSettings(("a cat",), size=64, guidance=1).size == 64
    assert FitSettings(["a cat"]) == FitSettings(("a cat",))


def test_where_to_compute_and_what_is_written_change_no_fit():
    """Of what a fit depends on, the text is the same; what is sampled is told apart from it."""
    plain, other = FitOptions(), FitOptions(force=True, format="peft", device="cpu", max_memory=1)
    assert plain.describe_fit() == other.describe_fit()
    assert plain.describe_fit() != FitOptions(fit_steps=3).describe_fit()
    assert plain.describe_samples() == FitOptions(fit_steps=3).describe_samples()
    assert plain.describe_samples() != FitOptions(images=3).describe_samples()


def test_a_file_without_prompts_is_refused(tmp_path):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n \n")
    with pytest.raises(InvalidOption, match="has no prompts"):
        read_prompts(empty)
    with pytest.raises(InvalidOption, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
    empty.write_text("a cat\n\n a dog \n")
    assert read_prompts(empty) == ("a cat", "a dog")
