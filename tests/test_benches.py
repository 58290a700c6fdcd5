"""The benches measure what they say, and name what there is."""

import html
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
def test_the_peak_of_a_child_is_its_own():
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    child = "from timing import peak_gib; print(peak_gib())"
    parent = (
        "import subprocess, sys; held = b'x' * (1 << 30); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], cwd=BENCH, stdout=subprocess.PIPE, check=True
    )
    assert 0.005 < float(done.stdout) < 0.9


@pytest.mark.parametrize("name", ["sdxl_to_ssd1b", "timing", "loader_matrix"])
def test_a_bench_can_be_imported(name):
    importlib.import_module(name)


def test_stored_keys_of_trainers_can_be_read(monkeypatch):
    """The first is a LoRA of musubi-tuner of which ComfyUI reads 108 modules of 756."""
    monkeypatch.syspath_prepend(BENCH)
    import trainer_files

    version, cells = trainer_files.read_cells("musubi_tuner")
    counts = {cell.model: len(cell.modules) for cell in cells}
    assert "30c658c" in version and 756 in counts.values()
    for file in trainer_files.RESULTS.glob("*.json"):
        for cell in trainer_files.read_cells(file.stem)[1]:
            assert (cell.how == "not obtainable") == (not cell.modules), cell.model
            count = len(cell.modules) * len(cell.suffixes)
            count += len(cell.others) * len(cell.other_suffixes)
            assert len(cell.make_tensors()) == count
            assert trainer_files.unfold_modules(trainer_files.fold_modules(cell.modules)) == {
                **cell.modules
            }


def test_the_figure_of_the_evidence_shows_what_the_stored_rows_give(monkeypatch):
    monkeypatch.syspath_prepend(BENCH / "quality")
    import evidence

    worlds = {name: evidence.read_results(name) for name in evidence.NAMES}
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", evidence.FIGURE.read_text("utf-8"))
    assert json.loads(html.unescape(drawn[1])) == evidence.list_shares(worlds)


def test_table_and_figure_of_the_performance_page_show_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    pytest.importorskip("scipy")
    import svd_table

    rows = json.loads(svd_table.ROWS.read_text())["rows"]
    page = svd_table.PAGE.read_text("utf-8")
    assert svd_table.fill_table(page, rows) == page
    figure = svd_table.FIGURE.read_text("utf-8")
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", figure)
    assert json.loads(html.unescape(drawn[1])) == svd_table.list_points(rows)


def test_tables_of_small_batches_show_the_stored_ratios(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import small_batches

    page = small_batches.PAGE.read_text("utf-8")
    ratios = json.loads(small_batches.KEPT.read_text())["ratios"]
    assert small_batches.fill_tables(page, ratios) == page
    assert "| 8 × 256 × 256, i^-0.5 | 0.40 | 0.46 |" in page


def test_small_batches_compares_equal_results():
    import small_batches

    for name, ours, baseline in small_batches.list_cases(64):
        if name.startswith("project"):
            found, exact = ours(), baseline()
            if isinstance(exact, tuple):
                found, exact = found.dense(), exact[0] @ exact[1]
            assert float((found - exact).norm()) <= 1e-3 * float(exact.norm()), name


@pytest.mark.parametrize(
    ("ratio", "machine", "code", "printed"),
    [
        (0.6, {}, 1, "a: 0.60, kept 0.50"),
        (0.55, {}, 0, "no row of 1 is slower"),
        (0.6, {"processor": "another"}, 0, "not compared"),
        (0.6, {"torch": "0.1"}, 0, "not compared"),
    ],
)
def test_small_batches_fails_at_15_percent_on_the_same_machine_only(
    ratio, machine, code, printed, tmp_path, capsys
):
    import small_batches

    file = tmp_path / "kept.json"
    kept = small_batches.describe_machine() | machine | {"ratios": {"a": 0.5}}
    file.write_text(json.dumps(kept))
    assert small_batches.check_ratios({"a": ratio}, file) == code
    assert printed in capsys.readouterr().out


def test_small_batches_reports_rows_and_files_without_ratios(tmp_path, capsys):
    import small_batches

    file = tmp_path / "kept.json"
    assert small_batches.check_ratios({"new": 9.0}, file) == 0
    assert "no ratios are kept" in capsys.readouterr().out
    file.write_text(json.dumps(small_batches.describe_machine() | {"ratios": {}}))
    assert small_batches.check_ratios({"new": 9.0}, file) == 0
    assert "without a kept ratio:\n  new" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--threads", "2"], ["--largest", "64"]])
def test_small_batches_keeps_only_the_whole_table_on_one_thread(options):
    import small_batches

    with pytest.raises(SystemExit, match="2"):
        small_batches.main(["--save", *options])


def test_table_of_waits_shows_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import waits

    page = waits.PAGE.read_text("utf-8")
    rows = json.loads(waits.KEPT.read_text())["rows"]
    assert waits.fill_table(page, rows) == page
