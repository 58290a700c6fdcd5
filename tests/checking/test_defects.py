"""Defects of a file are found and named with what mends them, and sound files have none."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_files import factors, save
from safetensors.torch import load_file, save_file

from prolora.architectures.families import known_families
from prolora.checking.check import check
from prolora.files.safetensors_file import SafetensorsFile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lora(tmp_path):
    tensors = {}
    for block in range(3):
        stem = f"lora_unet_down_blocks_{block}_attentions_0_proj_in"
        up, down = factors((6, 5), 4, block)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    return save(tmp_path / "lora.safetensors", tensors)


def change(path, change_tensor, metadata=None):
    """Writes the file again with other tensors; None leaves one out."""
    changed = {key: change_tensor(key, tensor) for key, tensor in load_file(path).items()}
    save_file({key: x for key, x in changed.items() if x is not None}, path, metadata)
    return path


def drop_alphas(key, tensor):
    return None if key.endswith(".alpha") else tensor


def test_a_sound_file_has_no_defect(lora):
    found = check(lora, deep=True)
    assert found and not found.defects


def test_a_dora_of_ai_toolkit_without_alpha_is_read_at_scale_1_with_a_word(lora):
    """In kohya's format alone: in PEFT's its alpha is the rank."""

    def rename(dotted):
        tensors = load_file(lora)
        for key in list(tensors):
            value, stem = tensors.pop(key), key.partition(".")[0]
            name = f"transformer.transformer_blocks.{stem[22]}.attn.to_q" if dotted else stem
            tensors[f"{name}.{key.partition('.')[2]}".replace("alpha", "magnitude")] = value
        return {k: torch.ones(6) if "magnitude" in k else t for k, t in tensors.items()}

    found = check(save(lora.with_name("plain"), rename(dotted=False)))
    assert found.algorithms == {"lora+dora": 3}
    assert [one.text for one in found.defects] == [
        "ai-toolkit saves no alpha of a DoRA in kohya's format: it is read at scale 1."
    ]
    assert not check(save(lora.with_name("peft"), rename(dotted=True))).defects
    tensors = rename(dotted=False) | {k: t for k, t in load_file(lora).items() if "alpha" in k}
    assert not check(save(lora.with_name("whole"), tensors)).defects


@pytest.mark.parametrize(("alpha", "factor", "strength"), [("1", "4", "0.25"), ("16", "0.25", "4")])
def test_a_lost_alpha_is_told_with_the_strength_that_mends_it(lora, alpha, factor, strength):
    change(lora, drop_alphas, {"ss_network_alpha": alpha})
    found = check(lora)
    (defect,) = found.defects
    assert f"{factor}× as strongly" in defect.text and defect.mend == (
        f"load it at strength {strength}; or `convert()` it with `alpha={alpha}`"
    )
    assert found.mark == "⚠" and not found and str(defect) in str(found)


@pytest.mark.parametrize(
    "metadata", [None, {"ss_network_alpha": "4"}, {"ss_network_alpha": "None"}]
)
def test_a_file_without_alpha_is_sound_where_its_header_says_nothing_else(lora, metadata):
    assert not check(change(lora, drop_alphas, metadata)).defects


def test_some_lost_alphas_are_counted(lora):
    first = next(key for key in load_file(lora) if key.endswith(".alpha"))
    change(lora, lambda key, x: None if key == first else x, {"ss_network_alpha": "2"})
    (defect,) = check(lora).defects
    assert "1 of 3 alphas" in defect.text and defect.mend.endswith("`alpha=2`")


@pytest.mark.parametrize(
    ("alpha", "named", "number"),
    [(0.01, False, 1), (16, False, 1), (0.01, True, 0), (8, False, 0)],
)
def test_an_unusual_scale_is_told_unless_it_was_trained_so(lora, alpha, named, number):
    def set_alpha(key, tensor):
        return torch.tensor(float(alpha)) if key.endswith(".alpha") else tensor

    found = check(change(lora, set_alpha, {"ss_network_alpha": str(alpha)} if named else None))
    assert len(found.defects) == number
    assert not number or f"strength {4 / alpha:.3g}" in found.defects[0].mend


@pytest.mark.parametrize(
    ("factor", "words", "mark"),
    [
        (math.nan, "hold NaN or Inf", "✖"),
        (math.inf, "hold NaN or Inf", "✖"),
        (1e9, "may overflow float16", "⚠"),
        (1e9, "times larger than the others", "⚠"),
    ],
)
def test_what_the_numbers_tell_is_found_by_reading_them(lora, factor, words, mark):
    key = next(key for key in load_file(lora) if "lora_up" in key)
    change(lora, lambda name, x: x * factor if name == key else x)
    assert not check(lora).defects
    defects = check(lora, deep=True).defects
    assert [one.mark for one in defects if words in one.text] == [mark]


def test_a_lora_that_was_never_trained_changes_nothing(lora):
    change(lora, lambda key, x: x * 0 if "lora_up" in key else x)
    assert [one.text for one in check(lora, deep=True).defects] == [
        "This LoRA changes nothing: it is zero."
    ]


def test_a_program_that_skips_modules_is_told_with_how_many(tmp_path):
    family = known_families()["sd15"]
    names = ["time_embedding.linear_1", "down_blocks.0.attentions.0.proj_in"]
    assert all(map(family.find_pattern, names))
    tensors = {}
    for name in names:
        path = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{path}.lora_down.weight"] = torch.ones(2, 320)
        tensors[f"{path}.lora_up.weight"] = torch.ones(1280 if "time" in name else 320, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = check(tmp_path / "lora.safetensors", program="sd-scripts")
    if len(found.families) == 1:
        assert found.skipped == {"time_embedding.linear_1": 1}
        assert "1 of 2 updates" in found.headline
    else:
        assert found.skipped is None


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import prolora
print(json.dumps(prolora.check(sys.argv[2], program="comfyui").to_dict()))
"""


def test_the_page_of_the_site_says_the_same_with_pythons_own_library_alone(lora, tmp_path):
    """The browser's Python gets this package, and has no torch, numpy or jinja2."""
    hooks = runpy.run_path(str(ROOT / "docs" / "pack_doctor.py"))
    (tmp_path / "prolora.zip").write_bytes(hooks["pack_package"]())
    command = [sys.executable, "-I", "-S", "-c", ALONE, tmp_path / "prolora.zip", lora]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(told) == json.loads(json.dumps(check(lora, program="comfyui").to_dict()))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64,
     torch.int8, torch.uint8, torch.bool],
)  # fmt: skip
def test_a_number_is_read_as_torch_reads_it(tmp_path, dtype):
    values = {str(i): torch.tensor(x).to(dtype) for i, x in enumerate((0.0, 1.0, 3.14159, 96.0))}
    save_file(values, tmp_path / "numbers.safetensors")
    file = SafetensorsFile(tmp_path / "numbers.safetensors")
    for name, value in values.items():
        assert file.read_number(name) == float(value.double())
