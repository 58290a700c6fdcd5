"""Names in files may have control characters; messages, reports and logs have none."""

import logging

import pytest
import torch

import prolora
from prolora import check
from prolora.errors import UnsupportedFormat

CLEAR = "\x1b[2J\x1b[31m\r\u202e"
STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(path, **more):
    return {
        f"{path}.lora_down.weight": torch.ones(2, 320),
        f"{path}.lora_up.weight": torch.ones(320, 2),
        **more,
    }


def is_plain(text):
    return all(c.isprintable() or c == "\n" for c in str(text))


def test_errors_spell_control_characters_out():
    with pytest.raises(UnsupportedFormat) as caught:
        prolora.convert(pair(f"lora_unet_{CLEAR}"))
    assert is_plain(caught.value)
    assert r"lora_unet_\x1b[2J\x1b[31m\r\u202e.lora_down.weight" in str(caught.value)
    assert is_plain(caught.value.to_dict()["message"])


def test_reports_and_logs_spell_them_out(caplog):
    tensors = pair(STEM, **{f"{CLEAR}.weight": torch.ones(3)})
    with caplog.at_level(logging.WARNING):
        made = prolora.convert(tensors)
    assert is_plain(made.report) and is_plain(check(tensors))
    assert r"\x1b[2J" in str(made.report)
    messages = [record.getMessage() for record in caplog.records]
    assert messages and all(map(is_plain, messages))


def test_names_in_results_are_kept():
    """Only texts are spelled out: the numbers of a report name tensors as the file does."""
    made = prolora.convert(pair(STEM, **{f"{CLEAR}.weight": torch.ones(3)}))
    assert f"{CLEAR}.weight" in {row.source for row in made.report.modules}
