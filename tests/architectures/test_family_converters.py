"""The tables of further families say what diffusers' converters do, row by row."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diagonal import mark_size
from family_files import (
    assert_equal_tensors,
    is_parameter,
    make_authors_file,
    make_lora,
    name_authors_weights,
    name_weights,
    rename_by_aliases,
)
from family_oracles import Checkpoint

from prolora.architectures.families import known_families
from prolora.architectures.family import Family

single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
lora_files = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

CHECKPOINTS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "qwen-image-2.1": "convert_qwen_image21_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "cosmos": "convert_cosmos_transformer_checkpoint_to_diffusers",
    "ltxv": "convert_ltx_transformer_checkpoint_to_diffusers",
    "ltx2": "convert_ltx2_transformer_to_diffusers",
    "ernie-image": "convert_ernie_image_transformer_checkpoint_to_diffusers",
    "flux3": "convert_flux3_transformer_checkpoint_to_diffusers",
    "minimax-h3": "convert_minimax_h3_transformer_checkpoint_to_diffusers",
    "mochi": "convert_mochi_transformer_checkpoint_to_diffusers",
}
ADAPTER = "llm_adapter."


def is_converted(module: str) -> bool:
    """All but these.

    Anima's adapter of the text encoder is a model of its own in diffusers. The positions of two
    images in Wan FLF2V, the modulations by the prompt in LTX-2.3 and SkyReels' frame rate keep the
    authors' names there; only diffusers' scripts rename them. It has no class of Wan S2V.
    """
    other = (ADAPTER, "prompt_adaln.", "audio_prompt_adaln.", "fps_projection.", "audio_injector.")
    return not module.startswith(other) and not module.endswith("image_embedder.pos_embed")


def by_id(id_: str) -> Family:
    return known_families()[id_]


def each_size(*ids: str) -> list[object]:
    pairs = [(id_, layout) for id_ in ids for layout in by_id(id_).layouts]
    return [
        pytest.param(*pair, marks=mark_size(pair[1]))
        for pair in pairs
        if pair[1] != "chroma-radiance"  # which diffusers has no class of
    ]


def find_converter(module, name):
    """A function of diffusers."""
    if not hasattr(module, name):
        pytest.skip(f"this diffusers has no {name}")
    return getattr(module, name)


@pytest.mark.parametrize(("id_", "layout"), each_size(*CHECKPOINTS))
def test_an_authors_checkpoint_is_what_diffusers_makes_of_it(id_: str, layout: str) -> None:
    """Weights and biases: names, rows of fused matrices, swapped halves; not the norms."""
    file = make_authors_file(by_id(id_), layout, is_converted)
    expected = name_weights(file.expected)
    stored = Checkpoint(name_authors_weights(by_id(id_), file.stored))
    got = find_converter(single_file, CHECKPOINTS[id_])(checkpoint=stored, config={})
    assert_equal_tensors({key: got.get(key) for key in expected}, expected)
    biases = {key: f"{key.removesuffix('.bias')}.weight" for key in got if key.endswith(".bias")}
    for bias, key in biases.items():
        assert key not in expected or torch.equal(got[bias], expected[key][:, 0]), bias


class Written(NamedTuple):
    """LoRAs of a program, and the converter of diffusers that reads them."""

    family: str
    converter: str
    keep: Callable[[str], bool]  # the modules that it handles
    prefix: str = "diffusion_model."


KOHYA = "lora_unet_"


def fits(pattern: str) -> Callable[[str], bool]:
    """Modules of linear layers, which a LoRA's two factors can belong to."""
    return lambda name: not is_parameter(name) and bool(re.match(pattern, name))


# Where a reader leaves out what lies outside the blocks, or gives it no prefix.
IN_BLOCKS = fits(r".*\.\d+\.")
CONVERT = "_convert_{}_lora_to_diffusers"
WRITTEN = (
    *(
        Written(id_, CONVERT.format(name), IN_BLOCKS, KOHYA)
        for id_, name in {
            "flux": "kohya_flux",
            "flux2": "kohya_flux2",
            "qwen-image": "non_diffusers_qwen",
            "z-image": "non_diffusers_z_image",
        }.items()
    ),
    *(
        Written(id_, CONVERT.format(f"non_diffusers_{name}"), fits(""))
        for id_, name in {"qwen-image": "qwen", "hidream": "hidream", "krea2": "krea2"}.items()
    ),
    Written(
        "lumina2",
        "_convert_non_diffusers_lumina2_lora_to_diffusers",
        fits(r"(layers|context_refiner|noise_refiner)\."),
    ),
    # It renames `norm_out` without swapping its halves, which the reader of checkpoints swaps.
    Written("flux2", "_convert_non_diffusers_flux2_lora_to_diffusers", fits("(?!norm_out)")),
    # It knows no blocks of VACE, S2V or Animate alone.
    Written(
        "wan",
        "_convert_non_diffusers_wan_lora_to_diffusers",
        fits(r"blocks\.|condition_embedder\.|proj_out"),
    ),
    # musubi-tuner trains attention and feed-forward of the blocks.
    Written(
        "wan",
        "_convert_musubi_wan_lora_to_diffusers",
        fits(r"blocks\.\d+\.(attn|ffn)"),
        KOHYA,
    ),
    Written("cosmos", "_convert_non_diffusers_anima_lora_to_diffusers", lambda name: True),
    Written("ltx2", "_convert_non_diffusers_ltx2_lora_to_diffusers", fits("")),
    Written(
        "flux3",
        "_convert_non_diffusers_flux3_lora_to_diffusers",
        fits(r"(?:mode|single_transformer|transformer)_blocks\."),
    ),
    Written("ideogram4", "_convert_non_diffusers_ideogram4_lora_to_diffusers", fits(r"layers\.")),
    Written(
        "minimax-h3",
        "_convert_non_diffusers_minimax_h3_lora_to_diffusers",
        fits(r"transformer_blocks\."),
    ),
    Written(
        "minimax-h3",
        "_convert_non_diffusers_minimax_h3_lora_to_diffusers",
        lambda name: True,
        KOHYA,
    ),
    Written(
        "ace-step-1.5",
        "_convert_non_diffusers_ace_step_lora_to_diffusers",
        lambda name: "_attn." in name or ".mlp." in name,
        "base_model.model.",
    ),
)


@pytest.mark.parametrize(
    ("written", "layout"),
    [
        pytest.param(one, layout, marks=mark_size(layout))
        for one in WRITTEN
        for layout in by_id(one.family).layouts
    ],
)
def test_a_lora_of_another_program_is_what_diffusers_makes_of_it(written, layout) -> None:
    """The adapter of Anima's text goes to another model there, under the same names."""
    file = make_authors_file(by_id(written.family), layout, written.keep)
    kohya = written.prefix == KOHYA
    stored = make_lora(file.stored, written.prefix, dotted=not kohya, kohya=kohya)
    got = find_converter(lora_files, written.converter)(stored)
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


@pytest.mark.parametrize(
    ("id_", "layout"),
    [
        case
        for case in each_size(*CHECKPOINTS, "hunyuan-video", "hunyuan-video-1.5", "hunyuan-image")
        if by_id(case.values[0]).aliases and case.values[1] != "framepack"
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
        underscored = family.find_weight(name.replace(".", "_"), dotted=False)
        assert underscored is not None
        assert underscored._replace(variant=weight.variant, spelled=weight.spelled) == weight
        rows = matrix.split(weight.split_rows(len(matrix)))
        if weight.swap == "always":
            rows = tuple(torch.cat(part.chunk(2)[::-1]) for part in rows)
        got |= dict(zip(weight.parts, rows, strict=True))
    assert_equal_tensors(got, file.expected)
