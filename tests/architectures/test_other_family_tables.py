"""The tables of families that few LoRAs move within say what diffusers' converters do."""

from __future__ import annotations

import pytest
from family_files import (
    assert_equal_tensors,
    is_parameter,
    make_authors_file,
    make_lora,
    name_weights,
)
from family_oracles import Checkpoint

from prolora.architectures.families import known_families

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
lora_files = pytest.importorskip("diffusers.loaders.lora_conversion_utils")


@pytest.mark.parametrize(
    ("id_", "layout", "convert"),
    [
        ("ernie-image", "ernie-image", "convert_ernie_image_transformer_checkpoint_to_diffusers"),
        ("flux3", "flux3-klein", "convert_flux3_transformer_checkpoint_to_diffusers"),
        ("flux3", "flux3-klein-distilled", "convert_flux3_transformer_checkpoint_to_diffusers"),
        ("minimax-h3", "minimax-h3", "convert_minimax_h3_transformer_checkpoint_to_diffusers"),
        ("mochi", "mochi", "convert_mochi_transformer_checkpoint_to_diffusers"),
    ],
)
def test_an_authors_checkpoint_is_what_diffusers_makes_of_it(
    id_: str, layout: str, convert: str
) -> None:
    """All weights, row by row; the converters may ask for norms and biases too."""
    file = make_authors_file(known_families()[id_], layout)
    stored, expected = Checkpoint(name_weights(file.stored)), name_weights(file.expected)
    got = getattr(single_file, convert)(stored, config={})
    assert_equal_tensors({key: got[key] for key in expected}, expected)
    assert got is stored or not stored


@pytest.mark.parametrize(
    ("id_", "layout", "convert"),
    [
        ("flux3", "flux3-klein", "_convert_non_diffusers_flux3_lora_to_diffusers"),
        ("ideogram4", "ideogram4", "_convert_non_diffusers_ideogram4_lora_to_diffusers"),
        ("minimax-h3", "minimax-h3", "_convert_non_diffusers_minimax_h3_lora_to_diffusers"),
    ],
)
def test_a_lora_of_comfyui_is_what_diffusers_makes_of_it(
    id_: str, layout: str, convert: str
) -> None:
    """Attention, feed-forward and modulation of the blocks."""
    family = known_families()[id_]
    in_blocks = ("mode_blocks.", "single_transformer_blocks.", "layers.", "transformer_blocks.")
    file = make_authors_file(
        family, layout, lambda name: name.startswith(in_blocks) and not is_parameter(name)
    )
    got = getattr(lora_files, convert)(make_lora(file.stored, "diffusion_model."))
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


def test_a_minimax_lora_of_musubi_is_what_diffusers_makes_of_it() -> None:
    """Everything a LoRA can train there, also outside the blocks."""
    file = make_authors_file(known_families()["minimax-h3"], "minimax-h3")
    got = lora_files._convert_non_diffusers_minimax_h3_lora_to_diffusers(
        make_lora(file.stored, "lora_unet_", dotted=False, kohya=True)
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize("layout", known_families()["ace-step-1.5"].layouts)
def test_an_ace_step_lora_of_its_authors_is_what_diffusers_makes_of_it(layout: str) -> None:
    """Attention, as their trainer has it, and the rest that keeps its names."""
    file = make_authors_file(
        known_families()["ace-step-1.5"], layout, lambda name: "_attn." in name or ".mlp." in name
    )
    got = lora_files._convert_non_diffusers_ace_step_lora_to_diffusers(
        make_lora(file.stored, "base_model.model.")
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))
