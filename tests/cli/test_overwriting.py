"""Nothing is replaced that prolora did not write: every option that names a file is asked."""

import json
import shutil
from pathlib import Path

import pytest
from mini import lora_tensors
from safetensors.torch import load_file, save_file

from prolora.adapters import read_adapter
from prolora.files.safetensors_file import SafetensorsFile

FOREIGN = b"ten hours of work"


@pytest.fixture
def line(case, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lora, source, target = case
    return "transfer", lora, "--source", source, "--target", target, "--method", "copy", "-q"


def test_a_trained_lora_is_not_replaced(prolora, line, tmp_path):
    """By one LoRA or several, though it kept the header of the result it was trained from."""
    out, other = tmp_path / "mine.safetensors", tmp_path / "x" / "mine.safetensors"
    other.parent.mkdir()
    shutil.copy(line[1], other)
    assert prolora(*line, "-o", out)[0] == 0
    assert prolora(*line, "-o", out)[0] == 0  # its own result
    header = SafetensorsFile(out).metadata
    for content in (lora_tensors(3), load_file(out)):
        save_file(content, out, header)
        before = out.read_bytes()
        for extra in (("-o", out), (other, "-o", tmp_path)):
            code, _, error = prolora(*line, "--strength", "0.5", *extra)
            assert code == 2 and "mine.safetensors" in error and out.read_bytes() == before
    code, _, error = prolora(*line, "-o", out)
    assert "exists and is not a LoRA as prolora wrote it" in error and "--overwrite" in error
    assert prolora(*line, "-o", out, "--overwrite")[0] == 0
    assert len(read_adapter(out).updates) == 8


def test_the_files_of_a_peft_folder_are_not_replaced(prolora, line, tmp_path):
    """Its README is kept anyway."""
    out = tmp_path / "peft"
    line = (*line, "-o", out, "--format", "peft")
    assert prolora(*line)[0] == 0
    (out / "README.md").write_text("mine")
    assert prolora(*line)[0] == 0 and (out / "README.md").read_text() == "mine"
    config = out / "adapter_config.json"
    edited = json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"})
    for file, content in ((config, edited.encode()), (out / "adapter_model.safetensors", FOREIGN)):
        kept = file.read_bytes()
        file.write_bytes(content)
        code, _, error = prolora(*line)
        assert code == 2 and file.name in error and file.read_bytes() == content
        file.write_bytes(kept)
    (out / "adapter_model.safetensors").unlink()
    assert prolora(*line)[0] == 2
    assert prolora(*line, "--overwrite")[0] == 0 and (out / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    "words, name",
    [
        (("transfer", "LORA", "-o", "out.safetensors", "--report", "FILE"), "report.json"),
        (("transfer", "LORA", "-o", "out.safetensors", "--report", "FILE"), "report.html"),
        (("transfer", "LORA", "-o", "out.safetensors", "--card"), "README.md"),
        (("advise", "--save-match", "FILE"), "map.json"),
        (("advise", "--report", "FILE"), "advice.html"),
        (("plan", "LORA", "-o", "FILE"), "plan.jsonl"),
    ],
)
def test_a_file_that_goes_with_a_result_replaces_its_like_only(
    prolora, line, case, tmp_path, words, name
):
    """Not one that was edited, one of another kind, or one that quotes the whole."""
    lora, source, target = case
    words = [{"LORA": lora, "FILE": name}.get(word, word) for word in words]
    words = [*words, "--source", source, "--target", target, "-q"]
    file = tmp_path / name
    for _ in range(2):
        assert prolora(*words)[0] == 0
    own = file.read_bytes()
    (tmp_path / "out.safetensors").unlink(missing_ok=True)
    there = sorted(tmp_path.iterdir())
    code, _, _ = prolora(
        "transfer", lora, "--source", source, "--target", target, "-o", "other.safetensors", "-q"
    )
    other = (tmp_path / "other.safetensors").read_bytes()
    (tmp_path / "other.safetensors").unlink()
    for content in (FOREIGN, own + b"\nmore", own[:-1], b"> " + own, other):
        file.write_bytes(content)
        code, _, error = prolora(*words)
        assert code == 2 and f"{name}: exists and is not a" in error, content[:40]
        assert file.read_bytes() == content and sorted(tmp_path.iterdir()) == there
    assert prolora(*words, "--overwrite")[0] == 0
    assert file.read_bytes()[:20] == own[:20]


@pytest.mark.parametrize("name", ["neon-on-pruned.json", "neon-on-pruned.png"])
def test_the_demo_replaces_nothing_either(prolora, tmp_path, name):
    pytest.importorskip("diffusers", reason="the demo needs diffusers")
    (tmp_path / name).write_bytes(FOREIGN)
    code, _, error = prolora("demo", "-o", tmp_path, "--target", "pruned")
    assert code == 2 and f"{name}: exists and is not a" in error
    assert [file.name for file in Path(tmp_path).iterdir()] == [name]


def test_a_link_stands_for_the_file_that_it_leads_to(prolora, line, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.write_bytes(FOREIGN)
    for name, words in (
        ("out.safetensors", ()),
        ("report.json", ("--report", "report.json")),
        ("README.md", ("--card",)),
    ):
        (tmp_path / name).symlink_to(foreign)
        code, _, error = prolora(*line, "-o", "out.safetensors", *words)
        assert code == 2 and f"{name}: exists and is not a" in error
        (tmp_path / name).unlink()
    assert foreign.read_bytes() == FOREIGN
