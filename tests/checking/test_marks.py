"""A mark follows from what was looked at: ✔ only of a whole file, and always of a right one."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch
from diagonal import pair_up
from lora_files import pair, usual_lora
from property_examples import AT_NIGHT
from safetensors.torch import save_file

import prolora
from prolora import check
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import known_loaders

MAKER = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_conformance.py"))
PLAIN = {
    (family.id, form): family for _, family, form, kind in MAKER["list_files"]() if kind == "lora"
}


SOME = [*PLAIN] if AT_NIGHT else [*PLAIN][::7]


def make_file(family, format, kind="lora"):
    return MAKER["make_file"](PLAIN[family, format], format, kind)


def add_invented(tensors, unet):
    """Adds two modules that no model has, in the spelling of the others."""
    key = next(key for key in tensors if key.endswith(("lora_down.weight", "lora_A.weight")))
    prefix = re.match("lora_unet_|unet[.]|transformer[.]|diffusion_model[.]|", key)[0]
    stack = "invented_blocks.{}.attn.to_q"
    if unet:
        authors = any(".output_blocks." in key for key in tensors)
        stack = "output_blocks.9{}.1" if authors else "up_blocks.9{}.attentions.0"
        stack += ".transformer_blocks.0.attn1.to_q"
    names = [stack.format(i).replace(".", "_" if prefix.endswith("_") else ".") for i in range(2)]
    up, down = ("B", "A") if "lora_A" in key else ("up", "down")
    for name in names:
        tensors[f"{prefix}{name}.lora_{down}.weight"] = torch.ones(1, 8)
        tensors[f"{prefix}{name}.lora_{up}.weight"] = torch.ones(8, 1)
    return tensors


@pytest.mark.parametrize(("family", "format"), SOME)
def test_a_file_with_modules_that_no_model_has_is_never_right(family, format):
    tensors = add_invented(make_file(family, format), PLAIN[family, format].unet)
    for asked in ({}, {"base": family}, *({"program": name} for name in ("comfyui", "diffusers"))):
        found = check(tensors, **asked)
        assert found.mark != "✔" and not found, (asked, str(found))
    assert re.search(
        "invented_blocks|put_blocks.9|up_blocks.9|no known family", str(check(tensors))
    )


@pytest.mark.parametrize(("family", "format"), SOME)
def test_a_family_or_a_size_of_it_is_a_base(family, format):
    tensors = make_file(family, format)
    title = check(tensors, base=PLAIN[family, format].layouts[0])
    assert title.base_match.coverage == 1 and check(tensors, base=family).base_match.coverage == 1
    other = "flux" if family in ("sd15", "sdxl") else "sdxl"
    if family not in ("bk-sdm", "koala", "segmind-vega", "ssd-1b", "sd21", other):
        assert check(tensors, base=other).mark == "✖"


def test_members_of_a_family_are_told_apart():
    lora = usual_lora("wan2.1-i2v-14b", "transformer.")
    attention = {*load_layout("wan2.1-i2v-14b").attention}
    tensors = {k: x for k, x in lora.items() if k[12:].partition(".lora")[0] in attention}
    for base, start in {
        "wan": "✔ for Wan 2.1 I2V 14B: 400 of 400 modules have their place",
        "wan2.1-i2v-14b": "✔ for Wan 2.1 I2V 14B: 400 of 400",
        "wan2.2-i2v-a14b": "⚠ in part for Wan 2.2 I2V A14B (each expert): 320 of 400",
        "wan2.2-t2v-a14b": "⚠ in part for Wan 2.1 T2V 14B, Wan 2.2 T2V A14B (each expert): 320 of",
    }.items():
        assert str(check(tensors, base=base)).startswith(start)


ASKED = [*itertools.product(PLAIN, known_loaders())][:: 11 if AT_NIGHT else 49]


@pytest.mark.parametrize(("case", "program"), ASKED, ids=str)
def test_a_conversion_is_advised_only_where_it_makes_the_file_right(case, program, tmp_path):
    found = check(make_file(*case), program=program)
    mends = re.findall(r"`convert\(\)` it with `format=(\w+)`", str(found))
    assert set(mends) <= {program} and len(mends) <= 1
    if mends:
        assert found.mark != "✔"
        prolora.convert(make_file(*case), format=program, out=tmp_path / "out.safetensors")
        assert check(tmp_path / "out.safetensors", program=program).mark == "✔"


def test_the_headline_is_the_sentence_that_gave_the_mark(tmp_path):
    tensors = make_file("flux", "comfy")
    key = next(key for key in tensors if key.endswith(".alpha"))
    for wrong in (0.0, 64.0):
        odd = {
            k: torch.full_like(x, wrong) if k.endswith(".alpha") else x for k, x in tensors.items()
        }
        for asked in ({}, {"base": "flux"}, {"program": "comfyui"}):
            found = check(odd, **asked)
            assert found.mark in "⚠✖" and found.headline == found.defects[0].text, asked
    assert check(tensors, program="forge").headline.startswith(("Forge applies", "Forge was not"))
    assert check(tensors | {key.replace("alpha", "gain"): torch.ones(1)}).headline.startswith(
        "1 part of this file is not read"
    )


SD15 = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ((320, 320), 16),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": ((320, 768), 12),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": ((320, 1280), 3),
    "down_blocks.0.resnets.0.conv1": ((320, 320, 3, 3), 4),
}


def write_lora(path, alpha=16.0, seed=0):
    """A LoCon of mixed ranks, as kohya's scripts write it."""
    tensors = {}
    for i, (name, (shape, rank)) in enumerate(SD15.items()):
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= pair(stem, shape, rank, seed + i) | {f"{stem}.alpha": torch.tensor(alpha)}
    save_file(tensors, path, {"ss_network_alpha": f"{alpha:g}", "ss_network_dim": "16"})
    return path


def make_base(seed, near=None):
    """The weights that the LoRA changes."""
    weights = {}
    for i, (name, (shape, _)) in enumerate(SD15.items()):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
        weights[f"{name}.weight"] = noise if near is None else near[f"{name}.weight"] + 0.1 * noise
    return weights


FORMATS = ["auto", "kohya", "diffusers", "comfy", "peft"]
PROGRAMS = ["comfyui", "forge", "a1111", "sd-scripts"]
RANKS = ["exact", 0.9]
MADE = pair_up([*itertools.product(("convert", "merge", "transfer"), RANKS)], FORMATS + PROGRAMS)
# Of a few weights alone no family is known, whose programs could be asked.
MADE += pair_up([("extract", rank) for rank in (16, 0.9)], FORMATS)


@pytest.fixture(scope="module")
def bases():
    source = make_base(50)
    return source, make_base(90, near=source)


@pytest.mark.parametrize(("making", "format"), MADE, ids=str)
def test_what_a_verb_writes_of_mixed_ranks_is_right(bases, tmp_path, making, format):
    verb, rank = making
    lora = write_lora(tmp_path / "lora.safetensors")
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    known = {"out": out, "out_rank": rank, **({} if format == "auto" else {"format": format})}
    if verb == "convert":
        prolora.convert(lora, **known)
    elif verb == "merge":
        prolora.merge([lora, write_lora(tmp_path / "other.safetensors", seed=7)], **known)
    elif verb == "extract":
        prolora.extract(*bases, **known)
    else:
        prolora.transfer(lora, *bases, **known)
    found = check(out)
    assert found.mark == "✔" and not found.defects, str(found)
    assert found.headline == "a LoRA for Stable Diffusion 1.5"
