"""The forms of --out-rank."""

import pytest
from mini import lora_tensors, write_case

import prolora
from prolora.workflow.out_rank import is_out_rank, parse_percentage, parse_size_limit


@pytest.mark.parametrize(
    "text, size",
    [
        ("100MB", 10**8),
        ("1.5 GiB", 3 << 29),
        ("900k", 900_000),
        ("5000B", 5000),
        (" 2mib ", 2 << 20),
    ],
)
def test_a_number_with_a_unit_is_the_size_of_a_file(text, size):
    assert parse_size_limit(text) == size and is_out_rank(text)
    assert parse_percentage(text) is None


@pytest.mark.parametrize("form", ["100", "exact", "50%", "MB", "0MB", "-1MB", "half", "", 100, 0.5])
def test_nothing_else_is_a_size(form):
    assert parse_size_limit(form) is None
    assert is_out_rank(form) == (form in ("exact", "50%", 100, 0.5))


def test_a_share_of_the_rank_is_one_of_the_loras_own_where_updates_are_added(tmp_path):
    """Blocks that the target lacks are added to their neighbours, which then have higher ranks."""
    lora, source, target = write_case(tmp_path)
    options = {"dropped": "sum", "method": "copy"}
    whole = prolora.transfer(lora, source, target, **options).adapter
    assert max(update.rank for update in whole.updates.values()) == 8
    halved = prolora.transfer(lora, source, target, out_rank="50%", **options)
    assert {update.rank for update in halved.adapter.updates.values()} == {2}
    assert {row.rank_in for row in halved.report.rows("mapped")} == {4}


def test_a_module_that_only_others_are_added_to_keeps_a_share_of_their_rank(tmp_path):
    _, source, target = write_case(tmp_path)
    last = {key: x for key, x in lora_tensors().items() if "transformer_blocks_2" in key}
    done = prolora.transfer(last, source, target, out_rank="50%", dropped="sum", method="copy")
    assert {update.rank for update in done.adapter.updates.values()} == {2}
