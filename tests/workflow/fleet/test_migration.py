"""Migrations: whole results under names of their own, once, however often and wherever it runs."""

import json

from fleet_files import results

import prolora
from prolora.workflow.fleet.plan import Plan


def test_every_lora_is_on_every_target_and_what_is_none_is_a_line_with_its_reason(plan, tmp_path):
    plan.save(tmp_path / "plan.jsonl")
    summary = prolora.migrate(tmp_path / "plan.jsonl", tmp_path / "moved")
    assert Plan.read(tmp_path / "plan.jsonl").digest == plan.digest
    assert [summary.count(s) for s in ("total", "done", "refused", "failed")] == [10, 8, 2, 0]
    assert len(results(tmp_path / "moved")) == 8
    lines = (tmp_path / "moved" / "failed.jsonl").read_text().splitlines()
    errors = [json.loads(line)["error"] for line in lines]
    assert ["not a safetensors file" in error["message"] for error in errors] == [True] * 2
    assert [error["code"] for error in errors] == ["refused"] * 2
    status = prolora.read_status(tmp_path / "moved")
    assert (status.done, status.refused, status.left, status.at_work) == (8, 2, 0, 0)


def test_shards_in_any_order_and_twice_give_the_folder_of_one_run(plan, tmp_path):
    prolora.migrate(plan, tmp_path / "one")
    for number in (3, 1, 2, 1):
        prolora.migrate(plan, tmp_path / "shards", shard=(number, 3))
    assert results(tmp_path / "shards") == results(tmp_path / "one")
