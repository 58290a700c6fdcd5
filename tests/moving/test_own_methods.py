"""Methods of one's own in `project`, `transfer` and `transfer_many`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import read_header, same_bits

import prolora
from prolora.errors import InvalidOption, OutputExists, ShapeMismatch, UnsupportedTensor

PAGE = Path(__file__).parents[2] / "docs/evidence.md"


def plain(update, source, target):
    return update


def test_a_copy_as_a_function_gives_the_bits_of_copy_and_its_own_name(case, tmp_path):
    outs = [tmp_path / f"{name}.safetensors" for name in ("own", "copy")]
    for out, method in zip(outs, (plain, "copy"), strict=True):
        prolora.transfer(*case, out=out, method=method)
    assert same_bits(*outs)
    assert read_header(outs[0])["prolora.method"] == "plain"
    with pytest.raises(OutputExists):  # what a function does has no digest, so nothing is kept
        prolora.transfer(*case, out=outs[0], method=plain)


def test_a_folder_of_loras_is_moved_by_a_function_on_both_weights(case, tmp_path):
    def doubled(update, W_source, W_target):
        assert W_source.shape == W_target.shape == update.shape
        return 2 * update.up, update.down

    (outcome,) = prolora.transfer_many(case[:1], *case[1:], tmp_path / "moved", method=doubled)
    rows = [row for row in outcome.report.modules if row.reason == "moved by doubled"]
    assert rows and "Your method doubled" in str(outcome.report)
    assert {(round(r.norm_ratio, 5), round(r.copy_distance, 5)) for r in rows} == {(2, 1)}


def test_a_method_with_a_split_of_its_own_is_half_of_prolora():
    source = torch.randn(24, 20, generator=torch.Generator().manual_seed(0))
    target, up, down = source + 0.1, torch.ones(24, 2), torch.ones(2, 20)
    within = replace(prolora.METHODS["prolora"], name="lora-x", split=lambda side: (side.within,))
    without = replace(within, split=lambda side: (side.without,))
    one, other, both = (
        prolora.project((up, down), source, target, rank=4, method=method).dense()
        for method in (within, without, "prolora")
    )
    torch.testing.assert_close(one + other, both)


def test_an_error_of_a_function_names_the_module_that_it_was_moving(case):
    def broken(update, W_source, W_target):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        prolora.transfer(*case, method=broken)
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == (sys.version_info >= (3, 11))
    assert all(re.fullmatch(r"broken was moving (\S*attentions\S+) to \1", note) for note in notes)


def test_a_method_that_is_none_is_refused(case):
    weight, factors = torch.eye(8), (torch.ones(8, 1), torch.ones(1, 8))
    for wrong in (lambda u, *_: (u.down, u.up[:4]), lambda u, *_: (u.up,), lambda *_: None):
        with pytest.raises((ShapeMismatch, UnsupportedTensor)):
            prolora.project(factors, weight, weight, method=wrong)
    with pytest.raises(InvalidOption, match="give yours another name"):
        prolora.transfer(*case, method=replace(prolora.METHODS["copy"], summary="mine"))
    with pytest.raises(ValueError, match=r"choose from auto, prolora, copy$"):
        prolora.project(factors, weight, weight, method="magic")
    with pytest.raises(ValueError, match="'half' looks at no bases and has no `rule`"):
        replace(prolora.METHODS["copy"], name="half", split=lambda side: (0.5 * side.x,))
    with pytest.raises(ValueError, match="return_info"):
        prolora.project(factors, weight, weight, method=plain, return_info=True)


def test_the_method_of_the_page_runs(case, capsys):
    names = dict(zip(("lora", "source", "target"), case, strict=True)) | {"prolora": prolora}
    up, down, weight = torch.ones(8, 1), torch.ones(1, 8), torch.eye(8)
    names |= {"up": up, "down": down, "W_source": weight, "W_target": 3 * weight}
    exec(
        re.search(r"### Try your own.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1],
        names,
    )
    assert capsys.readouterr().out == "norm\n"
    torch.testing.assert_close(names["moved"].dense(), 3 * up @ down)
