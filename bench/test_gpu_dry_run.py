"""The GPU check, run as a whole on the CPU at toy size, so that it does not rot without a GPU."""

from gpu.__main__ import main
from gpu.calls import CALLS
from gpu.render import render_results
from gpu.results import FINISHED, read_lines


def test_all_four_calls_run_dry_and_are_not_run_again(tmp_path, capfd):
    known = tmp_path / "none.jsonl"
    words = ["--dry", "--out", str(tmp_path), "--known", str(known)]
    assert main([*words, "--seconds", "0"]) == 0
    assert "left for another call of `bench/gpu.sh why --dry`" in capfd.readouterr().out
    results = tmp_path / "results.jsonl"
    assert not results.exists()
    assert main(words) == 0, capfd.readouterr().out
    lines = read_lines([results])  # checks each line
    for call in CALLS:
        assert [line for line in lines if line["call"] == call and line["name"] == FINISHED], call
    assert all(line["dry"] for line in lines)
    assert not [line for line in lines if line["name"] == FINISHED and "error" in line]
    assert (tmp_path / "logs.tar.gz").exists()
    assert "| truncated_svd |" in render_results(lines)
    size = results.stat().st_size
    assert main(words) == 0
    assert results.stat().st_size == size
    # Results that were brought home count as much as those that lie beside the new ones.
    results.rename(known)
    assert main(words) == 0
    assert not results.exists()
