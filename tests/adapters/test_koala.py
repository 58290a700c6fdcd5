"""KOALA has one layer in a block, SDXL two: the original numbers of its blocks mean others."""

import pytest
import torch

from prolora.adapters import Adapter, encode_state_dict
from prolora.architectures.identify import identify
from prolora.architectures.layouts import load_layout
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat

SIZES = ("koala-1b", "koala-700m")


def make_adapter(layout: str) -> Adapter:
    shapes = load_layout(layout).shapes
    updates = {
        name: LowRank(torch.ones(shapes[name][0], 1), torch.ones(1, shapes[name][1]))
        for name in load_layout(layout).attention
    }
    return Adapter(updates, format="diffusers")


@pytest.mark.parametrize("layout", SIZES)
def test_a_lora_of_koala_is_told_from_one_of_sdxl_by_the_attentions_of_its_blocks(
    layout: str,
) -> None:
    assert make_adapter(layout).model.families == ("koala",)


@pytest.mark.parametrize("layout", ["sdxl", "ssd-1b", "segmind-vega"])
def test_no_other_of_the_sdxl_family_is_taken_for_koala(layout: str) -> None:
    shapes = {name: load_layout(layout).shapes[name] for name in load_layout(layout).attention}
    sizes = {name: (s[0], s[1]) for name, s in shapes.items()}
    assert identify(sizes, {}).families == (layout,)


@pytest.mark.parametrize("layout", SIZES)
def test_koala_is_written_as_kohya_in_names_that_comfyui_has_for_it(layout: str) -> None:
    """Under SDXL's numbers ComfyUI and diffusers would have loaded a part and said nothing."""
    keys = encode_state_dict(make_adapter(layout), format="kohya")
    assert all(
        key.startswith(("lora_unet_down_", "lora_unet_up_", "lora_unet_mid")) for key in keys
    )


@pytest.mark.parametrize("layout", SIZES)
def test_koala_as_comfy_is_refused(layout: str) -> None:
    with pytest.raises(UnsupportedFormat, match="no name in the comfy format"):
        encode_state_dict(make_adapter(layout), format="comfy")
