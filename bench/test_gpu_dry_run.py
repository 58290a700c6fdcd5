"""The GPU check, run as a whole on the CPU at toy size, so that it does not rot without a GPU."""

import sys
import time
from pathlib import Path

import gpu.__main__ as check
import pytest
from gpu import calls, one_kernel, results, worker
from gpu.calls import CALLS
from gpu.render import render_results
from gpu.results import FINISHED, read_lines
from gpu.steps import Bench, Step

from prolora.core.ops import probe


@pytest.fixture
def in_this_process(monkeypatch):
    """Starts no program: that takes most of the time. What it would have started, in words."""
    started = []

    def run_worker(bench, names, deadline):
        monkeypatch.setattr(sys, "argv", ["worker", check.write_order(bench, names, deadline)])
        worker.main()
        return names, ""

    def run_command(bench, log, *command, **_):
        started.append(" ".join(map(str, command[1:4])))
        (bench.logs / log).touch()
        if command[2] == one_kernel.__name__:
            probe.run_op(*command[3:])
        return 0, ""

    monkeypatch.setattr(check, "run_worker", run_worker)
    monkeypatch.setattr(Bench, "run_command", run_command)
    return started


def check_all_calls(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    known = folder / "none.jsonl"
    words = ["--dry", "--out", str(folder), "--known", str(known)]
    assert check.main([*words, "--seconds", "0"]) == check.INCOMPLETE
    assert "left for another call of `bench/gpu.sh sanitize --dry`" in capfd.readouterr().out
    results = folder / "results.jsonl"
    assert not results.exists()
    assert check.main(words) == 0, capfd.readouterr().out
    lines = read_lines([results])  # checks each line
    for call in CALLS:
        assert [line for line in lines if line["call"] == call and line["name"] == FINISHED], call
    assert all(line["dry"] for line in lines)
    assert not [line for line in lines if line["name"] == FINISHED and "error" in line]
    assert (folder / "logs.tar.gz").exists()
    assert "| truncated_svd |" in render_results(lines)
    size = results.stat().st_size
    assert check.main(words) == 0
    assert results.stat().st_size == size
    # Results that were brought home count as much as those that lie beside the new ones.
    results.rename(known)
    assert check.main(words) == 0
    assert not results.exists()


def test_all_steps_run_dry_and_are_not_run_again(tmp_path, capfd, in_this_process):
    check_all_calls(tmp_path, capfd)
    assert in_this_process == [
        "-m prolora doctor",
        "-m pytest -q",
        *["-m gpu.one_kernel small_svd"] * 2,
    ]


@pytest.mark.slow
def test_all_five_calls_run_dry_with_the_programs_that_they_start(tmp_path, capfd):
    check_all_calls(tmp_path, capfd)


@pytest.fixture
def bench(tmp_path):
    machine = {"card": "a card", "date": "2026-01-01", "commit": "abc", "sources": "123"}
    machine["versions"] = "torch 2.9"
    return Bench("ours", tmp_path, machine, "bench/gpu.sh ours", dry=True, step="a step")


def test_a_worker_that_dies_before_its_first_step_fails_the_call(bench, monkeypatch, capsys):
    monkeypatch.setattr(check, "WORKER", [sys.executable, "-S", "-c", "import nowhere_to_find"])
    steps = [Step(name, 0.1, lambda bench: None) for name in ("first", "second")]
    monkeypatch.setattr(calls, "list_steps", lambda bench: steps)
    assert check.run_call(bench, time.time() + 30, bench.out / "none") == check.FAILED
    assert "FAILED ours/first" in capsys.readouterr().out


def test_a_call_without_time_for_a_step_is_incomplete(bench, monkeypatch):
    monkeypatch.setattr(calls, "list_steps", lambda bench: [Step("a", 0.1, lambda bench: None)])
    assert check.run_call(bench, time.time(), bench.out / "none") == check.INCOMPLETE


def test_a_step_whose_tool_is_missing_is_not_done(bench, monkeypatch):
    step = Step("a", 0.1, lambda bench: None, tool="no-such-tool")
    monkeypatch.setattr(calls, "list_steps", lambda bench: [step])
    monkeypatch.setattr(sys, "argv", ["", check.write_order(bench, ["a"], time.time() + 9)])
    worker.main()
    (line,) = results.read_lines([bench.results])
    assert line["name"] == results.FINISHED and "no-such-tool is not installed" in line["error"]


def test_the_log_of_a_build_that_failed_is_packed(tmp_path, monkeypatch):
    def fail(bench):
        (bench.logs / "build.txt").write_text("nvcc: no")
        raise SystemExit("the build failed")

    monkeypatch.setattr(check.build, "install", fail)
    with pytest.raises(SystemExit):
        check.main(["ours", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "logs.tar.gz").exists()
