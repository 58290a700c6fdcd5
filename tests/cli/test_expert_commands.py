"""The command line with models of two experts, as people who use ComfyUI have them."""

import json
from pathlib import Path

import pytest
from experts import expert, write_file, write_lora, write_pipeline


@pytest.fixture
def files(tmp_path):
    """A LoRA, the base it was trained on, and the two files of the target."""
    return (
        write_lora(tmp_path / "style.safetensors"),
        write_file(tmp_path / "wan2.1_t2v_14B.safetensors", expert(1)),
        write_file(tmp_path / "wan2.2_t2v_high_noise_14B.safetensors", expert(1, 0.05)),
        write_file(tmp_path / "wan2.2_t2v_low_noise_14B.safetensors", expert(2, 0.05)),
    )


def test_a_target_given_twice_gives_two_files(prolora, files, tmp_path):
    lora, source, high, low = files
    line = ("transfer", lora, "--source", source, "--target", low, "--target", high)
    line += ("--method", "copy")
    out = tmp_path / "moved.safetensors"
    code, text, _ = prolora(*line, "-o", out)
    names = ["moved_high_noise.safetensors", "moved_low_noise.safetensors"]
    assert code == 0 and all(f"wrote {tmp_path / name}\n" in text for name in names)
    assert sorted(path.name for path in tmp_path.glob("moved*")) == names
    (tmp_path / "folder").mkdir()
    code, text, _ = prolora(*line, "-o", tmp_path / "folder", "--json")
    results = [Path(entry["out"]).name for entry in json.loads(text)]
    assert code == 0
    assert results == ["style_high_noise.safetensors", "style_low_noise.safetensors"]


def test_a_pipeline_folder_is_both_and_a_dry_run_shows_both(prolora, files, tmp_path):
    lora, source, _, _ = files
    folder = write_pipeline(tmp_path / "wan22", 0.05)
    line = ("transfer", lora, "--source", source, "--target", folder)
    code, text, _ = prolora(*line, "--dry-run")
    assert code == 0 and "style_low" in text and "2 would move" in text
    assert not list(tmp_path.glob("style_*"))
    code, text, _ = prolora("check", folder)
    assert code == 0 and "transformer for high noise, transformer_2 for low noise" in text


def test_a_lora_of_one_expert_keeps_the_name_of_the_output(prolora, files, tmp_path):
    lora, source, high, low = files
    lora = lora.rename(tmp_path / "style_high_noise.safetensors")
    out = tmp_path / "moved.safetensors"
    line = ("transfer", lora, "--source", source, "--target", high, "--target", low)
    assert prolora(*line, "--method", "copy", "-o", out)[0] == 0
    assert [path.name for path in tmp_path.glob("moved*")] == ["moved.safetensors"]


def test_the_report_replaces_no_result_of_an_expert(prolora, files, tmp_path):
    lora, source, high, low = files
    line = ("transfer", lora, "--source", source, "--target", high, "--target", low)
    report = tmp_path / "moved_low_noise.safetensors"
    code, _, errors = prolora(*line, "-o", tmp_path / "moved.safetensors", "--report", report)
    assert code == 2 and "would replace the LoRA" in errors
