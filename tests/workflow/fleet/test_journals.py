"""Journals and results as strangers, crashes and drives leave them."""

import json
import os
import random

import pytest
import torch
from fleet_files import results
from safetensors.torch import load_file, save_file
from test_plan_files import ODD

import prolora
from prolora.workflow.fleet.records import JournalReader, Record


@pytest.fixture
def moved(plan, tmp_path):
    prolora.migrate(plan, tmp_path / "moved")
    return tmp_path / "moved"


def states(status):
    return [getattr(status, state) for state in ("done", "failed", "refused", "left")]


def test_odd_lines_of_a_journal_count_for_nothing(plan, moved, caplog):
    (journal,) = (moved / "journal").iterdir()
    head, *lines = map(json.loads, journal.read_text().splitlines())
    edited = [lines[0] | {name: odd} for name in lines[0] for odd in ODD]
    edited += [{"journal": 1, "plan": odd} for odd in ODD]
    texts = [json.dumps(line) for line in [head, *edited, *ODD]]
    texts += ["[" * 10_000, "{", "9" * 5000, json.dumps(head)]
    (moved / "journal" / "odd.jsonl").write_text("".join(f"{text}\n" for text in texts))
    (moved / "journal" / "bytes.jsonl").write_bytes(random.Random(0).randbytes(20_000))
    (moved / "journal" / "endless.jsonl").write_bytes(b"x" * (3 << 20))
    assert states(prolora.read_status(moved)) == [8, 0, 2, 0]
    assert "odd.jsonl" in caplog.text and "it does not count" in caplog.text
    summary = prolora.migrate(plan, moved)
    assert summary.count("done") == 8 and results(moved)


def test_a_journal_that_is_a_pipe_is_passed_over(moved):
    os.mkfifo(moved / "journal" / "pipe.jsonl")
    assert states(prolora.read_status(moved)) == [8, 0, 2, 0]


def test_every_flip_of_a_journal_leaves_results_where_results_are(moved):
    (journal,) = (moved / "journal").iterdir()
    content, chosen = journal.read_bytes(), random.Random(0)
    for _ in range(400):
        bit = chosen.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        journal.write_bytes(changed)
        for _, record in JournalReader(moved).read_new():
            assert not record.out or record.out.startswith("loras/")
            assert record.out.count("/") in (0, 2) and ".." not in record.out.split("/")


@pytest.mark.parametrize("out", ["../x", "/x", "loras/../x", "loras/target/..", "loras/a/b/c", "x"])
def test_a_journal_names_no_result_elsewhere(plan, moved, out):
    (journal,) = (moved / "journal").iterdir()
    head, *lines = map(json.loads, journal.read_text().splitlines())
    lines = [head, *(line | {"out": out} for line in lines)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert states(prolora.read_status(moved)) == [0, 0, 2, 8]


def test_a_result_that_was_cut_is_not_done_and_is_made_again(plan, moved):
    whole = results(moved)
    name = min(whole)
    (moved / name).write_bytes((moved / name).read_bytes()[:-7])
    assert states(prolora.read_status(moved)) == [7, 0, 2, 1]
    assert prolora.migrate(plan, moved).count("done") == 8 and results(moved) == whole


def test_a_result_that_somebody_changed_is_not_made_again_over_it(plan, moved):
    name = min(results(moved))
    mine = {"mine": torch.ones(3)}
    save_file(mine, moved / name, {"prolora.method": "copy"})
    before = (moved / name).read_bytes()
    assert prolora.migrate(plan, moved).count("done") == 7
    assert (moved / name).read_bytes() == before


def test_results_are_compared_byte_by_byte(moved):
    assert prolora.read_status(moved, verify=True).damaged == {}
    names = sorted(results(moved))
    for name in names[:2]:
        content = bytearray((moved / name).read_bytes())
        content[len(content) // 2] ^= 16
        (moved / name).write_bytes(content)
    status = prolora.read_status(moved, verify=True)
    assert sorted(status.damaged) == names[:2] and status.done == 8
    assert prolora.read_status(moved).damaged is None


def test_a_result_that_another_result_took_the_place_of_is_named(collection, moved, tmp_path):
    loras, source, targets = collection
    lora = tmp_path / "b.safetensors"
    save_file({k: t + 1 for k, t in load_file(loras / "b.safetensors").items()}, lora)
    (result,) = (moved / "loras" / "target").glob("b-*")
    (made,) = prolora.transfer_many([lora], source, targets[0], tmp_path / "other")
    assert made.out.stat().st_size == result.stat().st_size
    made.out.replace(result)
    status = prolora.read_status(moved, verify=True)
    assert (
        status.done == 8
        and "made of something else" in status.damaged[f"loras/target/{result.name}"]
    )


def test_a_project_that_keeps_plans_in_a_folder_of_that_name_stays_as_it_is(plan, tmp_path):
    project = tmp_path / "project"
    (project / "plans").mkdir(parents=True)
    plan.save(project / "plans" / "mine.jsonl")
    for name in ("summary.json", "summary.html", "failed.jsonl"):
        (project / name).write_text("mine")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(prolora.OutputError, match="which prolora did not write"):
        prolora.migrate(plan, project)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_the_error_of_an_older_journal_is_read():
    line = {"key": "k", "lora": "a", "source": "s", "target": "t", "status": "failed"}
    older = Record.from_dict(line | {"error": "LowCoverage", "reason": "too few"}, "a journal")
    assert older.error == {"type": "LowCoverage", "code": "refused", "message": "too few"}
    assert older.reason == "too few" and Record.from_dict(json.loads(older.to_line()), "") == older
    with pytest.raises(prolora.UnsupportedFormat, match="error cannot be"):
        Record.from_dict(line | {"error": {"type": 1}}, "a journal")
