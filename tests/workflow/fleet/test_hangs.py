"""Nothing waits for ever: LoRAs that hang, frozen processes, and a Ray that has ended."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fleet_files import RATES, records, results

import prolora
from prolora.workflow.by_weights.base_pair import BasePair
from prolora.workflow.fleet import migration
from prolora.workflow.fleet.engines import local
from prolora.workflow.fleet.engines.attempts import HungWorker


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(migration, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(local, "_CLOSE_SECONDS", 0.1)


@pytest.fixture
def hang(monkeypatch):
    """Lets the reading of some LoRAs hang, until the test is over."""
    real, over, names = BasePair.plan, threading.Event(), set()

    def plan(pair, lora, *rest):
        # The headers are read before, to make the plan of the migration.
        if Path(lora).stem in names and "header" not in rest:
            over.wait(60)
        return real(pair, lora, *rest)

    monkeypatch.setattr(BasePair, "plan", plan)
    yield names
    over.set()


def counts(summary):
    return [summary.count(state) for state in ("done", "failed", "refused", "left")]


def test_a_lora_that_hangs_is_given_up_and_all_others_move(collection, hang, tmp_path):
    loras, source, targets = collection
    plan = prolora.plan_migration([loras], source, targets[:1], rates=RATES)
    hang.add("b")
    started = time.monotonic()
    summary = prolora.migrate(plan, tmp_path / "moved", time_limit=1.5)
    assert counts(summary) == [3, 1, 1, 0] and time.monotonic() - started < 30
    (reason,) = (text for text in summary.reasons if "1.5 s" in text)
    assert summary.reasons[reason].files == [str(loras / "b.safetensors")]
    hang.clear()
    assert counts(prolora.migrate(plan, tmp_path / "moved")) == [3, 1, 1, 0]
    assert counts(prolora.migrate(plan, tmp_path / "moved", retry_failed=True)) == [4, 0, 1, 0]


def test_where_all_hang_the_run_ends(plan, hang, tmp_path):
    hang |= {"a", "b", "c"}
    with pytest.raises(HungWorker, match="drive or a device may hang"):
        prolora.migrate(plan, tmp_path / "moved", time_limit=0.3)
    hang.clear()
    assert counts(prolora.migrate(plan, tmp_path / "moved", retry_failed=True)) == [8, 0, 2, 0]


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_is_a_number_of_seconds(plan, tmp_path, limit):
    with pytest.raises(prolora.InvalidOption, match="time_limit"):
        prolora.migrate(plan, tmp_path / "moved", time_limit=limit)


def test_what_interrupts_a_run_ends_its_worker_too(plan, tmp_path):
    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prolora.migrate(plan, tmp_path / "moved", progress=interrupt)
    deadline = time.monotonic() + 20
    while any(thread.name == "prolora-worker" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


CHILD = """
import sys, time, prolora
from prolora.workflow import pair_mover
from prolora.workflow.fleet import worker

init, save, beats = worker.PairWorker.__init__, pair_mover.save_result, []

def keep(self, pair, settings, beat):
    beats.append(beat)
    init(self, pair, settings, beat)

def slow(done, path, output):
    report = save(done, path, output)
    print("saved", flush=True)
    for _ in range(10 if sys.argv[3] == "slow" else 0):
        time.sleep(0.5)
        beats[-1]()
    return report

worker.PairWorker.__init__ = keep
pair_mover.save_result = slow
prolora.migrate(sys.argv[1], sys.argv[2])
"""


def start_driver(plan, tmp_path, kind):
    """Another process with the same plan; it has just written its first result."""
    plan.save(tmp_path / "plan.jsonl")
    words = [str(tmp_path / "plan.jsonl"), str(tmp_path / "moved"), kind]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"saved\n"
    return child


def test_what_a_frozen_process_has_claimed_is_taken_over(plan, tmp_path):
    child = start_driver(plan, tmp_path, "fast")
    child.send_signal(signal.SIGSTOP)
    try:
        assert prolora.read_status(tmp_path / "moved").left > 0
        started = time.monotonic()
        summary = prolora.migrate(plan, tmp_path / "moved", time_limit=1.5)
        assert counts(summary) == [8, 0, 2, 0] and 1.5 < time.monotonic() - started < 60
    finally:
        child.send_signal(signal.SIGCONT)
        child.wait(60)  # it finds its own work done, or does it again, to the same files
        child.stdout.close()
    prolora.migrate(plan, tmp_path / "one")
    assert results(tmp_path / "moved") == results(tmp_path / "one")


@pytest.mark.slow
def test_what_a_slow_process_has_claimed_is_left_to_it(collection, tmp_path):
    loras, source, targets = collection
    plan = prolora.plan_migration([loras / "a.safetensors"], source, targets[:1], rates=RATES)
    child = start_driver(plan, tmp_path, "slow")
    assert counts(prolora.migrate(plan, tmp_path / "moved", time_limit=3)) == [1, 0, 0, 0]
    assert child.wait(60) == 0
    child.stdout.close()
    assert len(records(tmp_path / "moved")) == 1
