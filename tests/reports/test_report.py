"""A report is built once, reads as sentences, makes a table, and is saved over no other file."""

import dataclasses
import json

import pytest
from mini import write_case

import prolora


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def report(case):
    return prolora.transfer(*case, threshold=0, method="prolora", rank=0.9).report


def test_a_report_cannot_be_changed(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.vectors = 3
    with pytest.raises(AttributeError):
        report.modules.append(report.modules[0])


def test_printing_a_report_gives_the_verdict_and_then_the_numbers(report):
    words, numbers = str(report).split("\n\n")
    assert words == str(report.in_words()) and words[0] in "✔⚠"
    assert numbers.splitlines() == report.sentences()
    assert numbers.startswith("8 of 12 modules moved from source to target; 4 skipped")


def test_the_time_of_writing_is_in_the_report_of_a_file(case, tmp_path):
    report = prolora.transfer(*case, out=tmp_path / "out.safetensors").report
    assert report.seconds.keys() >= {"read", "match", "check", "hash", "write"}


def test_a_module_that_did_not_move_counts_in_no_mean(report):
    for row in report.to_dict()["modules"]:
        moved = row["status"] == "mapped"
        for name in ("norm_ratio", "copy_distance", "strength"):
            assert (row[name] is not None) == moved


def test_a_report_is_saved_as_its_json(report, tmp_path):
    file = tmp_path / "report.json"
    report.save(file)
    assert json.loads(file.read_text()) == json.loads(report.to_json())
    assert json.loads(file.read_text())["totals"]["mapped"] == 8


def test_a_report_replaces_nothing_unasked(report, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"notes")
    with pytest.raises(prolora.errors.OutputError, match="exists"):
        report.save(file)
    assert file.read_bytes() == b"notes"
    report.save(file, overwrite=True)
    assert json.loads(file.read_text())["method"] == "prolora"
