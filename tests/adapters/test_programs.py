"""Which programs read a file, and which format each wants."""

import json
import re
from typing import get_args

import loader_matrix as matrix
import pytest
import torch
from lora_files import adapter_for, lora_on
from property_examples import AT_NIGHT

import prolora
from prolora import Adapter, LowRank, check
from prolora.adapters.formats.programs import choose_format
from prolora.architectures.families import known_families
from prolora.architectures.family import SPELLINGS
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import find_reach, known_loaders, name_row
from prolora.errors import UnsupportedFormat
from prolora.verbs.options import FormatName, ProgramName

MODULE = "transformer_blocks.0.attn.to_q"
CLIP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
T5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
TEXT = {CLIP: (3072, 768), T5: (4096, 4096)}


def write(family, modules=(MODULE,), format="auto", **fields):
    """The tensors of a LoRA on some modules, as prolora writes them."""
    shapes = find_layout(family, modules[-1]).shapes
    updates = {}
    for name in modules:
        out, inputs = shapes.get(name, TEXT.get(name, (3072, 3072)))
        updates[name] = LowRank(torch.ones(out, 1), torch.ones(1, inputs))
    fields = {"format": "diffusers"} | fields
    return prolora.convert(adapter_for(family, updates, **fields), format=format).state_dict()


def find_layout(family, module):
    """The first published size that has a module, or the first of all."""
    layouts = [load_layout(id_) for id_ in known_families()[family].layouts]
    return next((layout for layout in layouts if module in layout.shapes), layouts[0])


def readers_of(family, format, *modules):
    """Who reads how much of such a LoRA, whose header names the family."""
    header = {"ss_base_model_version": next(iter(known_families()[family].claims))}
    return check(prolora.Lora.open(write(family, modules, format), header)).readers


def test_every_program_in_the_table_and_every_format_has_a_word_for_it_on_the_command_line():
    assert set(known_loaders()) == set(get_args(ProgramName))
    assert {"auto", *SPELLINGS} == set(get_args(FormatName))


def test_the_table_is_what_the_counts_say():
    """`python bench/loader_matrix.py table` makes it."""
    raw = json.loads(matrix.RESULTS.read_text("utf-8"))
    assert matrix.format_table(matrix.make_table(raw)) == matrix.TABLE.read_text("utf-8")


@pytest.mark.parametrize(
    ("family", "program", "start"),
    [
        ("qwen-image", "comfyui", "diffusion_model.transformer_blocks.0.attn.to_q.lora_A"),
        ("qwen-image", "musubi", "lora_unet_transformer_blocks_0_attn_to_q.lora_down"),
        ("flux", "sdnext", "lora_unet_double_blocks_0_img_attn_qkv.lora_down"),
        # Of its own format musubi reads half, of LoRAs on q, k and v in one
        ("z-image", "musubi", "lora_unet_layers_0_attention_to_q.lora_down"),
        ("sd3", "sdnext", "lycoris_transformer_blocks_0_attn_to_q.lora_down"),
        # In diffusers' names behind ComfyUI's prefix, or behind none, which more programs read.
        ("flux2", "diffsynth", "transformer_blocks.0.attn.to_q.lora_A"),
    ],
)
def test_a_program_gets_the_spelling_it_reads(family, program, start):
    module = "layers.0.attention.to_q" if family == "z-image" else MODULE
    assert f"{start}.weight" in write(family, [module], program)


def test_a_program_that_reads_none_of_our_formats_is_named_with_those_that_do():
    with pytest.raises(UnsupportedFormat, match=r"SD.Next reads no LoRA for LongCat.*ComfyUI"):
        write("longcat-image", format="sdnext")


def test_a_program_that_was_not_tried_with_a_model_is_not_said_to_read_nothing():
    with pytest.raises(UnsupportedFormat, match=r"A1111 was not tried .*`format='comfy'`"):
        write("qwen-image", format="a1111")


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


@pytest.mark.parametrize("number", range(len(known_families())), ids=list(known_families()))
def test_what_is_written_for_a_program_is_read_by_it(number):
    """Every program that reads anything of a family gets a file of which it reads something."""
    family, one = [*known_families().items()][number]
    usual = [n for n in load_layout(one.layouts[0]).adapted if not re.search(r"\.[2-9]\d*\.", n)]
    programs = [*known_loaders()]
    for program in programs if AT_NIGHT else programs[number % 3 :: 3]:
        try:
            format, spelling = choose_format([family], program, usual)
        except UnsupportedFormat:
            continue
        row = name_row(one, format, spelling or one.spellings[format])
        assert find_reach(one, row, usual)[program] in ("whole", "part")
        assert format != "peft"  # a folder, which none of them is given


def test_where_several_families_are_possible_only_what_all_share_counts():
    assert choose_format(["flux", "chroma"], "forge")[0] in ("kohya", "comfy")
    readers = check(write("flux", ["single_transformer_blocks.37.attn.to_q"], "diffusers")).readers
    assert "InvokeAI (as FLUX.1)" in readers.whole
    assert "InvokeAI" in readers_of("flux", "diffusers", MODULE).whole


def test_a_check_says_who_reads_a_file_whole_and_who_not_at_all():
    tensors = write("qwen-image", ["transformer_blocks.59.attn.to_q"], "kohya")
    readers = check(tensors).readers
    assert {"ComfyUI", "musubi-tuner", "diffusers"} <= set(readers.whole)
    assert {"DiffSynth-Studio", "LightX2V"} <= set(readers.none)
    assert all(key.startswith("lora_unet_transformer_blocks_59") for key in tensors)


def test_a_program_that_reads_some_modules_reads_a_file_with_others_in_part():
    fused, other = "layers.29.attention.to_q", "layers.29.feed_forward.w1"
    assert "mflux" in readers_of("z-image", "kohya", fused, other).part
    assert "mflux" in readers_of("z-image", "kohya", fused).none
    assert "mflux" in readers_of("z-image", "kohya", other).whole


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
    attention = find_layout(family, module).attention
    usual = [name for name in attention if not name.startswith(("llm_adapter", "vace"))]
    alone, beside = (readers_of(family, format, *usual[-3:], *more) for more in ((), (module,)))
    assert "diffusers" in " ".join(alone.whole)
    assert "diffusers" in " ".join(getattr(beside, left))
    assert "ComfyUI" in readers_of(family, "comfy", *usual[-3:], module).whole


def test_a_format_that_no_program_reads_is_replaced_by_what_most_read():
    """A LoRA that comes in ComfyUI's spelling of FLUX.1 and goes to Bria FIBO."""
    keys = write("bria-fibo", **{"format": "auto"})
    assert all(key.startswith("transformer.transformer_blocks.0") for key in keys)


def test_text_encoders_count_where_a_programs_code_tells():
    """Forge reads kohya's names of FLUX's T5, and of diffusers' files CLIP alone."""
    kohya = readers_of("flux", "kohya", MODULE, CLIP, T5)
    assert {"ComfyUI", "Forge", "sd-scripts"} <= set(kohya.whole)
    assert "musubi-tuner" in kohya.part  # which reads no text encoder
    assert "Forge" in readers_of("flux", "diffusers", MODULE, CLIP).whole
    assert "Forge" in readers_of("flux", "diffusers", MODULE, CLIP, T5).part


def test_a_table_that_no_program_was_tried_with_is_no_success():
    """ComfyUI reads 501 of these 502 from names with underscores."""
    shapes = load_layout("boogu-image").shapes
    lora = lora_on("boogu-image", "diffusion_model.", shapes)
    kohya = prolora.convert(lora, format="kohya")
    found = check(kohya, program="comfyui")
    assert found.modules == {"transformer": 502}
    assert str(found).startswith("⚠ ComfyUI was not tried with such a file")
    without = {key: x for key, x in kohya.state_dict().items() if "image_index" not in key}
    assert str(check(without, program="comfyui")).startswith("✔")
