"""The set of small LoRAs that docs/make_conformance.py makes, and what a check says of each."""

import runpy
from pathlib import Path

import pytest
from property_examples import AT_NIGHT
from safetensors.torch import save

from prolora import Lora, check
from prolora.adapters.contents import parse_contents
from prolora.architectures.layouts import load_layout

MAKER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_conformance.py"))
FILES = list(MAKER["list_files"]())
# BK-SDM's first size is SD1.5 less a few blocks; of a U-Net's OFT no width is known.
READ_AS = {"bk-sdm": "sd15", "sd21": "sd15"}
UNTRIED = {"llada-image", "minimax-h3", "qwen-image-2.1"}
KINDS = {"dora": "lora+dora", "lora-without-alpha": "lora"}


@pytest.mark.parametrize("case", FILES if AT_NIGHT else FILES[::4], ids=lambda case: case[0])
def test_a_sound_file_of_every_family_kind_and_spelling_is_told_as_what_it_is(case):
    _, family, format, kind = case
    tensors = MAKER["make_file"](family, format, kind)
    assert len(save(tensors)) < 4e6
    found = check(tensors)
    assert not (found.defects or found.left_out or found.foreign), str(found)
    readers = {*found.readers.whole} - {*found.readers.untried}
    assert found.mark == ("✔" if readers else "⚠"), str(found)
    assert readers or found.headline.startswith("no program ")
    assert readers or kind != "lora" or format not in ("comfy", "kohya") or family.id in UNTRIED
    assert {family.id, READ_AS.get(family.id)} & {*found.families}
    assert {*found.algorithms} == {KINDS.get(kind, kind)}
    assert found.needs_base == (kind in ("dora", "glora", "oft"))
    slots = parse_contents(Lora.open(tensors)).slots
    updated = {name for slot in slots for name in slot.module.modules}
    assert found.family != family.id or updated <= load_layout(family.layouts[0]).shapes.keys()


@pytest.mark.parametrize(
    ("name", "program", "said"),
    [
        ("flux-lokr-comfy", "comfyui", "✔ ComfyUI applies all of it"),
        ("flux-lokr-comfy", "diffusers", "✖ diffusers reads nothing of it; `convert()` it with"),
        ("flux-lokr-comfy", "forge", "⚠ Forge was not tried with such a file: what it does"),
        ("flux-lora-without-alpha-kohya", "sd-scripts", "✖ sd-scripts reads nothing of it"),
        ("flux-lora-kohya", "sd-scripts", "⚠ sd-scripts applies 25 of 27 updates, and skips 2, as"),
        ("flux2-lora-comfy", "diffusers", "✖ diffusers reads nothing of it"),
        ("flux2-lora-comfy", "a1111", "⚠ A1111 was not tried with such a file"),
    ],
)
def test_what_a_program_does_with_kinds_and_alphas_is_what_its_own_code_did(name, program, said):
    """`python bench/loader_matrix.py PROGRAM CHECKOUT --files FOLDER` asks the code itself."""
    _, *case = next(case for case in FILES if case[0] == f"{name}.safetensors")
    assert str(check(MAKER["make_file"](*case), program=program)).startswith(said)
