"""`prolora check`: a line a LoRA, and an exit code that says whether all fit."""

import json

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def files(case, tmp_path):
    """A LoRA that fits, one of which a module has no place, and their base."""
    lora, source, _ = case
    tensors = load_file(lora)
    names = {k: k.replace("transformer_blocks_0", "transformer_blocks_9") for k in tensors}
    deep = {names[k]: v.clone() for k, v in tensors.items()}
    other = tmp_path / "deep.safetensors"
    save_file(tensors | deep, other)
    return lora, other, source


def test_a_lora_that_fits_ends_in_0_and_a_line(prolora, files):
    lora, _, base = files
    code, out, err = prolora("check", lora, base)
    assert (code, err) == (0, "") and out.startswith("✔ for this base: ") and out.count("\n") == 1


def test_a_lora_that_fits_in_part_ends_in_3(prolora, files):
    _, other, base = files
    code, out, _ = prolora("check", other, base)
    assert code == 3 and "⚠ in part for this base" in out


def test_of_several_each_has_its_line_and_the_worst_decides_the_code(prolora, files, tmp_path):
    lora, other, base = files
    code, out, _ = prolora("check", lora, other, base)
    assert code == 3 and f"{lora.name}: ✔" in out and f"{other.name}: ⚠" in out
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    code, out, _ = prolora("check", lora, tmp_path / "bad.safetensors", other, base)
    assert code == 2 and f"{other.name}: ⚠" in out and "bad.safetensors: " in out


def test_json_is_a_record_or_a_list_of_them(prolora, files):
    lora, other, base = files
    code, out, _ = prolora("check", lora, base, "--json")
    record = json.loads(out)
    assert code == 0 and record["answer"] == "fits" and record["coverage"] == 1
    code, out, _ = prolora("check", lora, other, base, "--json")
    assert code == 3 and [r["answer"] for r in json.loads(out)] == ["fits", "in part"]


def test_a_base_that_is_not_there_ends_in_2(prolora, files):
    code, out, err = prolora("check", files[0], "no/such/base")
    assert code == 2 and not out and "no such" in err


def test_help_says_what_the_exit_codes_mean(prolora):
    _, out, _ = prolora("check", "-h")
    assert "3 a LoRA is for another model" in " ".join(out.split())


def test_a_base_among_the_loras_is_told_where_bases_stand(prolora, files):
    lora, _, base = files
    code, out, _ = prolora("check", lora, base, base)
    said = "not a LoRA; give the LoRA; the last argument is the base, and each one before it a LoRA"
    assert code == 2 and said in " ".join(out.split()) and f"{lora.name}: ✔" in out
