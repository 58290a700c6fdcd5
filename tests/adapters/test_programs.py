"""Which programs read a file, and which format each wants."""

import pytest
import torch
from safetensors.torch import load_file

from prolora.adapters import Adapter, encode_state_dict, write_adapter
from prolora.adapters.formats.programs import PROGRAMS, choose_format, find_readers
from prolora.architectures.families import known_families
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat
from prolora.workflow.inspection import inspect

MODULE = "transformer_blocks.0.attn.to_q"


def adapter_for(family):
    update = LowRank(torch.ones(3072, 1), torch.ones(1, 3072))
    return Adapter({MODULE: update}, family=family, format="diffusers")


def test_every_program_in_the_data_has_a_word_for_it_on_the_command_line():
    named = {name for family in known_families().values() for name in family.readers}
    assert named == {*PROGRAMS.values(), "diffusers"}


@pytest.mark.parametrize(
    ("family", "program", "start"),
    [
        ("qwen-image", "comfyui", "diffusion_model.transformer_blocks.0.attn.to_q.lora_A"),
        ("qwen-image", "musubi", "lora_unet_transformer_blocks_0_attn_to_q.lora_down"),
        ("flux", "forge", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
        ("flux", "sd-scripts", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
    ],
)
def test_a_program_gets_the_spelling_it_reads(family, program, start):
    keys = encode_state_dict(adapter_for(family), format=program)
    assert f"{start}.weight" in keys


def test_a_program_that_reads_none_of_our_formats_is_named_with_those_that_do():
    with pytest.raises(UnsupportedFormat, match=r"A1111 reads no LoRA for Qwen-Image.*ComfyUI"):
        encode_state_dict(adapter_for("qwen-image"), format="a1111")


def test_where_several_families_are_possible_only_what_all_share_counts():
    assert choose_format(["flux", "chroma"], "forge") in ("kohya", "comfy")
    assert "InvokeAI" in find_readers(["flux"], "diffusers", None)
    assert "InvokeAI" not in find_readers(["flux", "chroma"], "diffusers", None)


def test_inspect_says_which_programs_read_a_file(tmp_path):
    write_adapter(adapter_for("qwen-image"), tmp_path / "lora", format="kohya")
    assert {"ComfyUI", "musubi"} <= set(inspect(tmp_path / "lora").readers)
    tensors = load_file(tmp_path / "lora")
    assert all(key.startswith("lora_unet_transformer_blocks_0") for key in tensors)


@pytest.mark.parametrize(
    ("family", "format", "module"),
    [
        ("cosmos", "diffusers", "llm_adapter.blocks.0.self_attn.q_proj"),
        ("chroma", "kohya", "distilled_guidance_layer.in_proj"),
        ("wan", "comfy", "vace_blocks.0.attn1.to_q"),
        ("wan", "kohya", "vace_blocks.0.attn1.to_q"),
    ],
)
def test_a_program_that_does_not_read_some_modules_is_no_reader_of_a_file_with_them(
    family, format, module
):
    assert "diffusers" in find_readers([family], format, None, ["transformer_blocks.0.attn.to_q"])
    assert "diffusers" not in find_readers([family], format, None, [module])
    assert "ComfyUI" in find_readers([family], "comfy", None, [module])
