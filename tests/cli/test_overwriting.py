"""Nothing is replaced unasked: every option that names a file is asked."""

import json
import shutil

import pytest
from lora_files import read_lora
from mini import lora_tensors, source_weights, write_folder
from safetensors.torch import load_file, save_file
from spectra import related

FOREIGN = b"ten hours of work"


@pytest.fixture
def line(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return *line, "--method", "copy"


def test_a_result_of_the_same_is_kept_and_its_verdict_told_again(prolora, line, tmp_path):
    out = tmp_path / "mine.safetensors"
    code, first, _ = prolora(*line, "-o", out)
    before, age = out.read_bytes(), out.stat().st_mtime_ns
    again, second, _ = prolora(*line, "-o", out)
    assert (code, again) == (0, 0) and "kept" in second and out.stat().st_mtime_ns == age
    told = " ".join(second.split()).replace(" (moved before)", "")
    assert told.startswith(" ".join(first.splitlines()[0].split())) and told != second
    kept = json.loads(prolora(*line, "-o", out, "--json")[1])
    assert (kept["status"], kept["method"]) == ("already there", "copy") and kept["provenance"]
    assert all(row["norm_ratio"] is None for row in kept["modules"])  # nothing is computed again
    code, _, error = prolora(*line, "-o", out, "--strength", "0.5")
    assert code == 2 and "exists" in error and out.read_bytes() == before
    assert prolora(*line, "-o", out, "--overwrite")[0] == 0
    assert out.read_bytes() == before and out.stat().st_mtime_ns != age


def test_a_trained_lora_is_not_replaced(prolora, line, tmp_path):
    """By one LoRA or several."""
    out, other = tmp_path / "mine.safetensors", tmp_path / "x" / "mine.safetensors"
    other.parent.mkdir()
    shutil.copy(line[1], other)
    assert prolora(*line, "-o", out)[0] == 0
    for content in (lora_tensors(3), load_file(out)):
        save_file(content, out, {"ss_network_module": "networks.lora"})
        before = out.read_bytes()
        for extra in (("-o", out), (other, "-o", tmp_path)):
            code, _, error = prolora(*line, "--strength", "0.5", *extra)
            assert code == 2 and "mine.safetensors" in error and out.read_bytes() == before
    code, _, error = prolora(*line, "-o", out)
    assert "exists, and is not replaced" in error and "--overwrite" in error
    assert prolora(*line, "-o", out, "--overwrite")[0] == 0
    assert len(read_lora(out).updates) == 8


def test_the_files_of_a_peft_folder_are_not_replaced(prolora, line, tmp_path):
    """Its README is kept anyway."""
    out = tmp_path / "peft"
    line = (*line, "-o", out, "--format", "peft")
    assert prolora(*line)[0] == 0
    (out / "README.md").write_text("mine")
    assert prolora(*line)[0] == 0 and (out / "README.md").read_text() == "mine"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = out / name
        kept = file.read_bytes()
        file.write_bytes(FOREIGN)
        code, _, error = prolora(*line)
        assert code == 2 and "exists" in error and file.read_bytes() == FOREIGN
        file.write_bytes(kept)
    (out / "adapter_model.safetensors").unlink()
    assert prolora(*line)[0] == 2
    assert prolora(*line, "--overwrite")[0] == 0 and (out / "README.md").read_text() == "mine"


def test_a_folder_that_exists_gets_the_lora_under_its_own_name(prolora, line, case, tmp_path):
    """Of every command that writes one LoRA; nothing in it is replaced."""
    (lora, source, _), own = case, source_weights()
    tuned = {name: related(weight, 0.01, 50) for name, weight in own.items()}
    tuned = write_folder(tmp_path / "tuned", tuned)
    for words, name in (
        (line, lora.name),
        (("convert", lora, "--out-rank", "2"), lora.name),
        (("extract", source, tuned), "tuned.safetensors"),
    ):
        folder = tmp_path / f"of {words[0]}"
        folder.mkdir()
        assert prolora(*words, "-o", folder)[0] == 0
        assert [path.name for path in folder.iterdir()] == [name]
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(FOREIGN)
        code, _, error = prolora(*words, "-o", folder)
        assert code == 2 and "exists, and is not replaced" in error
        assert (folder / name).read_bytes() == FOREIGN
        assert prolora(*words, "-o", folder, "--overwrite")[0] == 0
        assert (folder / name).read_bytes() == before
    peft, out = tmp_path / "peft", ("-o", tmp_path / "smaller")
    assert prolora("convert", lora, "--format", "peft", "-o", peft)[0] == 0
    for words in (("convert", peft, "--out-rank", "2"), (line[0], peft, *line[2:])):
        shutil.rmtree(out[1], ignore_errors=True)
        for more in ((), ("--overwrite",)):  # an adapter that exists is replaced, not filled
            assert prolora(*words, *out, *more)[0] == 0
            assert not [path for path in out[1].iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("report.json", ("--report", "report.json")),
        ("report.html", ("--report", "report.html")),
        ("README.md", ("--card",)),
    ],
)
def test_a_file_that_goes_with_a_result_replaces_none(prolora, line, tmp_path, name, asked):
    words = *line, "-o", "out.safetensors", *asked
    (tmp_path / name).write_bytes(FOREIGN)
    there = sorted(tmp_path.iterdir())
    code, _, error = prolora(*words)
    assert code == 2 and f"{name}: exists, and is not replaced" in error
    assert sorted(tmp_path.iterdir()) == there
    assert prolora(*words, "--overwrite")[0] == 0
    assert (tmp_path / name).read_bytes() != FOREIGN
