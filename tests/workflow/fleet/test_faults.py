"""What goes wrong on the way: nothing is lost, nothing is done twice, and the reason is written."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from fleet_files import RATES, records, results
from safetensors.torch import load_file, save_file

import prolora
from prolora.files import writing
from prolora.workflow.by_weights.base_pair import BasePair
from prolora.workflow.fleet import migration


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(migration, "_POLL_SECONDS", 0.01)


def counts(summary):
    return [summary.count(state) for state in ("done", "failed", "refused", "left")]


def test_a_run_that_is_killed_goes_on_beside_another_and_nothing_is_done_twice(plan, tmp_path):
    plan.save(tmp_path / "plan.jsonl")
    out = tmp_path / "moved"
    code = f"""
import time, prolora
from prolora.workflow import pair_mover
save = pair_mover.save_result
def slow(done, path, output):
    report = save(done, path, output)
    if done.report.target == "target2":
        print("saved", flush=True)
        time.sleep(60)
    return report
pair_mover.save_result = slow
prolora.migrate({str(tmp_path / "plan.jsonl")!r}, {str(out)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"saved\n"
    assert prolora.read_status(out).at_work == 1
    before = {name: (out / name).stat().st_mtime_ns for name in results(out)}
    child.kill()
    child.wait()
    child.stdout.close()
    assert len(before) == 5 and prolora.read_status(out).at_work == 0
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0]
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items())
    # The fifth got its name, but the process ended before it could say so.
    assert sum(record.get("kept", False) for record in records(out)) == 1
    prolora.migrate(plan, tmp_path / "one")
    assert results(out) == results(tmp_path / "one")
    assert len(records(out)) == 8


@pytest.mark.parametrize("hours", [-1000, 1000])
def test_clocks_that_differ_by_weeks_change_nothing(plan, tmp_path, monkeypatch, hours):
    out, seconds = tmp_path / "moved", 3600 * hours
    assert counts(prolora.migrate(plan, out, shard=(1, 2)))[0] == 4
    first = results(out)
    for file in out.rglob("*"):  # as if another machine had written them
        if file.is_file():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime + seconds))
    for clock in ("time", "monotonic", "perf_counter"):
        real = getattr(time, clock)
        monkeypatch.setattr(time, clock, lambda real=real: real() - seconds)
    assert prolora.read_status(out).done == 4
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0]
    assert first.items() <= results(out).items()
    assert len(records(out)) == 8 and prolora.read_status(out).done == 8
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0] and len(records(out)) == 8


def test_a_lora_that_another_process_has_is_left_to_it(plan, tmp_path, monkeypatch):
    claims, asked = migration.Claims, []

    class Taken(claims):
        def claim(self, entry):
            asked.append(entry)
            return len(asked) > 8 and super().claim(entry)  # busy on the first way round

    monkeypatch.setattr(migration, "Claims", Taken)
    assert counts(prolora.migrate(plan, tmp_path / "moved")) == [8, 0, 2, 0]
    assert len(asked) == 16 and len(records(tmp_path / "moved")) == 8


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(plan, tmp_path, monkeypatch):
    out, real, written = tmp_path / "moved", writing.dump_safetensors, []

    def fill(path, *rest):
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *rest)

    monkeypatch.setattr(writing, "dump_safetensors", fill)
    with pytest.raises(prolora.OutputError, match="free some space"):
        prolora.migrate(plan, out)
    status = prolora.read_status(out)
    assert (status.done, status.failed, status.left) == (3, 0, 5)
    monkeypatch.undo()
    prolora.migrate(plan, out)
    prolora.migrate(plan, tmp_path / "one")
    assert results(out) == results(tmp_path / "one") and len(records(out)) == 8


def test_a_bad_lora_fails_once_and_is_tried_again_when_it_has_changed(collection, plan, tmp_path):
    loras, source, targets = collection
    out, bad = tmp_path / "moved", loras / "b.safetensors"
    good = bad.read_bytes()
    tensors = load_file(bad)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, bad)
    plan = prolora.plan_migration([loras], source, targets, rates=RATES)
    assert counts(prolora.migrate(plan, out)) == [6, 2, 2, 0]
    assert prolora.read_status(out).failed == 2
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [line["error"]["type"] for line in failed].count("NonFiniteWeights") == 2
    assert [line["error"]["code"] for line in failed].count("non-finite-weights") == 2
    assert len(records(out)) == 8 and prolora.migrate(plan, out) and len(records(out)) == 8
    prolora.migrate(plan, out, retry_failed=True)
    assert len(records(out)) == 10
    bad.write_bytes(good)
    plan = prolora.plan_migration([loras], source, targets, rates=RATES)
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0]
    assert len(results(out)) == 8


def test_a_base_that_is_missing_or_another_fails_its_pair_and_no_other(collection, plan, tmp_path):
    targets, out = collection[2], tmp_path / "moved"
    os.rename(targets[0], tmp_path / "away")
    summary = prolora.migrate(plan, out, retries=0)
    assert counts(summary) == [4, 4, 2, 0] and "no such file" in next(iter(summary.reasons))
    shutil.copytree(targets[1], targets[0])
    summary = prolora.migrate(plan, out, retries=0)
    assert counts(summary) == [4, 4, 2, 0] and "plan was made for" in next(iter(summary.reasons))
    shutil.rmtree(targets[0])
    os.rename(tmp_path / "away", targets[0])
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0]


def test_what_the_system_failed_is_tried_again(plan, tmp_path, monkeypatch):
    real, tries = BasePair.plan, []

    def fail_twice(pair, lora, *rest):
        tries.append((lora, pair.target.name))
        if pair.target.name == "target" and tries.count((lora, pair.target.name)) <= 2:
            raise OSError(errno.EIO, "the drive stutters")
        return real(pair, lora, *rest)

    monkeypatch.setattr(BasePair, "plan", fail_twice)
    out = tmp_path / "moved"
    summary = prolora.migrate(plan, out, retries=1)
    assert counts(summary) == [4, 4, 2, 0] and len(records(out)) == 8
    assert counts(prolora.migrate(plan, out)) == [8, 0, 2, 0]


def test_files_that_are_no_plan_and_no_reports_of_a_migration_are_not_replaced(plan, tmp_path):
    lora, out = tmp_path / "loras" / "a.safetensors", tmp_path / "mine"
    with pytest.raises(prolora.OutputError, match="not a plan"):
        plan.save(lora)
    out.mkdir()
    (out / "summary.json").write_text("{}")
    with pytest.raises(prolora.OutputError, match="which prolora did not write"):
        prolora.migrate(plan, out)
    assert [file.name for file in out.iterdir()] == ["summary.json"]
