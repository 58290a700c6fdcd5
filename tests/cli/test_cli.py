"""The command line: exit codes, JSON, tables, files."""

import html
import json
import os
import re

import pytest
import torch
from lora_files import read_lora, same_bits
from mini import lora_tensors, source_weights, write_folder
from safetensors.torch import save_file
from spectra import related


def test_a_lora_that_needs_no_change_is_said_to_work_as_it_is_and_still_written(
    prolora, case, tmp_path
):
    lora, source, _ = case
    names = {name: related(weight, 0.01, 50) for name, weight in source_weights().items()}
    target, out = write_folder(tmp_path / "near", names), tmp_path / "out.safetensors"
    line = ("transfer", lora, "--source", source, "--target", target, "-o", out)
    code, text, _ = prolora(*line, "--report", tmp_path / "report.html")
    assert code == 0 and text.startswith("✔ This should work: near differs")
    assert "The file works on near as it is.\n" in text and f"wrote {out}" in text
    assert "The file works on near as it is." in (tmp_path / "report.html").read_text()
    assert same_bits(lora, out)
    told = json.loads(prolora(*line, "--json", "--overwrite")[1])
    assert told["works_as_it_is"] and "The file works on near as it is." in told["in_words"]
    assert not json.loads(prolora(*line, "--json", "--strength", "0.5", "--overwrite")[1])[
        "works_as_it_is"
    ]


def test_json_says_moved_of_a_lora_on_another_base_and_written_of_any_other(
    prolora, line, case, tmp_path
):
    (lora, source, _), out = case, ("-o", tmp_path / "out.safetensors", "--overwrite", "--json")
    tuned = {name: related(weight, 0.01, 50) for name, weight in source_weights().items()}
    tuned = write_folder(tmp_path / "tuned", tuned)
    for words, status in (
        ((*line, *out, "--dry-run"), "would move"),
        ((*line, *out), "moved"),
        (("convert", lora, *out, "--out-rank", "2"), "written"),
        (("merge", lora, lora, *out), "written"),
        (("extract", source, tuned, *out, "--dry-run"), "would write"),
    ):
        assert json.loads(prolora(*words)[1])["status"] == status, words


def test_one_bad_lora_stops_no_other_and_the_exit_code_says_so(prolora, case, tmp_path):
    lora, source, target = case
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(lora.read_bytes()[:-9])
    folder, report = tmp_path / "moved", tmp_path / "report.json"
    line = ("transfer", bad, lora, "--source", source, "--target", target, "-o", folder)
    code, text, complaint = prolora(*line, "--report", report)
    assert code == 2 and "1 of 2 LoRAs were not moved: bad.safetensors" in complaint
    assert "download it again" in text and "lora.safetensors" in text
    assert [p.name for p in folder.iterdir()] == ["lora.safetensors"]
    first, second = json.loads(report.read_text())
    assert first["error"]["type"] == "UnsupportedFormat" and second["totals"]["mapped"] == 8


def test_subspaces_are_kept_in_the_default_cache_unless_told_not_to(
    prolora, line, tmp_path, monkeypatch, aged
):
    folder = tmp_path / "default"
    monkeypatch.setenv("PROLORA_CACHE", str(folder))
    line += ("--method", "prolora", "-o", tmp_path / "out.safetensors")
    code, _, _ = prolora(*line, "--cache=none")
    assert code == 0 and not folder.exists()
    code, _, _ = prolora(*line, "--overwrite")
    assert code == 0 and list(folder.rglob("*.safetensors"))
    assert len(list(folder.rglob("*.safetensors"))) == 16
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert prolora(*line)[0] == 0  # a default that cannot be made costs only time


def test_outputs_are_named_as_their_format_needs(prolora, case, tmp_path):
    lora, source, target = case
    second = tmp_path / "second.safetensors"
    second.write_bytes(lora.read_bytes())
    line = ("--source", source, "--target", target, "-o")
    folder = tmp_path / "peft"
    assert prolora("transfer", lora, second, *line, folder, "--format", "peft")[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == ["lora", "second"]
    for format, suffix in (("auto", ""), ("kohya", ".safetensors")):
        moved = tmp_path / format
        words = ("--source", target, "--target", target, "--again", "-o", moved, "--format", format)
        assert prolora("transfer", folder / "lora", folder / "second", *words)[0] == 0
        assert sorted(p.name for p in moved.iterdir()) == [f"lora{suffix}", f"second{suffix}"]
        assert read_lora(moved / f"lora{suffix}").updates


def test_info_says_what_this_installation_can_do(prolora):
    code, text, _ = prolora("doctor", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["torch"] == torch.__version__
    assert re.fullmatch(r"yes|no \(.+\)", facts["compiled extension"])
    assert re.fullmatch(r"[1-9]\d*|0 \(.+\)", str(facts["GPUs that run the kernels"]))
    ops = {name: value for name, value in facts.items() if name.startswith("op ")}
    assert ops and all(
        re.fullmatch(r"cpu: (extension|torch \(.+\)); gpu: \w+", value) for value in ops.values()
    )
    code, text, _ = prolora("doctor")
    assert code == 0 and all(name in text for name in facts)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("shown", [(), ("--json",)])
def test_a_dry_run_of_several_says_which_cannot_be_moved_and_why(prolora, case, tmp_path, shown):
    lora, source, target = case
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    line = ("transfer", bad, lora, "--source", source, "--target", target, "--dry-run")
    code, text, errors = prolora(*line, *shown)
    assert code == 2 and "1 of 2 LoRAs cannot be moved: bad.safetensors" in errors
    assert "bad.safetensors: not a safetensors file" in (errors if shown else text)
    if "--json" in shown:
        first, second = json.loads(text)
        assert (first["status"], second["status"]) == ("failed", "would move")
        assert first["out"] is second["out"] is None
    elif not shown:
        assert "1 failed, 1 would move" in text


def test_a_lora_is_moved_once_and_again_only_when_asked(prolora, case, tmp_path):
    lora, source, target = case
    moved = tmp_path / "moved.safetensors"
    line = ("--source", source, "--target", target, "--method", "copy")
    assert prolora("transfer", lora, *line, "-o", moved)[0] == 0
    code, text, _ = prolora("check", moved)
    assert code == 3 and re.search(r"moved before +from source to target", text)  # no known family
    for end in (("-o", tmp_path / "again.safetensors"), ("--dry-run",)):
        code, _, errors = prolora("transfer", moved, *line, *end)
        assert code == 2 and errors.startswith("Error: ")
        assert "give target as the source, or take --again to move it" in errors
        assert prolora("transfer", moved, *line, *end, "--again")[0] == 0


def test_a_report_is_a_page_where_its_name_says_so(prolora, line, tmp_path):
    page = tmp_path / "report.html"
    line += ("-o", tmp_path / "out.safetensors", "--report", page)
    code, told, _ = prolora(*line)
    text = page.read_text("utf-8")
    assert code == 0 and f"wrote {page}" in told
    assert "8 of 12 modules copied" in text and "--report report.html</code>" in text
    assert str(tmp_path) not in text  # pages are published
    page.write_text("<!DOCTYPE html><p>mine")
    code, _, error = prolora(*line)
    assert code == 2 and "report.html: exists" in error and page.read_text().endswith("mine")


ODD = "a&bad" if os.name == "nt" else "<b>bad"  # a name that HTML would take for markup


def test_the_page_of_several_loras_has_a_line_for_each(prolora, case, tmp_path):
    lora, source, target = case
    bad, page = tmp_path / f"{ODD}.safetensors", tmp_path / "index.html"
    bad.write_bytes(b"x")
    line = ("transfer", lora, bad, "--source", source, "--target", target, "--report", page)
    assert prolora(*line, "-o", tmp_path / "moved")[0] == 2
    text = page.read_text("utf-8")
    assert (
        "<h1>✖ 2 LoRAs: 1 moved, 1 failed</h1>" in text
        and f"{html.escape(ODD)}.safetensors" in text
    )
    # Results that are there already have no numbers.
    page.unlink()
    assert prolora(*line, "-o", tmp_path / "moved")[0] == 2
    assert "1 already there, 1 failed</h1>" in page.read_text("utf-8")


def test_an_update_that_could_not_be_read_is_no_full_success(prolora, line, tmp_path):
    tensors = lora_tensors()
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors[f"{stem}.lora_up.weight"] = torch.ones(6, 2)
    tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 5)
    tensors[f"{stem}.dora_scale"] = torch.ones(6, 1)
    save_file(tensors, line[1])
    out, line = tmp_path / "out.safetensors", (*line, "--method", "copy")
    for end in (("-o", out), ("--dry-run",), ("-o", tmp_path / "second.safetensors", "--json")):
        code, text, errors = prolora(*line, *end)
        assert code == 4 and "1 updates could not be read" in errors
        assert "fc1" in errors and "fc1" in text
    assert out.exists()
    assert prolora(*line, "-o", out)[0] == 4  # which is kept
    assert prolora(*line, "-o", out, "--text-encoder", "skip", "--overwrite")[0] == 0


def test_bases_mean_the_same_as_arguments_and_as_options(prolora, case, tmp_path):
    lora, source, target = case
    tuned = write_folder(tmp_path / "tuned", {n: 1.01 * w for n, w in source_weights().items()})
    for verb, words, flags in (
        ("transfer", (lora, source, target), (lora, "--source", source, "--target", target)),
        ("extract", (source, tuned), ("--base", source, "--tuned", tuned)),
        ("extract", (source, tuned), (tuned, "--base", source)),
        ("convert", (lora, source), (lora, "--base", source)),
    ):
        written = []
        for given in (words, flags):
            out = tmp_path / f"{verb}-{len(written)}.safetensors"
            code, _, error = prolora(verb, *given, "-o", out, "--overwrite")
            assert code == 0, error
            written.append(out)
        assert same_bits(*written)
    code, said, _ = prolora("check", lora, source, target)
    assert said == prolora("check", lora, "--source", source, "--target", target)[1] and said
