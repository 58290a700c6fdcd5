"""Which programs read a file, and which format each wants."""

import json
import re
from typing import get_args

import loader_matrix as matrix
import pytest
import torch
from safetensors.torch import load_file

import prolora
from prolora import Adapter, LowRank
from prolora.adapters.formats.programs import choose_format, find_readers
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import find_reach, known_loaders, name_row
from prolora.errors import UnsupportedFormat
from prolora.verbs.options import ProgramName

MODULE = "transformer_blocks.0.attn.to_q"


def adapter_for(family, format="diffusers", module=MODULE):
    update = LowRank(torch.ones(3072, 1), torch.ones(1, 3072))
    return Adapter({module: update}, origin=Model.of(family), format=format)


def test_every_program_in_the_table_has_a_word_for_it_on_the_command_line():
    assert set(known_loaders()) == set(get_args(ProgramName))


def test_the_table_is_what_the_counts_say():
    """`python bench/loader_matrix.py table` makes it."""
    raw = json.loads(matrix.RESULTS.read_text("utf-8"))
    assert matrix.format_table(matrix.make_table(raw)) == matrix.TABLE.read_text("utf-8")


@pytest.mark.parametrize(
    ("family", "program", "start"),
    [
        ("qwen-image", "comfyui", "diffusion_model.transformer_blocks.0.attn.to_q.lora_A"),
        ("qwen-image", "musubi", "lora_unet_transformer_blocks_0_attn_to_q.lora_down"),
        ("qwen-image", "mflux", "diffusion_model.transformer_blocks.0.attn.to_q.lora_A"),
        ("qwen-image", "sdcpp", "diffusion_model.transformer_blocks.0.attn.to_q.lora_A"),
        ("flux", "sdnext", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
        ("flux", "forge", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
        ("flux", "sd-scripts", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
        # Of its own format musubi reads half, of LoRAs on q, k and v in one
        ("z-image", "musubi", "lora_unet_layers_0_attention_to_q.lora_down"),
        ("sd3", "sdnext", "lycoris_transformer_blocks_0_attn_to_q.lora_down"),
        # In diffusers' names behind ComfyUI's prefix, or behind none, which more programs read.
        ("flux2", "diffsynth", "transformer_blocks.0.attn.to_q.lora_A"),
    ],
)
def test_a_program_gets_the_spelling_it_reads(family, program, start):
    module = "layers.0.attention.to_q" if family == "z-image" else MODULE
    keys = prolora.convert(adapter_for(family, module=module), format=program).state_dict()
    assert f"{start}.weight" in keys


def test_a_program_that_reads_none_of_our_formats_is_named_with_those_that_do():
    with pytest.raises(UnsupportedFormat, match=r"SD.Next reads no LoRA for LongCat.*ComfyUI"):
        prolora.convert(adapter_for("longcat-image"), format="sdnext").state_dict()


def test_a_program_that_was_not_tried_with_a_model_is_not_said_to_read_nothing():
    with pytest.raises(UnsupportedFormat, match=r"A1111 was not tried .*`format='comfy'`"):
        prolora.convert(adapter_for("qwen-image"), format="a1111").state_dict()
    assert prolora.convert(adapter_for("qwen-image"), format="comfy").state_dict()


def test_where_all_models_that_names_fit_take_one_spelling_it_is_written():
    """The sizes are those of none of them, and not all are models of the program."""
    shapes = {f"single_transformer_blocks.0.attn.to_{x}": (64, 64) for x in "qkv"}
    shapes |= {"single_transformer_blocks.0.proj_mlp": (256, 64)}
    shapes |= {"transformer_blocks.0.attn.add_q_proj": (64, 64)}
    updates = {n: LowRank(torch.ones(a, 1), torch.ones(1, b)) for n, (a, b) in shapes.items()}
    adapter = Adapter(updates, format="diffusers")
    assert len(adapter.model.names) > 1 and not adapter.model.families
    keys = prolora.convert(adapter, format="comfyui").state_dict()
    assert "diffusion_model.single_blocks.0.linear1.lora_A.weight" in keys


@pytest.mark.parametrize("family", known_families())
def test_what_is_written_for_a_program_is_read_by_it(family):
    """Every program that reads anything of a family gets a file of which it reads something."""
    one = known_families()[family]
    usual = [n for n in load_layout(one.layouts[0]).adapted if not re.search(r"\.[2-9]\d*\.", n)]
    for program in known_loaders():
        try:
            format, spelling = choose_format([family], program, usual)
        except UnsupportedFormat:
            continue
        row = name_row(one, format, spelling or one.spellings[format])
        assert find_reach(one, row, usual)[program] in ("whole", "part")
        assert format != "peft"  # a folder, which none of them is given


def test_where_several_families_are_possible_only_what_all_share_counts():
    assert choose_format(["flux", "chroma"], "forge")[0] in ("kohya", "comfy")
    style = known_families()["flux"].spellings["diffusers"]
    assert "InvokeAI" in find_readers(["flux"], "diffusers", style, [MODULE]).whole
    assert "InvokeAI" not in find_readers(["flux", "chroma"], "diffusers", style, [MODULE]).whole


def test_a_check_says_who_reads_a_file_whole_and_who_not_at_all(tmp_path):
    prolora.convert(adapter_for("qwen-image"), out=tmp_path / "lora.safetensors", format="kohya")
    description = prolora.check(tmp_path / "lora.safetensors")
    assert {"ComfyUI", "musubi-tuner", "diffusers"} <= set(description.readers.whole)
    assert {"DiffSynth-Studio", "LightX2V"} <= set(description.readers.none)
    tensors = load_file(tmp_path / "lora.safetensors")
    assert all(key.startswith("lora_unet_transformer_blocks_0") for key in tensors)


def test_a_program_that_reads_some_modules_reads_a_file_with_others_in_part():
    style = known_families()["z-image"].spellings["kohya"]
    fused, other = "layers.0.attention.to_q", "layers.0.feed_forward.w1"
    both = find_readers(["z-image"], "kohya", style, [fused, other])
    assert "mflux" in both.part
    assert "mflux" in find_readers(["z-image"], "kohya", style, [fused]).none
    assert "mflux" in find_readers(["z-image"], "kohya", style, [other]).whole


@pytest.mark.parametrize(
    ("family", "format", "module", "left"),
    [
        ("cosmos", "diffusers", "llm_adapter.blocks.0.self_attn.q_proj", "whole"),
        ("flux2", "comfy", "norm_out.linear", "part"),
        ("chroma", "kohya", "distilled_guidance_layer.in_proj", "none"),
        ("wan", "comfy", "vace_blocks.0.attn1.to_q", "none"),
        ("wan", "kohya", "vace_blocks.0.attn1.to_q", "none"),
    ],
)
def test_a_program_that_stops_at_a_module_reads_nothing_of_a_file_with_it(
    family, format, module, left
):
    styles = known_families()[family].spellings
    attention = load_layout(known_families()[family].layouts[0]).attention
    usual = next(name for name in attention if not name.startswith("llm_adapter"))
    style = styles[format]
    assert "diffusers" in find_readers([family], format, style, [usual]).whole
    assert "diffusers" in getattr(find_readers([family], format, style, [usual, module]), left)
    assert (
        "ComfyUI"
        in find_readers(
            [family], "comfy", known_families()[family].spellings["comfy"], [module]
        ).whole
    )


def test_a_format_that_no_program_reads_is_replaced_by_what_most_read():
    """A LoRA that comes in ComfyUI's spelling of FLUX.1 and goes to Bria FIBO."""
    keys = prolora.convert(adapter_for("bria-fibo", format="comfy")).state_dict()
    assert all(key.startswith("transformer.transformer_blocks.0") for key in keys)


def test_text_encoders_count_where_a_programs_code_tells():
    """Forge reads kohya's names of FLUX's T5, and of diffusers' files CLIP alone."""
    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    spellings = known_families()["flux"].spellings
    kohya = find_readers(["flux"], "kohya", spellings["kohya"], [MODULE, clip, t5])
    assert {"ComfyUI", "Forge", "sd-scripts"} <= set(kohya.whole)
    assert "musubi-tuner" in kohya.part  # which reads no text encoder
    dotted = spellings["diffusers"]
    assert "Forge" in find_readers(["flux"], "diffusers", dotted, [MODULE, clip]).whole
    assert "Forge" in find_readers(["flux"], "diffusers", dotted, [MODULE, clip, t5]).part
    assert "Forge" in find_readers(["flux"], "diffusers", dotted, [t5]).none
