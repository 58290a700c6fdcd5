"""Odd files get one mark and one sentence, in Python, in a terminal and on the page."""

import json
import subprocess
import sys

import pytest
import torch
from odd_files import (
    FUSED,
    ODD_FILES,
    ROOT,
    THREADS,
    check_on_page,
    make_thread,
    read_page_script,
    write_pairs,
)

from prolora import ProLoRAError, check, convert


def ask_python(path, asked):
    try:
        found = check(path, **asked)
    except ProLoRAError as error:
        return "✖", str(error).removeprefix(f"{path}: ")
    return found.mark, found.headline


@pytest.mark.parametrize("odd", ODD_FILES, ids=lambda odd: odd.name)
def test_python_and_the_page_say_of_an_odd_file_what_the_table_has(odd, tmp_path):
    path = odd.write(tmp_path)
    mark, first = ask_python(path, odd.asked)
    assert (mark, first[: len(odd.first)]) == (odd.mark, odd.first)
    if "deep" not in odd.asked:  # the page reads headers alone
        marked, line = check_on_page(path, odd.asked.get("program", ""))
        assert (marked, line[: len(odd.first)]) == (odd.mark, odd.first)


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
exec(sys.stdin.read())
print(json.dumps([json.loads(check(x, "", y)) for x, y in json.loads(sys.argv[2])]))
"""


def ask_page(pairs):
    """The page's answers in a Python that has nothing but the package."""
    line = [sys.executable, "-I", "-S", "-Xutf8", "-c", ALONE, ROOT / "python"]
    line.append(json.dumps(pairs, default=str))
    answers = subprocess.check_output(line, input=read_page_script().encode())
    return json.loads(answers)


def test_the_page_says_of_twelve_loras_and_models_what_check_says(tmp_path):
    pairs = write_pairs(tmp_path)
    mistakes = [(pairs[0][0], pairs[4][0]), (pairs[0][0], tmp_path / "none")]
    *found, with_lora, nothing = ask_page(pairs + mistakes)
    for (lora, base), answer in zip(pairs, found, strict=True):
        expected = check(lora, base=base).to_dict()
        assert answer["json"] == json.loads(json.dumps(expected)), (lora, base)
    assert "".join(one["mark"] for one in found) == "✔✖✖✖✖✔✖✖✖✖✔✔"
    name = with_lora["headline"].rpartition("\\")[2]  # behind the folders that Windows has there
    assert name.startswith("sdxl-lora.safetensors: is a LoRA or a model with one")
    assert nothing["mark"] == "✖" and "none: no such file" in nothing["headline"]


@pytest.mark.parametrize("name", THREADS)
def test_the_file_of_a_thread_is_known_and_what_comfyui_does_with_it(name):
    size, *made, mark, first = THREADS[name]
    found = check(make_thread(size, *made), program="comfyui")
    assert size in found.sizes and not found.foreign and not found.defects
    assert found.mark == mark and found.headline.startswith(first)


@pytest.mark.parametrize("name", ["SimpleTuner, keys broke", "Wan2GP"])
def test_a_conversion_mends_the_file_of_a_thread_for_comfyui(name, tmp_path):
    lora, out = make_thread(*THREADS[name][:4]), tmp_path / "out.safetensors"
    updates = convert(lora, format="comfyui", out=out).adapter.updates
    assert len(updates) == len(lora) // 2 and check(out, program="comfyui").mark == "✔"
    rows = (update.up[:9] @ update.down for update in updates.values())
    assert all(torch.allclose(x, torch.tensor(0.0002)) for x in rows)


@pytest.mark.slow
def test_a_fused_dokr_of_a_thread_is_mended_for_comfyui_with_its_base(tmp_path):
    """The rows of q, k and v are m·(W + ΔW)/‖W + ΔW‖ − W, each in a LoRA of its own."""
    torch.manual_seed(0)
    stem, out = FUSED.removesuffix("qkv"), tmp_path / "out.safetensors"
    lora = make_thread(*THREADS["ComfyUI, Krea 2 with DoKR"][:4])
    base = {f"{stem}{x}.weight": torch.randn(2560, 1) @ torch.randn(1, 2560) for x in "qkv"}
    whole = torch.cat(list(base.values())).double()
    norms = whole.norm(dim=1, keepdim=True)
    lora |= {key: norms.float() for key in lora if key.endswith("dora_scale")}
    moved = convert(lora, base, format="comfyui", out=out, out_rank=4).adapter.updates
    changed = whole + 0.01**2
    wanted = norms * changed / changed.norm(dim=1, keepdim=True) - whole
    got = torch.cat([moved[f"{stem}{x}"].dense().double() for x in "qkv"])
    assert (got - wanted).norm() < 1e-3 * wanted.norm()
    assert check(out, program="comfyui").mark == "✔"
