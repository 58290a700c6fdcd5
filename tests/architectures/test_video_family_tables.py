"""The tables of video families say what diffusers' converters do, row by row."""

from __future__ import annotations

import re

import pytest
import torch
from diagonal import list_sizes, mark_size
from family_files import (
    assert_equal_tensors,
    is_parameter,
    make_authors_file,
    make_lora,
    name_weights,
    rename_by_aliases,
)

from prolora.architectures.families import known_families
from prolora.architectures.family import Family

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
lora_files = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

CHECKPOINTS = {
    "wan": single_file.convert_wan_transformer_to_diffusers,
    "cosmos": single_file.convert_cosmos_transformer_checkpoint_to_diffusers,
    "ltxv": single_file.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx2": single_file.convert_ltx2_transformer_to_diffusers,
}
IDS = (*CHECKPOINTS, "hunyuan-video", "hunyuan-video-1.5", "hunyuan-image")
LAYOUTS = [(id_, layout) for id_ in IDS for layout in known_families()[id_].layouts]
ADAPTER = "llm_adapter."


def is_converted(module: str) -> bool:
    """All but these.

    Anima's adapter of the text encoder is a model of its own in diffusers. The positions of two
    images in Wan FLF2V, the modulations by the prompt in LTX-2.3 and SkyReels' frame rate keep the
    authors' names there; only diffusers' scripts rename them. It has no class of Wan S2V.
    """
    other = (ADAPTER, "prompt_adaln.", "audio_prompt_adaln.", "fps_projection.", "audio_injector.")
    return not module.startswith(other) and not module.endswith("image_embedder.pos_embed")


def is_adaptable(module: str) -> bool:
    """What a LoRA's two factors can belong to."""
    return not is_parameter(module)


def is_in_block(module: str) -> bool:
    """Attention and feed-forward of the blocks, which is what musubi-tuner trains in Wan."""
    return bool(re.match(r"blocks\.\d+\.(attn|ffn)", module))


def by_id(id_: str) -> Family:
    return known_families()[id_]


@pytest.mark.parametrize(
    ("id_", "layout"),
    [pytest.param(*pair, marks=mark_size(pair[1])) for pair in LAYOUTS if pair[0] in CHECKPOINTS],
)
def test_an_authors_checkpoint_is_what_diffusers_makes_of_it(id_: str, layout: str) -> None:
    """All weights of every published size: names, rows of fused matrices, swapped halves."""
    file = make_authors_file(by_id(id_), layout, is_converted)
    got = CHECKPOINTS[id_](name_weights(file.stored))
    assert_equal_tensors(got, name_weights(file.expected))


@pytest.mark.parametrize("layout", list_sizes(by_id("wan").layouts))
def test_a_wan_lora_of_comfyui_is_what_diffusers_makes_of_it(layout: str) -> None:
    """With the embeddings and the last layer; it knows no blocks of VACE, S2V or Animate alone."""
    known = ("blocks.", "condition_embedder.", "proj_out")
    file = make_authors_file(
        by_id("wan"), layout, lambda name: is_adaptable(name) and name.startswith(known)
    )
    got = lora_files._convert_non_diffusers_wan_lora_to_diffusers(
        make_lora(file.stored, "diffusion_model.")
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize("layout", list_sizes(by_id("wan").layouts))
def test_a_wan_lora_of_musubi_is_what_diffusers_makes_of_it(layout: str) -> None:
    file = make_authors_file(by_id("wan"), layout, is_in_block)
    got = lora_files._convert_musubi_wan_lora_to_diffusers(
        make_lora(file.stored, "lora_unet_", dotted=False, kohya=True)
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize("layout", list_sizes(by_id("cosmos").layouts))
def test_an_anima_lora_of_comfyui_is_what_diffusers_makes_of_it(layout: str) -> None:
    """The adapter's modules go to another model there, under the same names."""
    file = make_authors_file(by_id("cosmos"), layout)
    got = lora_files._convert_non_diffusers_anima_lora_to_diffusers(
        make_lora(file.stored, "diffusion_model.")
    )
    got = {key.replace("text_conditioner.", "transformer." + ADAPTER): got[key] for key in got}
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize("layout", ["hunyuan-video", "hunyuan-video-i2v-33"])
def test_a_checkpoint_of_hunyuan_video_is_what_diffusers_makes_of_it(layout: str) -> None:
    """In the authors' names, which are the aliases."""
    family = by_id("hunyuan-video")
    file = make_authors_file(family, layout)
    renamed = rename_by_aliases(family, file.stored)
    assert sum(name not in file.stored for name in renamed) > len(renamed) * 2 / 3
    got = single_file.convert_hunyuan_video_transformer_to_diffusers(name_weights(renamed))
    assert_equal_tensors(got, name_weights(file.expected))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_a_lora_of_hunyuan_video_is_what_diffusers_makes_of_it(prefix: str) -> None:
    """All that the converter handles: it misnames the text's refiner and halves the last `down`."""
    family = by_id("hunyuan-video")
    file = make_authors_file(
        family,
        "hunyuan-video",
        lambda name: "embedder.token" not in name and "norm_out" not in name,
    )
    got = lora_files._convert_hunyuan_video_lora_to_diffusers(
        make_lora(rename_by_aliases(family, file.stored), prefix)
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize("layout", list_sizes(by_id("ltx2").layouts))
def test_an_ltx2_lora_of_comfyui_is_what_diffusers_makes_of_it(layout: str) -> None:
    file = make_authors_file(by_id("ltx2"), layout, is_adaptable)
    got = lora_files._convert_non_diffusers_ltx2_lora_to_diffusers(
        make_lora(file.stored, "diffusion_model.")
    )
    assert_equal_tensors(got, make_lora(file.expected, "transformer."))


@pytest.mark.parametrize(
    ("id_", "layout"),
    [
        pytest.param(*pair, marks=mark_size(pair[1]))
        for pair in LAYOUTS
        if by_id(pair[0]).aliases and pair[1] != "framepack"
    ],
)
def test_the_other_names_of_a_matrix_hold_the_same_modules(id_: str, layout: str) -> None:
    """Fused or in parts: together they are the whole model."""
    family = by_id(id_)
    file = make_authors_file(family, layout)
    got = {}
    for name, matrix in rename_by_aliases(family, file.stored).items():
        weight = family.find_weight(name)
        assert weight is not None
        assert family.find_weight(name.replace(".", "_"), dotted=False) == weight
        unit = len(matrix) // sum(weight.shares)
        rows = matrix.split([unit * share for share in weight.shares])
        if weight.swap == "always":
            rows = tuple(torch.cat(part.chunk(2)[::-1]) for part in rows)
        got |= dict(zip(weight.parts, rows, strict=True))
    assert_equal_tensors(got, file.expected)
