"""Defects of a file are found and named with what mends them, and sound files have none."""

import contextlib
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import fused_shapes, name_in_ldm, sparse_file
from lora_files import pair, random, save
from safetensors.torch import load_file, save_file

import prolora
from prolora import check
from prolora.architectures.layouts import load_layout
from prolora.files.safetensors_file import SafetensorsFile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lora(tmp_path):
    tensors = {}
    for block in range(3):
        stem = f"lora_unet_down_blocks_{block}_attentions_0_proj_in"
        tensors |= pair(stem, (6, 5), 4, block) | {f"{stem}.alpha": torch.tensor(2.0)}
    return save(tmp_path / "lora.safetensors", tensors)


def change(path, change_tensor, metadata=None):
    """Writes the file again with other tensors; None leaves one out."""
    changed = {key: change_tensor(key, tensor) for key, tensor in load_file(path).items()}
    save_file({key: x for key, x in changed.items() if x is not None}, path, metadata)
    return path


def drop_alphas(key, tensor):
    return None if key.endswith(".alpha") else tensor


def test_a_sound_file_has_no_defect(lora):
    assert not check(lora, deep=True).defects


def test_a_dora_of_ai_toolkit_without_alpha_is_read_at_scale_1_with_a_word(lora):
    """In kohya's format alone: in PEFT's its alpha is the rank."""
    plain, peft = {}, {}
    for i in range(3):
        stem = f"lora_unet_down_blocks_{i}_attentions_0_proj_in"
        plain |= pair(stem, (6, 5)) | {f"{stem}.magnitude": torch.ones(6)}
        path = f"transformer.transformer_blocks.{i}.attn.to_q"
        peft |= pair(path, (6, 5), ends=("lora_B", "lora_A")) | {f"{path}.magnitude": torch.ones(6)}
    checked = check(plain)
    assert checked.algorithms == {"lora+dora": 3}
    words = "ai-toolkit saves no alpha of a DoRA in kohya's format: it is read at scale 1."
    assert [one.text for one in checked.defects] == [words]
    assert not check(peft).defects
    assert not check(plain | {k: x for k, x in load_file(lora).items() if "alpha" in k}).defects


def follow(path, fix):
    """Runs the command of a fix, and checks what it writes."""
    (alpha,) = re.findall(r"`convert\(\)` it with `alpha=([0-9.]+)`", fix)
    out = path.with_name("mended.safetensors")
    prolora.convert(path, alpha=float(alpha), out=out)
    return check(out)


@pytest.mark.parametrize(
    ("alpha", "factor", "fix"),
    [
        ("1", "4", "; or load it at strength 0.25"),
        ("16", "0.25", "; or load it at strength 4"),
        ("0.8", "5", ""),  # so much is no fix by strength
    ],
)
def test_a_lost_alpha_is_told_with_what_mends_it(lora, alpha, factor, fix):
    found = check(change(lora, drop_alphas, {"ss_network_alpha": alpha}))
    (defect,) = found.defects
    assert f"{factor}× as strongly" in defect.text
    assert defect.fix == f"`convert()` it with `alpha={alpha}`{fix}"
    assert found.mark == "⚠" and not found and str(defect) in str(found)
    assert not follow(lora, defect.fix).defects


def test_some_lost_alphas_are_counted(lora):
    first = next(key for key in load_file(lora) if key.endswith(".alpha"))
    change(lora, lambda key, x: None if key == first else x, {"ss_network_alpha": "2"})
    (defect,) = check(lora).defects
    assert "1 of 3 alphas" in defect.text and defect.fix.endswith("`alpha=2`")


def set_alphas(*alphas):
    """Sets the alphas of the modules in turn."""
    given = itertools.cycle(alphas)
    return lambda key, x: torch.tensor(float(next(given))) if key.endswith(".alpha") else x


@pytest.mark.parametrize(
    ("alphas", "trained", "fix"),
    [
        ((0.01,), None, "where images show too little of it, `convert()` it with `alpha=4`"),
        ((16,), None, "too much of it, `convert()` it with `alpha=4`, or load it at strength 0.25"),
        ((64,), None, "where images show too much of it, `convert()` it with `alpha=4`"),
        ((16, 4, 4), None, ""),  # of a part alone no strength serves
        ((0.01,), "0.01", None),
        ((0.25,), None, None),  # 1/16 of the rank, as trainers write at least
        ((0.2,), None, "where images show too little of it, `convert()` it with `alpha=4`"),
        ((8,), None, None),
    ],
)
def test_an_unusual_scale_is_told_unless_it_was_trained_so(lora, alphas, trained, fix):
    header = {"ss_network_alpha": trained} if trained else None
    defects = check(change(lora, set_alphas(*alphas), header)).defects
    assert [one.fix.endswith(fix) for one in defects] == [True] * (fix is not None)
    if fix:
        assert not follow(lora, fix).defects
        strengths = [float(x) for x in re.findall("strength ([0-9.]+)", fix)]
        assert all(0.25 <= x <= 4 for x in strengths)


def test_a_scale_that_every_program_reads_in_its_own_way_is_told(lora):
    found = check(change(lora, set_alphas(0)))
    (defect,) = found.defects
    assert found.mark == "⚠" and "Alpha is 0: ComfyUI, A1111 and diffusers make" in defect.text
    assert defect.fix == "`convert()` it with `alpha=4`"
    assert check(lora, program="comfyui").mark == "✖"
    assert check(lora, program="sd-scripts").defects[0].mark == "⚠"
    assert not follow(lora, defect.fix).defects


def write_ranks(path, ranks, alphas, metadata=None):
    """A LoRA whose modules have these ranks and alphas; the last is a convolution."""
    places = [("attentions_0_proj_in", (40, 50))] * (len(ranks) - 1)
    tensors, places = {}, [*places, ("resnets_0_conv1", (40, 50, 3, 3))]
    for i, (rank, alpha, (place, shape)) in enumerate(zip(ranks, alphas, places, strict=True)):
        stem = f"lora_unet_down_blocks_{i}_{place}"
        tensors |= pair(stem, shape, rank, i)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return save(path, tensors, metadata)


CONV_HALF = {"ss_network_alpha": "16", "ss_network_args": '{"conv_alpha": 0.5}'}
CONV_ALPHA = {"ss_network_alpha": "16", "ss_network_args": '{"conv_alpha": "1", "conv_dim": "32"}'}


@pytest.mark.parametrize(
    ("ranks", "alphas", "metadata", "words"),
    [
        ((16, 16, 4), (16, 16, 16), None, None),  # prolora's own, and kohya's resize
        ((2, 7, 32), (32, 32, 32), None, None),
        ((128, 128, 128), (1, 1, 1), None, None),  # kohya's default
        ((16, 16, 4), (16, 16, 4), None, None),
        ((16, 16, 32), (16, 16, 0.5), CONV_HALF, None),
        ((16, 16, 32), (None,) * 3, CONV_ALPHA, "header says 16 and 1."),
        ((16, 16, 4), (None,) * 3, {"ss_network_alpha": "16"}, None),
        ((4, 4, 16), (16, 16, 64), None, "3 of 3 updates have an unusual scale"),
    ],
)
def test_one_alpha_of_mixed_ranks_is_meant_for_the_largest(
    tmp_path, ranks, alphas, metadata, words
):
    found = check(write_ranks(tmp_path / "lora.safetensors", ranks, alphas, metadata))
    assert [words in one.text for one in found.defects] == [True] * (words is not None)
    assert all("strength" not in one.fix for one in found.defects)


ODD_NUMBERS = [
    *("1e400", "NaN", "-Infinity", "9" * 5000, "[" * 100_000, "null", "", "true", "{}"),
    *("1e-60", "-4", "1e7", "0", "\x00", "١٦"),
]


@pytest.mark.parametrize("key", ["ss_network_alpha", "conv_alpha"])
@pytest.mark.parametrize("value", ODD_NUMBERS, ids=range(len(ODD_NUMBERS)))
def test_a_strange_number_in_a_header_is_no_alpha(lora, key, value):
    header = {key: value}
    if key == "conv_alpha":
        header = {"ss_network_args": json.dumps({key: value}), "ss_network_alpha": "2"}
    change(lora, lambda _, x: x, header)
    assert not check(lora, deep=True).defects
    if value != "١٦":  # Python reads these digits, and they are a number
        change(lora, drop_alphas, header)
        assert not any("nan" in str(one) for one in check(lora).defects)


@pytest.mark.parametrize(
    ("factor", "words", "mark"),
    [
        (math.nan, "holds NaN or Inf", "✖"),
        (math.inf, "holds NaN or Inf", "✖"),
        (1e9, "may overflow float16", "⚠"),
        (1e9, "1 update is more than 10000 times larger than the others", "⚠"),
    ],
)
def test_what_the_numbers_tell_is_found_by_reading_them(lora, factor, words, mark):
    key = next(key for key in load_file(lora) if "lora_up" in key)
    change(lora, lambda name, x: x * factor if name == key else x)
    assert not check(lora).defects
    defects = check(lora, deep=True).defects
    assert [one.mark for one in defects if words in one.text] == [mark]


HEADER_KEYS = [
    *("ss_network_dim", "ss_tag_frequency", "ss_base_model_version", "modelspec.architecture"),
    *("ss_sd_model_name", "prolora.moves", "prolora.verdict", "lora_adapter_metadata", "ss_v2"),
]


@pytest.mark.parametrize("key", HEADER_KEYS)
def test_no_text_in_a_header_ends_a_verb_with_a_traceback(lora, key):
    for value in ODD_NUMBERS:
        change(lora, lambda _, x: x, {key: value})
        for verb in (check, prolora.convert):
            with contextlib.suppress(prolora.ProLoRAError):
                verb(lora)


HALVES = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}
OTHER_KINDS = {
    "full": {"diff": random(6, 5)},
    "loha": {role: random(*shape) for role, shape in HALVES.items()},
    "lokr": {"lokr_w1": random(2, 1), "lokr_w2": random(3, 5)},
    "bias": {"diff_b": random(6)},
    "norm": {"w_norm": random(6), "b_norm": random(6, seed=1)},
}


def add_kind(lora, kind, changed):
    """Adds a module of a kind, its last tensor changed."""
    stem = "lora_unet_mid_block_attentions_0_" + ("norm" if kind == "norm" else "proj_in")
    tensors = {f"{stem}.{role}": tensor.clone() for role, tensor in OTHER_KINDS[kind].items()}
    last = [*tensors][-1]
    tensors[last] = changed(tensors[last])
    return save(lora, load_file(lora) | tensors)


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("factor", [1.0, math.nan, math.inf, 1e9])
def test_every_tensor_of_every_kind_is_looked_at(lora, kind, factor):
    found = check(add_kind(lora, kind, lambda x: x * factor), deep=True)
    words = {1.0: [], 1e9: ["float16", "times larger"]}.get(factor, ["NaN or Inf"])
    if kind in ("bias", "norm") and factor == 1e9:
        words = ["float16"]
    assert [any(word in one.text for one in found.defects) for word in words] == [True] * len(words)
    assert len(found.defects) == len(words)


@pytest.mark.parametrize(("largest", "marks"), [(65000.0, []), (66000.0, ["⚠"])])
def test_what_float16_does_not_hold_is_told_from_what_it_holds(lora, largest, marks):
    found = check(add_kind(lora, "bias", lambda x: x / x.abs().max() * largest), deep=True)
    assert [one.mark for one in found.defects if "float16" in one.text] == marks


def test_a_tensor_that_is_not_read_is_looked_at_too(lora):
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = load_file(lora) | {f"{stem}.gain": torch.tensor([math.nan])}
    found = check(save(lora, tensors), deep=True)
    assert [one.mark for one in found.defects] == ["⚠", "✖"] and found.mark == "✖"
    first = found.defects[0].text
    assert first.startswith("1 part of this file is not read, down_blocks.0.attentions.0.proj_in: ")
    assert check(lora).mark == "⚠"


def test_a_lora_that_was_never_trained_changes_nothing_unless_it_has_trained_biases(lora):
    change(lora, lambda key, x: x * 0 if "lora_up" in key else x)
    for deep in (False, True):
        assert [one.text for one in check(lora, deep=deep).defects] == [
            "This LoRA changes nothing: it is zero."
        ]
    assert [one.mark for one in check(load_file(lora)).defects] == ["⚠"]
    assert not check(add_kind(lora, "bias", lambda x: x)).defects


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_negative_zeros_are_zeros_and_a_late_number_is_none(tmp_path, dtype):
    up = torch.full((700, 4), -0.0)
    tensors = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(4, 5)}
    for last, texts in ((0.0, ["This LoRA changes nothing: it is zero."]), (1.0, [])):
        up[-1, -1] = last
        tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"] = up.to(dtype)
        path = save(tmp_path / "lora.safetensors", tensors)
        assert [one.text for one in check(path).defects] == texts


def test_an_update_far_below_the_rounding_of_its_weight_does_not_show(lora):
    base = {
        f"down_blocks.{i}.attentions.0.proj_in.weight": random(6, 5, seed=i).bfloat16()
        for i in range(3)
    }
    assert not check(lora, deep=True, base=base).defects
    change(lora, lambda key, x: x * 1e-7 if "lora_up" in key else x)
    assert not check(lora, deep=True).defects
    [faint] = check(lora, deep=True, base=base).defects
    assert faint.mark == "⚠" and faint.text.startswith("This LoRA does not show: its largest")


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import prolora
print(json.dumps([prolora.check(x, program="comfyui").to_dict() for x in sys.argv[2:]]))
"""


def test_the_page_of_the_site_says_the_same_with_pythons_own_library_alone(lora, tmp_path):
    """The browser's Python gets this package, and has no torch; a base is named by its header."""
    sdxl, start = load_layout("sdxl").shapes, "model.diffusion_model."
    flux = fused_shapes(load_layout("flux1-dev").shapes, "flux1-dev")
    ldm = {name_in_ldm(name, sdxl): shape for name, shape in sdxl.items()}
    bases = [
        sparse_file(tmp_path / name, {f"{start}{n}.weight": x for n, x in one.items()})
        for name, one in (("0.safetensors", flux), ("1.safetensors", ldm))
    ]
    package, files = tmp_path / "prolora.zip", [lora, *bases]
    hooks = runpy.run_path(str(ROOT / "docs" / "pack_doctor.py"))
    package.write_bytes(hooks["pack_package"]())
    command = [sys.executable, "-I", "-S", "-c", ALONE, package, *files]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told == json.loads(json.dumps([check(x, program="comfyui").to_dict() for x in files]))
    assert [found["families"] for found in told[1:]] == [["flux"], ["sdxl"]]


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
