"""Settings of a fit refuse values that no fit can use, and name them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from prolora import FitOptions
from prolora.errors import InvalidOption
from prolora.fitting.settings import read_prompts

NAN = math.nan
WRONG: dict[str, tuple[Any, ...]] = {
    "prompts": ("a cat", (1, 2), None),
    "images": (0,),
    "steps": (2.0, 0),
    "fit_steps": (-3, 1.5),
    "size": (100, 0),
    "guidance": (NAN,),
    "target_guidance": (NAN,),
    "target_steps": (0,),
    "rank": (2.5, 0, NAN, "32"),
    "look": (-0.1, 1.1, NAN, "both", None),
    "probes": (-1,),
    "batch": (True,),
    "seed": (-1, "one"),
    "shown_prompts": (-1, 1.5, True),
    "text_encoder": ("project",),
    "format": ("zip",),
    "dtype": ("int8",),
    "max_memory": ("much", NAN),
    "max_vram": ("much", 0, True),
}


@pytest.mark.parametrize("name, value", [(n, x) for n, values in WRONG.items() for x in values])
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidOption, match=name):
        FitOptions(**{name: value})


def test_values_in_range_are_taken():
    assert FitOptions(rank=0.95).rank == 0.95 and FitOptions(rank=8.0).rank == 8
    assert FitOptions(max_memory="2GiB").memory_limit == 2 << 30
    assert FitOptions(("a cat",), size=64, guidance=1).size == 64
    assert FitOptions(["a cat"]) == FitOptions(("a cat",))


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
