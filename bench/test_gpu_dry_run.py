"""The GPU check, run as a whole on the CPU at toy size, so that it does not rot without a GPU."""

import sys
from pathlib import Path

import gpu.__main__ as check
import pytest
from gpu import one_kernel, worker
from gpu.calls import CALLS
from gpu.render import render_results
from gpu.results import FINISHED, read_lines
from gpu.steps import Bench


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
            monkeypatch.setattr(sys, "argv", list(command[2:]))
            one_kernel.main()
        return 0, ""

    monkeypatch.setattr(check, "run_worker", run_worker)
    monkeypatch.setattr(Bench, "run_command", run_command)
    return started


def check_all_calls(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    known = folder / "none.jsonl"
    words = ["--dry", "--out", str(folder), "--known", str(known)]
    assert check.main([*words, "--seconds", "0"]) == check.INCOMPLETE
    assert "left for another call of `bench/gpu.sh why --dry`" in capfd.readouterr().out
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
def test_all_four_calls_run_dry_with_the_programs_that_they_start(tmp_path, capfd):
    check_all_calls(tmp_path, capfd)
