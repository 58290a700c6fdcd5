"""KOALA has one layer in a block, SDXL two: the original numbers of its blocks mean others."""

import pytest
import torch

from prolora.adapters import Adapter, encode_state_dict
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
