"""Tables fit 80 columns, and show every number they have."""

import re

import pytest


def test_every_table_fits_80_columns(prolora, line, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (
        (*line, "--dry-run"),
        (*line, "--method", "prolora", "--cache=none", "-o", tmp_path / "out.safetensors"),
        ("check", *line[1:]),
        ("check", line[1]),
        ("check", line[3]),
        ("doctor",),
    ):
        code, text, _ = prolora(*words)
        whole = ("wrote ", "prolora ", *"✔⚠✖")  # lines that the terminal breaks
        rows = [row for row in text.splitlines() if not row.startswith(whole)]
        assert code in (0, 3) and max(map(len, rows)) <= 80, words
        cut = text.replace(" … ", "").replace("0…", "").replace("4…8", "")
        assert "…" not in cut or "Φ" in text


def test_a_dry_run_shows_no_numbers_that_it_does_not_have(prolora, line):
    _, text, _ = prolora(*line, "--dry-run")
    assert "–" not in text and "drift" not in text and "8 of 12 modules would move" in text


@pytest.mark.parametrize("width", [20, 79])
def test_a_narrow_terminal_loses_no_number(prolora, case, tmp_path, monkeypatch, width):
    lora, source, target = case
    bases = ("--source", source, "--target", target, "--cache=none")
    line = ("transfer", lora, *bases, "--method", "prolora", "--dry-run")
    monkeypatch.setenv("COLUMNS", "80")
    full = [row.rstrip() for row in prolora(*line)[1].splitlines() if re.search(r"\d", row)]
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = [row.rstrip() for row in prolora(*line)[1].splitlines()]
    rows = [row for row in full if row.startswith((" down_blocks.1 ", " all ", " 24×40 "))]
    cut = [re.sub(r"\d+\.\d$", "", row) for row in rows]  # seconds differ
    assert rows and all(any(row.startswith(part) for row in narrow) for part in cut)
